"""The options of a training step, checked before anything is made."""

from __future__ import annotations

from mpcompile.errors import TrainingError, page

page(
    "MP541",
    "A training step option that does not exist",
    "An argument of `train_step` has a value that it cannot take.",
    "accumulate is 1 or more, masters 'full' or 'split', backend 'inductor' or 'eager', cuda_graph 'auto' or a bool.",
)


def check_options(backend: str, accumulate: int, masters: str, low: str) -> None:
    """Refuse what cannot be.

    Raises:
      TrainingError: MP541.
    """
    wrong = {
        "backend": backend not in ("inductor", "eager"),
        "accumulate": accumulate < 1,
        "masters": masters not in ("full", "split"),
    }
    for name, bad in wrong.items():
        if bad:
            given = {"backend": backend, "accumulate": accumulate, "masters": masters}[name]
            raise TrainingError("MP541", f"train_step({name}={given!r}) is not possible")
    if masters == "split" and low != "bf16":
        raise TrainingError(
            "MP541",
            f"train_step(masters='split') is not possible with low={low}",
            why="BF16 is the upper half of FP32; FP16 and the lower half do not make the FP32 weight",
            try_='the policy "bf16", or masters="full"',
        )
