"""The options of a training step, checked by type and range before anything is made."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from mpcompile.errors import TrainingError, suggest

if TYPE_CHECKING:
    from mpcompile.training.loss_scale.scale import LossScale


class StepOptions(TypedDict, total=False):
    """The options of `mpcompile.training.step.TrainStep` (which says what they are), for editors and type checkers."""

    scale: str | float | LossScale
    max_grad_norm: float | None
    accumulate: int
    masters: Literal["full", "split"]
    states: Literal["fp32", "bf16", "8bit"]
    cuda_graph: Literal["auto"] | bool
    chunk_loss: bool
    recompute: Literal["auto"] | bool
    process_group: Any
    mesh: Any
    shard: Literal["none", "update", "full"]


@dataclass(frozen=True)
class Options:
    """`StepOptions` with the defaults of what was not given, and the backend; `check_options` says what is possible."""

    scale: str | float | LossScale = "auto"
    max_grad_norm: float | None = None
    accumulate: int = 1
    masters: Literal["full", "split"] = "full"
    states: Literal["fp32", "bf16", "8bit"] = "fp32"
    backend: str | None = None
    cuda_graph: Literal["auto"] | bool = "auto"
    chunk_loss: bool = True
    recompute: Literal["auto"] | bool = "auto"
    process_group: Any = None
    mesh: Any = None
    shard: Literal["none", "update", "full"] = "none"


_POSSIBLE: dict[str, tuple[Any, ...]] = {
    "backend": ("inductor", "eager"),
    "masters": ("full", "split"),
    "states": ("fp32", "bf16", "8bit"),
    "cuda_graph": ("auto", True, False),
    "recompute": ("auto", True, False),
    "chunk_loss": (True, False),
    "shard": ("none", "update", "full"),
}
# An option's name before the first release -> its name.
_RENAMED = {"remake": "recompute"}


def check_options(low: str, **given: Any) -> None:
    """Refuse what cannot be.

    Args:
      low: the low type.
      given: the options of `TrainStep`, by name.

    Raises:
      TrainingError: MP541.
    """
    for name, value in given.items():
        if name in _POSSIBLE:
            _one_of(name, value, _POSSIBLE[name])
    if not whole(given["accumulate"], 1):
        raise _impossible("accumulate", given["accumulate"], "a whole number, 1 or more")
    norm = given["max_grad_norm"]
    if norm is not None and not (real(norm) and norm > 0):
        raise _impossible("max_grad_norm", norm, "a number above 0; None clips nothing")
    if given["loss_fn"] is not None and not callable(given["loss_fn"]):
        raise _impossible("loss_fn", given["loss_fn"], "loss_fn(model, *args, **kwargs) -> scalar")
    if given["states"] != "fp32" and given["shard"] != "none":
        raise TrainingError(
            "MP541",
            f"train_step(states={given['states']!r}, shard={given['shard']!r}) is not possible",
            why="a rank's share of the moments is FP32",
            try_="states='fp32', or shard='none'",
        )
    if given["masters"] == "split" and low != "bf16":
        raise TrainingError(
            "MP541",
            f"train_step(masters='split') is not possible with low={low}",
            why="BF16 is the upper half of FP32; FP16 and the lower half do not make the FP32 weight",
            try_='the policy "bf16", or masters="full"',
        )


def check_names(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse an option that does not exist.

    Raises:
      TrainingError: MP541, with near names.
    """
    for name in given:
        if name in _RENAMED:
            now = _RENAMED[name]
            raise TrainingError("MP541", f"train_step's option {name!r} is now {now!r}", try_=f"{now}={given[name]!r}")
        if name not in known:
            near = suggest(name, known) or ", ".join(map(repr, known))
            raise TrainingError("MP541", f"train_step has no option {name!r}", try_=near)


def real(value: Any) -> bool:
    """True for a real number that is not NaN. A bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def whole(value: Any, least: int) -> bool:
    """True for a whole number (NumPy's too) of at least `least`. A bool is none."""
    if isinstance(value, bool):
        return False
    try:
        return operator.index(value) >= least
    except TypeError:
        return False


def _one_of(name: str, value: Any, possible: tuple[Any, ...]) -> None:
    # 1 == True, and is no answer to a question of yes or no.
    if not any(type(value) is type(one) and value == one for one in possible):
        raise _impossible(name, value, ", ".join(map(repr, possible)))


def _impossible(name: str, value: Any, possible: str) -> TrainingError:
    return TrainingError("MP541", f"train_step({name}={value!r:.80}) is not possible", try_=possible)
