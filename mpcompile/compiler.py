"""Settings, plan and decision of one graph: what every entrance (drop-in, step, export, report) asks for.

`decide` reads an ATen graph and runs the passes over it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from mpcompile.aten.ranges import HELD, held_by, note_ranges
from mpcompile.aten.read import FxCapture, read
from mpcompile.devices import pinned
from mpcompile.errors import RuleError
from mpcompile.graph import PrecisionGraph
from mpcompile.hardware import resolve_policy, row_name
from mpcompile.passes.base import Pass
from mpcompile.passes.classify import refuse_both
from mpcompile.passes.measured_hazards import MeasuredHazards
from mpcompile.pipeline import History, Observer, StepRecord, run
from mpcompile.policy import Policy
from mpcompile.progress import line
from mpcompile.ranges import HEADROOM, Ranges
from mpcompile.recipes import fx_passes
from mpcompile.torch_internals.patches import trace_artifact


@dataclass(frozen=True)
class Settings:
    """How one model is compiled.

    Fields:
      policy: the policy, "auto" not yet settled.
      keep_fp32, low, fp8: overrides: globs on module path, op name or node name, or callables of a `Node`.
      strict: an op without a rule is an error.
      inner: "inductor" or "eager".
      ranges: what was measured of the model's values and gradients, for FP16.
    """

    policy: Policy = field(default_factory=Policy)
    keep_fp32: tuple[Any, ...] = ()
    low: tuple[Any, ...] = ()
    strict: bool = False
    inner: str = "inductor"
    fp8: tuple[Any, ...] = ()
    ranges: Ranges | None = None

    def overrides(self) -> dict[str, tuple[Any, ...]]:
        """Each of the caller's overrides by its name."""
        return {"low": self.low, "fp8": self.fp8, "keep_fp32": self.keep_fp32}


@dataclass
class Plan:
    """A graph and what was decided of it.

    Fields:
      device: where it runs ("cuda" or "cpu").
      row: name of the row that it was priced by (see `mpcompile.devices`).
      passes: what decided, in order.
    """

    capture: FxCapture
    graph: PrecisionGraph
    steps: list[StepRecord]
    policy: Policy
    device: str
    seconds: float
    row: str = "cpu"
    passes: Sequence[Pass] = field(default=(), repr=False)

    def _repr_html_(self) -> str:
        """For notebooks: the report."""
        from mpcompile.report.model import build_report

        return build_report(self.graph, self.policy, self.row, before=self.capture.graph)._repr_html_()

    @property
    def history(self) -> History:
        """The graph as it was read, and the passes that decided on it."""
        return History(self.capture.graph, self.passes)


def decide(
    module: fx.GraphModule,
    settings: Settings,
    device: str,
    *,
    partial: bool = False,
    piece: bool = False,
    observer: Observer | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Read an ATen graph and run the passes over it.

    Args:
      device: where the graph runs ("cuda" or "cpu"); what it is priced for is the policy's to say.
      partial: the graph is one of several of the model, so an override may match in another.
      piece: the graph begins or ends where a graph broke.
      observer: called after each pass (see `mpcompile.pipeline.run`).
      held: placeholder of `module` -> the parameter or buffer that it stands for, where its numbers are there.
    """
    start = time.perf_counter()
    policy = resolve_policy(settings.policy, device)
    row = row_name(policy, device)
    capture = read(module, {"device": row, "policy": str(policy)})
    narrow = policy.low == "fp16"  # the others reach as far as FP32
    small = frozenset[str]()
    if narrow:
        values = [(v.name, capture.origin[v.name][0]) for v in map(capture.graph.values.get, capture.graph.inputs)
                  if v is not None and v.role in HELD and v.range is None]  # fmt: skip
        small = note_ranges(capture.graph, held_by(values, capture.module, held or {}), policy.low)
    passes = fx_passes(
        policy,
        row,
        keep_fp32=settings.keep_fp32,
        force_low=settings.low,
        force_fp8=settings.fp8,
        strict=settings.strict,
        fused=settings.inner == "inductor",
        partial=partial,
        measured=_measured(settings.ranges, capture, policy, piece) if narrow else None,
        small=small,
    )
    graph, steps = run(capture.graph, passes, observer)
    return Plan(capture, graph, steps, policy, device, time.perf_counter() - start, row, passes)


def _measured(ranges: Ranges | None, capture: FxCapture, policy: Policy, piece: bool) -> MeasuredHazards | None:
    """What was measured, held against the low type."""
    if ranges is None or policy.plan == "autocast":
        return None
    values, gradients = ranges.found(capture.graph, policy.low, capture.outside, piece=piece)
    return MeasuredHazards(policy.low, values, headroom=HEADROOM, gradients=gradients)


def settings_of(
    policy: str | Policy = "auto",
    keep_fp32: Any = (),
    low: Any = (),
    strict: bool = False,
    inner: str = "inductor",
    fp8: Any = (),
    ranges: Any = None,
) -> Settings:
    """Settings from what a caller may write (a policy string, one glob or several).

    Raises:
      RuleError: MP201, MP203, MP204, MP206, MP208.
    """
    if inner not in ("inductor", "eager"):
        raise RuleError("MP204", f"there is no backend {inner!r}", try_="'inductor', 'eager' or 'onnxruntime'")
    parsed = Policy.parse(policy)
    if parsed.device != "auto":
        pinned(parsed.device)  # a file that cannot be read is an error of this call, not of the first batch
    kept, forced, asked = _several(keep_fp32), _several(low), _several(fp8)
    refuse_both(kept, forced)
    refuse_both(kept, asked, "fp8")
    if asked and (parsed.low == "fp16" or parsed.plan == "autocast"):
        raise RuleError("MP201", f"fp8={asked[0]!r} beside {parsed}", why="FP8 products give BF16, in a plan of our own",
                        try_="policy='bf16' or 'fp8'")  # fmt: skip
    return Settings(parsed, kept, forced, strict, inner, asked, None if ranges is None else Ranges.load(ranges))


def _several(given: Any) -> tuple[Any, ...]:
    overrides = (
        (given,) if isinstance(given, str) or callable(given) or not isinstance(given, Iterable) else tuple(given)
    )
    for one in overrides:
        if not isinstance(one, str) and not callable(one):
            raise RuleError("MP203", f"an override is a glob or a callable of a Node, not {one!r}",
                            try_='keep_fp32=["decoder.norm*"], or low=[lambda node: node.kind == "matmul"]')  # fmt: skip
    return overrides


def log_plan(plan: Plan) -> None:
    """The one line after compilation, and the report where torch writes a trace (for tlparse)."""
    from mpcompile.report.model import build_report
    from mpcompile.report.summary import summary_line

    line(summary_line(plan.graph, plan.policy, plan.seconds))
    trace_artifact(
        "mpcompile_report",
        lambda: build_report(plan.graph, plan.policy, plan.row, steps=plan.steps, before=plan.capture.graph).to_json(),
    )
