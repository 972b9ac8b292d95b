"""The loss scale: a rule (`LossScale`), its state on the device, and one pure transition.

`transition` is branch-free and works on Python numbers and on (traced) tensors alike, so the step that runs, the
emitted graph and the property tests share one definition.  With ``floor=0``, ``cap=inf`` and ``hysteresis=1`` it is
`torch.amp.GradScaler`, bit for bit: factors are applied in FP64 and the scale is rounded to FP32.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mpcompile.errors import TrainingError
from mpcompile.training.options import real, whole


@dataclass(frozen=True)
class LossScale:
    """How the loss is scaled.

    Fields:
      kind: "dynamic" follows overflows; "static" never moves (1.0 means: no scale).
      init: first scale.
      growth, backoff: factors after `interval` finite steps in a row, and after an overflow.
      floor, cap: the scale stays between the two.
      hysteresis: overflows that are forgiven before the scale backs off (1: none).
      refill: when the forgiveness is filled up again: "growth" (only when the scale may grow), "clean-step".
      at_floor: an overflow at the floor is kept silent ("keep"), warned of ("warn") or an error ("raise").

    >>> LossScale.static(128.0).init
    128.0
    """

    kind: Literal["dynamic", "static"] = "dynamic"
    init: float = 65536.0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    floor: float = 1.0
    cap: float = 2.0**24
    hysteresis: int = 1
    refill: Literal["growth", "clean-step"] = "growth"
    at_floor: Literal["keep", "warn", "raise"] = "keep"

    def __post_init__(self) -> None:
        for rule, holds in _RULES:
            if not holds(self):
                raise TrainingError("MP501", f"{self!r} is not a loss scale", why=f"it must be that {rule}")

    @classmethod
    def dynamic(
        cls,
        init: float = 65536.0,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        floor: float = 1.0,
        cap: float = 2.0**24,
        hysteresis: int = 1,
        refill: Literal["growth", "clean-step"] = "growth",
        at_floor: Literal["keep", "warn", "raise"] = "keep",
    ) -> LossScale:
        """A scale that halves on overflow and doubles after `interval` finite steps (see the class)."""
        return cls("dynamic", init, growth, backoff, interval, floor, cap, hysteresis, refill, at_floor)

    @classmethod
    def static(cls, scale: float = 1.0) -> LossScale:
        """A scale that never moves; 1.0 is no scale at all (BF16)."""
        return cls(kind="static", init=float(scale) if real(scale) else scale)

    @classmethod
    def of(cls, scale: str | float | LossScale, low: str) -> LossScale:
        """What `train_step(scale=…)` means for the low type `low`: "auto" is dynamic for FP16, none otherwise.

        Raises:
          TrainingError: MP501.
        """
        if isinstance(scale, LossScale):
            return scale
        if scale == "auto":
            return cls.dynamic() if low == "fp16" else cls.static(1.0)
        if real(scale):
            return cls.static(float(scale))
        raise TrainingError(
            "MP501", f"scale={scale!r} is not a loss scale", try_="'auto', a number, or LossScale.dynamic(…)"
        )

    @property
    def is_off(self) -> bool:
        """True when the loss is never multiplied."""
        return self.kind == "static" and self.init == 1.0

    def initial(self, device: torch.device | str | None = None) -> ScaleState:
        """The state before the first step: Python numbers, or 0-dim tensors on `device`."""
        numbers: ScaleState = ScaleState(_round(self.init), 0, self.hysteresis, 0, 0, 0)
        return numbers if device is None else tensors(numbers, device)


_NUMBERS = ("init", "growth", "backoff", "floor", "cap")
# What FP32 holds, and whose inverse it holds.
_SMALLEST, _LARGEST = 2.0**-126, torch.finfo(torch.float32).max
# What must hold of a rule, in the order in which it is asked: types before ranges.
_RULES: tuple[tuple[str, Callable[[LossScale], bool]], ...] = (
    ("kind is 'dynamic' or 'static'", lambda one: one.kind in ("dynamic", "static")),
    (f"{', '.join(_NUMBERS)} are numbers", lambda one: all(real(getattr(one, name)) for name in _NUMBERS)),
    ("init is positive, and 1 / init too, in FP32", lambda one: _SMALLEST <= one.init <= _LARGEST),
    ("growth is above 1, and finite", lambda one: 1 < one.growth < math.inf),
    ("backoff is between 0 and 1", lambda one: 0 < one.backoff < 1),
    ("interval is a whole number, 1 or more", lambda one: whole(one.interval, 1)),
    ("hysteresis is a whole number, 1 or more", lambda one: whole(one.hysteresis, 1)),
    ("0 <= floor <= init <= cap", lambda one: one.kind == "static" or 0 <= one.floor <= one.init <= one.cap),
    ("refill is 'growth' or 'clean-step'", lambda one: one.refill in ("growth", "clean-step")),
    ("at_floor is 'keep', 'warn' or 'raise'", lambda one: one.at_floor in ("keep", "warn", "raise")),
)


class ScaleState(NamedTuple):
    """What moves: scale FP32, the trackers int32, the counts int64 (0-dim on the device), or Python numbers.

    Fields:
      scale: the factor on the loss.
      growth_tracker: finite steps since the last change.
      hysteresis_left: overflows still forgiven.
      steps: steps taken; skipped: steps skipped; floor_hits: overflows with the scale at its floor.
    """

    scale: Any
    growth_tracker: Any
    hysteresis_left: Any
    steps: Any
    skipped: Any
    floor_hits: Any


DTYPES = ScaleState(torch.float32, torch.int32, torch.int32, torch.int64, torch.int64, torch.int64)


def tensors(numbers: ScaleState, device: torch.device | str) -> ScaleState:
    """`numbers` as 0-dim tensors on `device`, each in its dtype (`DTYPES`)."""
    return ScaleState(*(torch.tensor(n, dtype=d, device=device) for n, d in zip(numbers, DTYPES, strict=True)))


def transition(rule: LossScale, state: ScaleState, finite: Any) -> ScaleState:
    """The state after one step whose gradients were `finite` (a bool, or a 0-dim bool tensor). No branch, no sync."""
    steps = _where(finite, state.steps + 1, state.steps)
    skipped = _where(finite, state.skipped, state.skipped + 1)
    if rule.kind == "static":
        return _as_state(*state[:3], steps, skipped, state.floor_hits)
    full = state.growth_tracker + 1 >= rule.interval
    grown = _at_most(_times(state.scale, rule.growth), rule.cap)
    # A product past FP32 is not taken: the scale stays, and the count starts again, as in GradScaler.
    grown = _where(_is_finite(grown), grown, state.scale)
    left = _at_least(state.hysteresis_left - 1, 0)
    backs_off = left <= 0
    lowered = _at_least(_times(state.scale, rule.backoff), rule.floor)
    refilled = _where(full, rule.hysteresis, state.hysteresis_left) if rule.refill == "growth" else rule.hysteresis
    at_floor = _where(backs_off, state.scale <= rule.floor, False)
    return _as_state(
        _where(finite, _where(full, grown, state.scale), _where(backs_off, lowered, state.scale)),
        _where(finite, _where(full, 0, state.growth_tracker + 1), 0),
        _where(finite, refilled, left),
        steps,
        skipped,
        _where(finite, state.floor_hits, _where(at_floor, state.floor_hits + 1, state.floor_hits)),
    )


def inverse(scale: Any) -> Any:
    """1 / scale, in FP64 and rounded to FP32, as GradScaler unscales."""
    if isinstance(scale, Tensor):
        return scale.double().reciprocal().float()
    return _round(1.0 / scale)


def to_dict(rule: LossScale, state: ScaleState) -> dict[str, Any]:
    """Every field of rule and state as numbers and words, with GradScaler's five keys among them. Reads the device."""
    now = ScaleState(*(value.item() if isinstance(value, Tensor) else value for value in state))
    return {
        "scale": now.scale,
        "growth_factor": rule.growth,
        "backoff_factor": rule.backoff,
        "growth_interval": rule.interval,
        "_growth_tracker": now.growth_tracker,
        **{k: v for k, v in asdict(rule).items() if k not in ("growth", "backoff", "interval")},
        "hysteresis_left": now.hysteresis_left,
        "steps": now.steps,
        "skipped": now.skipped,
        "floor_hits": now.floor_hits,
    }


