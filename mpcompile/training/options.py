"""The options of a training step, checked before anything is made."""

from __future__ import annotations

from typing import Any

from mpcompile.errors import TrainingError, page

page(
    "MP541",
    "A training step option that does not exist",
    "An argument of `train_step` has a value that it cannot take.",
    "accumulate is 1 or more, masters 'full' or 'split', backend 'inductor' or 'eager', cuda_graph and remake 'auto' or a bool.",
)

_POSSIBLE: dict[str, tuple[Any, ...]] = {
    "backend": ("inductor", "eager"),
    "masters": ("full", "split"),
    "cuda_graph": ("auto", True, False),
    "remake": ("auto", True, False),
}


def check_options(low: str, **given: Any) -> None:
    """Refuse what cannot be.

    Args:
      low: the low type.
      given: the options of `TrainStep`, by name.

    Raises:
      TrainingError: MP541.
    """
    for name, value in given.items():
        possible = _POSSIBLE.get(name)
        if possible is not None and value not in possible:
            choices = ", ".join(map(repr, possible))
            raise TrainingError("MP541", f"train_step({name}={value!r}) is not possible", try_=choices)
    if given["accumulate"] < 1:
        raise TrainingError(
            "MP541", f"train_step(accumulate={given['accumulate']!r}) is not possible", try_="1 or more"
        )
    if given["masters"] == "split" and low != "bf16":
        raise TrainingError(
            "MP541",
            f"train_step(masters='split') is not possible with low={low}",
            why="BF16 is the upper half of FP32; FP16 and the lower half do not make the FP32 weight",
            try_='the policy "bf16", or masters="full"',
        )
