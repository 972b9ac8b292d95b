"""The pass lists of torch graphs and of ONNX graphs, as data: names in order, and what each name stands for.

`FX` and `ONNX` say what runs and in which order; `PASSES` says how a name becomes a pass for a request, or why it has no
part in it (None). Nothing is found by its place in another list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from mpcompile.formats import LOW
from mpcompile.passes.all_fp32 import AllFp32
from mpcompile.passes.assign import Assign
from mpcompile.passes.base import Pass
from mpcompile.passes.classify import Classify, refuse_both
from mpcompile.passes.hazards import Hazards
from mpcompile.passes.insert_casts import InsertCasts
from mpcompile.passes.legalize import Legalize
from mpcompile.passes.measured_hazards import MeasuredHazards
from mpcompile.passes.normalize import Normalize
from mpcompile.passes.origins import Origins
from mpcompile.passes.simplify_casts import SimplifyCasts
from mpcompile.passes.strict import Strict
from mpcompile.pipeline import Verify
from mpcompile.policy import Policy
from mpcompile.signature import Signature

_DECIDE = ("measured-hazards", "hazards", "origins", "strict", "assign", "all-fp32")
_CAST = ("insert-casts", "simplify-casts", "verify")
FX = ("normalize", "classify", *_DECIDE, *_CAST)
# The schemas' types are held as soon as there are verdicts.
ONNX = ("normalize", "classify", "legalize", *_DECIDE, *_CAST)


class RequestOptions(TypedDict, total=False):
    """The fields of `Request` besides policy and device."""

    keep_fp32: Any
    force_low: Any
    force_fp8: Any
    strict: bool
    partial: bool
    fused: bool
    verify: bool
    bind: bool
    signatures: Mapping[str, Signature]
    measured: MeasuredHazards | None
    small: frozenset[str]


@dataclass(frozen=True)
class Request:
    """What passes are put together for.

    Fields:
      policy: its `low` is resolved ("fp16", "bf16" or "fp32").
      device: name of a row of devices.toml.
      source: whose operation names the graph uses: "aten" or "onnx".
      keep_fp32, force_low, force_fp8: the caller's overrides (see `mpcompile.passes.classify`).
      strict: an operation without a rule is an error.
      partial: the graph is one of several of the model, so an override may match in another.
      fused: the graph will be compiled, so casts inside a fused region are free.
      verify: end with the verifier.
      bind: verdicts bind, whatever they cost (see `mpcompile.passes.assign`).
      signatures: the operations' types by node, where their schemas have some.
      measured: ranges that were measured.
      small: parameters near zero (see `mpcompile.passes.hazards`).
    """

    policy: Policy
    device: str = "cpu"
    source: str = "aten"
    keep_fp32: Sequence[Any] = ()
    force_low: Sequence[Any] = ()
    force_fp8: Sequence[Any] = ()
    strict: bool = False
    partial: bool = False
    fused: bool = True
    verify: bool = True
    bind: bool = False
    signatures: Mapping[str, Signature] = field(default_factory=dict)
    measured: MeasuredHazards | None = None
    small: frozenset[str] = frozenset()

    @property
    def lowers(self) -> bool:
        """True where anything may be low."""
        return self.policy.low in LOW

    @property
    def looks(self) -> bool:
        """torch.autocast knows neither hazards nor origins, and plan="autocast" promises its decisions."""
        return self.lowers and self.policy.plan != "autocast"


def _classify(asked: Request) -> Pass:
    return Classify(
        asked.policy.low,
        asked.source,
        asked.policy.plan,
        tuple(asked.keep_fp32),
        tuple(asked.force_low),
        asked.strict,
        asked.partial,
        tuple(asked.force_fp8),
    )


def _assign(asked: Request) -> Pass | None:
    if not asked.lowers:
        return None
    policy = asked.policy
    recipe = policy.fp8 if policy.low == "bf16" and (policy.products == "fp8" or asked.force_fp8) else ""
    return Assign(
        policy.low,
        asked.device,
        policy.plan,
        asked.fused,
        policy.output,
        asked.source,
        bind=asked.bind,
        fp8=recipe,
        fp8_asked=policy.products != "fp8",
    )


# Name of a pass -> the pass for a request, or None where it has no part in it.
PASSES: dict[str, Callable[[Request], Pass | None]] = {
    "normalize": lambda asked: Normalize(),
    "classify": _classify,
    "legalize": lambda asked: Legalize(asked.policy.low, asked.signatures) if asked.lowers else None,
    "measured-hazards": lambda asked: asked.measured if asked.lowers else None,
    "hazards": lambda asked: Hazards(asked.policy.low, asked.small) if asked.looks else None,
    "origins": lambda asked: Origins(asked.policy.low, asked.policy.output) if asked.looks else None,
    "strict": lambda asked: (
        Strict(asked.policy.low, asked.source) if asked.policy.plan == "strict" and asked.lowers else None
    ),
    "assign": _assign,
    "all-fp32": lambda asked: None if asked.lowers else AllFp32(),
    "insert-casts": lambda asked: InsertCasts(asked.policy.low, asked.policy.output) if asked.lowers else None,
    "simplify-casts": lambda asked: SimplifyCasts() if asked.lowers else None,
    "verify": lambda asked: Verify(asked.policy.low, asked.policy.output) if asked.lowers and asked.verify else None,
}


def passes_of(recipe: Sequence[str], asked: Request) -> list[Pass]:
    """The passes of a recipe, in order, without those that have no part in the request.

    Raises:
      RuleError: MP204, for one pattern in two overrides that contradict each other.
    """
    refuse_both(asked.keep_fp32, asked.force_low)
    refuse_both(asked.keep_fp32, asked.force_fp8, "fp8")
    return [one for name in recipe if (one := PASSES[name](asked)) is not None]


def fx_passes(policy: Policy, device: str = "cpu", **given: Unpack[RequestOptions]) -> list[Pass]:
    """The passes for a torch graph; `given` as in `Request`."""
    return passes_of(FX, Request(policy, device, "aten", **given))


def onnx_passes(policy: Policy, device: str = "cpu-onnx", **given: Unpack[RequestOptions]) -> list[Pass]:
    """The passes for an ONNX graph; `given` as in `Request`."""
    return passes_of(ONNX, Request(policy, device, "onnx", **given))


def one_of_each() -> list[Pass]:
    """Every pass once, in the order in which they run: for those that describe them."""
    asked = [
        Request(Policy.parse(text), measured=MeasuredHazards("bf16")) for text in ("low=bf16,plan=strict", "low=fp32")
    ]
    return [next(one for each in asked if (one := PASSES[name](each)) is not None) for name in ONNX]


__all__ = ["FX", "ONNX", "PASSES", "Request", "fx_passes", "one_of_each", "onnx_passes", "passes_of"]