def from_dict(saved: dict[str, Any], rule: LossScale) -> tuple[LossScale, ScaleState]:
    """Rule and state (Python numbers) from `to_dict`'s dict or from GradScaler's; what it lacks is taken from `rule`.

    Raises:
      TrainingError: MP501, when a key of GradScaler's five is missing.
    """
    five = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    missing = [key for key in five if key not in saved]
    if missing:
        raise TrainingError(
            "MP501",
            f"a loss scale's saved state lacks {', '.join(missing)}",
            why=f"it has {', '.join(saved) or 'nothing (a disabled GradScaler saves nothing)'}",
        )
    named = {f.name: saved[f.name] for f in fields(LossScale) if f.name in saved}
    known = {
        **asdict(rule),
        **named,
        "growth": saved["growth_factor"],
        "backoff": saved["backoff_factor"],
        "interval": saved["growth_interval"],
    }
    if "kind" not in saved:
        # GradScaler knows no bounds: its scale may stand outside ours, which then give way.
        known.update(
            kind="dynamic",
            init=saved["scale"],
            floor=min(known["floor"], saved["scale"]),
            cap=max(known["cap"], saved["scale"]),
        )
    loaded = LossScale(**known)
    state = ScaleState(
        saved["scale"],
        saved["_growth_tracker"],
        saved.get("hysteresis_left", loaded.hysteresis),
        saved.get("steps", 0),
        saved.get("skipped", 0),
        saved.get("floor_hits", 0),
    )
    return loaded, state


def _as_state(*values: Any) -> ScaleState:
    """The values as a state; tensors in their own dtype again (numbers mixed in may have widened them)."""
    return ScaleState(*(v.to(d) if isinstance(v, Tensor) else v for v, d in zip(values, DTYPES, strict=True)))


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return torch.where(condition, yes, no) if isinstance(condition, Tensor) else (yes if condition else no)


def _times(scale: Any, factor: float) -> Any:
    return (scale.double() * factor).float() if isinstance(scale, Tensor) else _round(scale * factor)


def _at_most(value: Any, bound: float) -> Any:
    return value.clamp(max=bound) if isinstance(value, Tensor) else min(value, bound)


def _at_least(value: Any, bound: float) -> Any:
    return value.clamp(min=bound) if isinstance(value, Tensor) else max(value, bound)


def _is_finite(value: Any) -> Any:
    return torch.isfinite(value) if isinstance(value, Tensor) else math.isfinite(value)


def _round(number: float) -> float:
    """`number` rounded to FP32 (inf past its range)."""
    return float(ctypes.c_float(number).value)
