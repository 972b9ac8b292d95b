"""`mpcompile demo`."""


def demo() -> None:
    """Train a byte-level GPT, FP32 against mpcompile."""
