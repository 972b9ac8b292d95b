"""`mpcompile bench`."""


def bench() -> None:
    """Measure."""
