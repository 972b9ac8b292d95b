"""ONNX in, ONNX out: `convert` decides and rewrites, `OnnxMixedPrecision` holds the result."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from mpcompile.devices import pinned
from mpcompile.errors import OnnxError
from mpcompile.formats import LOW
from mpcompile.garbage import no_garbage_collection
from mpcompile.graph import Node, PrecisionGraph
from mpcompile.onnx.norms import unlike
from mpcompile.onnx.ranges import OnnxRanges
from mpcompile.onnx.read import reader as frontend
from mpcompile.onnx.run import calibrate as calibrate_room
from mpcompile.onnx.run import session as ort
from mpcompile.onnx.run.calibrate import OutputError
from mpcompile.onnx.run.generate import NotRun, on_generated
from mpcompile.onnx.tune import sensitivities, smallest
from mpcompile.onnx.write import check as onnx_check
from mpcompile.onnx.write import edits as onnx_write
from mpcompile.onnx.write.message import Written
from mpcompile.passes.assign import Assign
from mpcompile.passes.base import Pass
from mpcompile.passes.legalize import Legalize
from mpcompile.passes.measured_hazards import Measured, MeasuredHazards
from mpcompile.pipeline import History, StepRecord, default_passes, run
from mpcompile.policy import Policy

if TYPE_CHECKING:
    from mpcompile.report.comparison import Comparison


# ONNX Runtime's CPU provider puts casts around FP16 nodes and looks through all nodes for the name of each: the time to
# load goes with the square of their number (0.6 s at 1,000, 6 s at 4,000, some minutes at 20,000).
FP16_NODES = 2000
SLOW_TO_LOAD = "the CPU provider's time to load FP16 goes with the square of its nodes"
# What `auto` aims at when no max_error is given: a few roundings of FP16.
AUTO_ERROR = 1e-2
# The row of `devices.toml` that a provider's plan is priced for.
ROWS = {"cpu": "cpu-onnx", "tensorrt": "tensorrt-onnx"}
# Floating-point operations from which on a plan in BF16 is held to its price, and how much faster FP16 is worth a line.
LARGE_WORK, FASTER = 1e8, 1.3
# How much larger than on generated inputs values may be on real ones.
HEADROOM = 4.0


@dataclass(frozen=True)
class Options:
    """What a conversion was asked for; see `convert`."""

    keep_fp32: tuple[Any, ...] = ()
    low: tuple[Any, ...] = ()
    strict: bool = False
    keep_io: bool = True
    provider: str = "cuda"
    simulate: bool = False
    annotate: bool = True
    session_options: Any = None


@dataclass
class OnnxMixedPrecision:
    """A converted ONNX model.

    Fields:
      policy, options: what was asked for.
      capture: the model as it was read; its graph is the one before the passes.
      graph: the precision graph after the passes.
      steps: what each pass did.
      notes: lines for the user: a raised opset, checks that could not be made, unknown operators.
      ranges: what the values were on the sample inputs, when there were any.
      errors: how far each output is off on the sample inputs, worst first, in true low-precision numerics.
      kept: nodes that `auto` keeps FP32.
      passes: what decided, in order.
    """

    policy: Policy
    options: Options
    capture: frontend.OnnxCapture
    graph: PrecisionGraph
    steps: list[StepRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ranges: dict[str, Measured] = field(default_factory=dict)
    errors: list[OutputError] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    passes: Sequence[Pass] = field(default=(), repr=False)

    @cached_property
    def _written(self) -> Written:
        return self.written(self.options.simulate)

    @property
    def ir_model(self) -> ir.Model:
        """The rewritten model; large weights are converted when they are read."""
        return self._written.ir()

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The rewritten model as one message.

        Raises:
          OnnxError: MP604, above 2 GB.
        """
        if self.is_large:
            size = self._written.weight_bytes / 1e9
            raise OnnxError("MP604", f"the model has {size:.1f} GB of weights", try_=".save(path)")
        return self._written.message()

    @property
    def is_large(self) -> bool:
        """True when the weights go to a data file."""
        return self._written.weight_bytes > onnx_check.EXTERNAL_FROM

    def simulated(self) -> onnx.ModelProto:
        """The same plan with FP32 operators and rounded values: its numbers are the low type's, on any provider."""
        return self.model if self.options.simulate else self.written(True).message()

    def _stand_in(self) -> Any:
        """The simulation, as a session takes it."""
        return (self._written if self.options.simulate else self.written(True)).loadable()

    def compare(self, samples: Any) -> list[OutputError]:
        """How far each output is off on `samples`, worst first, in true low-precision numerics (simulated)."""
        feeds = calibrate_room.samples(samples)
        return calibrate_room.compare(self._stand_in(), feeds, calibrate_room.reference(self.capture.source, feeds))

    def compare_nodes(self, samples: Any = None, *, autocast: bool = False) -> Comparison:
        """Every value of the plan beside FP32's, on `samples` or generated inputs; `autocast`: its decisions beside them.

        Raises:
          OnnxError: MP606, for samples that cannot be read, or a model that does not run on generated ones.
        """
        from mpcompile.onnx.compare import compare

        notes = list[str]()
        if samples is not None:
            feeds = calibrate_room.samples(samples)
        else:
            try:
                said, feeds = on_generated(self.capture, lambda feeds, _: (
                    calibrate_room.reference(self.capture.source, feeds), feeds)[1])  # fmt: skip
            except NotRun as why:
                raise OnnxError("MP606", f"there are no samples, and {why}", try_="samples='data.npz'") from why
            notes.append(f"on {said}")
        found = compare(self, feeds, notes)
        if not autocast or self.policy.low not in LOW:
            return found
        plain = replace(self.options, keep_fp32=(), low=())
        other = plan(replace(self.policy, plan="autocast"), plain, self.capture)
        if not any(node.precision in LOW for node in other.graph):
            return replace(found, notes=(*found.notes, "plan=autocast runs nothing low here"))
        return replace(found, autocast=compare(other, feeds))

    def verify(self, samples: Any = None) -> list[OutputError]:
        """`compare` on `samples`, or on generated inputs, with what is not finite an error; empty when nothing ran.

        Raises:
          OnnxError: MP605.
        """
        if samples is not None:
            self.errors = self.compare(samples)
        else:
            stand_in, source = self._stand_in(), self.capture.source
            try:
                said, self.errors = on_generated(self.capture, lambda feeds, bounds: calibrate_room.compare(
                    stand_in, feeds, calibrate_room.reference(source, feeds, bounds), bounds))  # fmt: skip
            except NotRun as why:
                self.notes.append(f"outputs not compared, {why}: give samples")
                return []
            self.notes.append(f"outputs compared on {said}, in true {self.policy.low} numerics")
        if not math.isfinite(worst(self)):
            bad = ", ".join(error.name for error in self.errors if not math.isfinite(error.relative))
            raise OnnxError("MP605", f"outputs are not finite where the model's own are: {bad}",
                            try_="calibrate= with samples and auto=True, or keep_fp32 on what overflows")  # fmt: skip
        return self.errors

    def written(self, simulate: bool) -> Written:
        """The plan as a model, plain or simulated."""
        low_inputs = "" if self.options.keep_io or self.policy.low not in LOW else self.policy.low
        with no_garbage_collection():
            return onnx_write.write(self.capture, self.graph, simulate=simulate, annotated=self.options.annotate,
                                    low_inputs=low_inputs)  # fmt: skip

    def report(self) -> Any:
        """What was decided for each node, and why. See `mpcompile.report.model.Report`."""
        from mpcompile.report.model import build_report

        return build_report(self.graph, self.policy, _device(self.policy, self.options), steps=self.steps,
                            before=self.capture.graph, history=self.history)  # fmt: skip

    def _repr_html_(self) -> str:
        """For notebooks: the report, and the notes."""
        from mpcompile.report.html import fragment

        return fragment(self.report(), self.notes)

    @property
    def history(self) -> History:
        """The graph as it was read, and the passes that decided on it."""
        return History(self.capture.graph, self.passes)

    def session(self, providers: Sequence[str] | None = None, options: Any = None) -> Any:
        """An `onnxruntime.InferenceSession` of the converted model, on CUDA and the CPU unless `providers` says else.

        One line about where it runs goes to the logger "mpcompile".
        """
        held = ort.session(self.model, providers, options or self.options.session_options)
        logging.getLogger("mpcompile").info(ort.placed(held, ort.wanted(providers)))
        return held

    def run(self, **feeds: Any) -> dict[str, Any]:
        """Run the converted model once, on the providers installed here: name of each output -> array."""
        return ort.run(self._session, feeds)

    @cached_property
    def _session(self) -> Any:
        return self.session()

    def check(self) -> None:
        """The full checker, strict shape inference and a session of ONNX Runtime.

        Raises:
          OnnxError: MP602, MP603.
        """
        if not self.is_large:  # if it is, `save` checks the file
            self._check(self._written.loadable())

    def _check(self, model: Any) -> None:
        loads = None
        if self._needs_stand_in:
            loads = self.written(True).loadable()
            if self.policy.low == "fp16":
                self.notes.append(f"loaded as its simulation, without {self.options.provider} here: {SLOW_TO_LOAD}")
        self.notes += onnx_check.check(model, lambda: self.capture.source, loads, self.options.session_options)

    @property
    def _needs_stand_in(self) -> bool:
        """For a provider that is not installed here: BF16, which the CPU has no kernels for, and much FP16."""
        if self.options.simulate or not self.options.provider or ort.has_provider(self.options.provider):
            return False
        low = sum(node.precision == "fp16" for node in self.graph) if self.policy.low == "fp16" else 0
        return self.policy.low == "bf16" or low > FP16_NODES

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model; weights beyond 2 GB go to ``<name>.data`` beside it, one tensor at a time.

        The file appears whole or not at all, and only after every check.

        Raises:
          OnnxError: MP602, MP603.
        """
        name = Path(path).name

        def fill(folder: Path) -> None:
            if not self.is_large:
                (folder / name).write_bytes(self.model.SerializeToString())
                return
            ir.save(self.ir_model, folder / name, external_data=f"{name}.data")
            self._check(folder / name)

        onnx_check.save_atomic(path, fill)


def convert(
    model: Any,
    policy: str | Policy = "fp16",
    *,
    keep_fp32: Any = (),
    low: Any = (),
    strict: bool = False,
    keep_io: bool = True,
    provider: str = "cuda",
    simulate: bool = False,
    annotate: bool = True,
    calibrate: Any = None,
    ranges: Any = True,
    max_error: float | None = None,
    auto: bool = False,
    session_options: Any = None,
) -> OnnxMixedPrecision:
    """Convert an ONNX model to mixed precision.

    Args:
      model: a path, an `onnx.ModelProto` or an `onnx_ir.Model`; it is not changed.
      policy: "fp16" (also for "auto"), "bf16", "fp32", fields as in "low=fp16,output=low", or a `Policy`.
      keep_fp32, low: globs on module path, operator ("onnx::Exp") or node name, or callables of a `Node`.
      strict: an operator without a rule is an error instead of FP32.
      keep_io: inputs and outputs keep their types; False gives FP32 ones in the low type.
      provider: whose kernels the model is for: "cuda", "cpu", "tensorrt" or another provider of ONNX Runtime (the
        schemas alone, where no table of its kernels is known); "" for any.
      simulate: write FP32 operators whose results are rounded through the low type (see `OnnxMixedPrecision.simulated`).
      annotate: write each node's decision and its reason into the node's metadata.
      calibrate: sample inputs: an ``.npz`` path, a mapping of input names to arrays, several of them, or a function
        that returns them. Values that overflow or vanish on them stay FP32, and outputs are compared (`errors`).
      ranges: without samples, run the model on generated inputs of the declared shapes for the ranges of its values (FP16
        alone; seeded, in bounded time, said in the report and in `notes`); False leaves that out. Or ranges that were measured
        before, as an `OnnxRanges` or its file (`mpcompile calibrate`), instead of `calibrate`.
      max_error: largest error of an output on the samples, relative to its largest element; beyond it, an error.
      auto: find a small set of nodes to keep FP32 so that `max_error` (1e-2 when not given) holds; see `kept`.
      session_options: `onnxruntime.SessionOptions` for the check that the model loads (custom operator libraries).

    Raises:
      OnnxError: MP601 (not readable), MP602 and MP603 (the result would not load; nothing is written), MP605 (outputs
        are off by more than `max_error`), MP606 (samples), MP611 (provider).
      RuleError: MP201 (policy), MP203 (an override that matches nothing), MP207 and MP208 (ranges of another graph, or none).
    """
    given = None if isinstance(ranges, bool) else OnnxRanges.load(ranges)
    if given is not None and calibrate is not None:
        raise OnnxError(
            "MP606", "samples and ranges at once", try_="calibrate= measures ranges itself; leave ranges= out"
        )
    if calibrate is None and (auto or max_error is not None):
        raise OnnxError("MP606", "max_error and auto need sample inputs", try_="calibrate='data.npz'")
    options = Options(
        _several(keep_fp32),
        _several(low),
        strict,
        keep_io,
        ort.provider_name(provider),
        simulate,
        annotate,
        session_options,
    )
    settled = frontend_policy(policy)
    if given is not None:
        made = _as_measured(settled, options, model, given)
    elif calibrate is None:
        made = (
            _generated(settled, options, model) if ranges and settled.low == "fp16" else plan(settled, options, model)
        )
    else:
        made = _calibrated(settled, options, model, calibrate_room.samples(calibrate), max_error, auto)
    made.check()
    return made


def _as_measured(policy: Policy, options: Options, model: Any, ranges: OnnxRanges) -> OnnxMixedPrecision:
    """Plan with ranges that were measured before: those of FP16, which alone needs them."""
    with no_garbage_collection():
        capture = frontend.read(model, policy.low, provider=options.provider)
    if policy.low != "fp16":
        return plan(policy, options, capture)
    ranges.check(capture)
    return plan(policy, options, capture, dict(ranges.values), ranges.on)


def _generated(policy: Policy, options: Options, model: Any) -> OnnxMixedPrecision:
    """Plan with ranges that were measured on generated inputs."""
    with no_garbage_collection():
        capture = frontend.read(model, policy.low, provider=options.provider)
    try:
        said, ranges = on_generated(capture, lambda feeds, bounds: calibrate_room.record(capture, feeds, policy.low,
                                                                                          bounds=bounds))  # fmt: skip
    except NotRun as why:
        capture.notes.append(f"ranges not measured, {why}: give samples (calibrate=), since FP16 ends at 65,504")
        return plan(policy, options, capture)
    capture.notes.append(f"ranges measured on {said}; samples (calibrate=) say more, ranges=False leaves this out")
    return plan(policy, options, capture, ranges, said)


def _calibrated(policy: Policy, options: Options, model: Any, feeds: Sequence[Any], max_error: float | None,
                auto: bool) -> OnnxMixedPrecision:  # fmt: skip
    """Plan with measured ranges, compare the outputs, and keep more nodes FP32 where asked to."""
    capture = frontend.read(model, policy.low, provider=options.provider)
    ranges = calibrate_room.record(capture, feeds, policy.low) if policy.low in LOW else {}
    made = plan(policy, options, capture, ranges)
    wanted = calibrate_room.reference(model, feeds)
    limit = max_error if max_error is not None else AUTO_ERROR if auto else None
    made.errors = calibrate_room.compare(made._stand_in(), feeds, wanted)
    if limit is None or worst(made) <= limit:
        return made
    order = sensitivities(capture, made.graph, made.written(True).ir(), feeds)
    if not auto:
        what = f"an output is off by {worst(made):.3g}, more than {limit:.3g}"
        raise OnnxError("MP605", what, why="; ".join(str(error) for error in made.errors[:3]),
                        try_=f"auto=True (--auto), or keep the most sensitive nodes: keep_fp32={order[:5]!r}")  # fmt: skip

    def attempt(kept: Sequence[str]) -> OnnxMixedPrecision:
        more = replace(options, keep_fp32=(*options.keep_fp32, *([_Named(frozenset(kept))] if kept else ())))
        tried = plan(policy, more, capture, ranges)
        tried.errors, tried.kept = calibrate_room.compare(tried._stand_in(), feeds, wanted), list(kept)
        return tried

    kept = smallest(order, lambda names: worst(attempt(names)), limit)
    if kept is None:
        raise OnnxError("MP605", f"no set of FP32 nodes brings the outputs within {limit:.3g}", why=str(made.errors[0]),
                        try_="a larger max_error: what is left is the model's own rounding")  # fmt: skip
    return attempt(kept)


def worst(made: OnnxMixedPrecision) -> float:
    """The largest relative error of an output."""
    return made.errors[0].relative if made.errors else 0.0


@dataclass(frozen=True)
class _Named:
    """An override that picks nodes by id, as `keep_fp32` takes it."""

    ids: frozenset[str]
    __name__ = "settled"

    def __call__(self, node: Node) -> bool:
        return node.id in self.ids


def frontend_policy(policy: str | Policy) -> Policy:
    """The policy with "auto" settled: FP16, which every provider runs."""
    parsed = Policy.parse(policy)
    if parsed.products == "fp8":
        raise OnnxError("MP612", "ONNX models are converted without FP8 products", try_="policy='bf16' or 'fp16'")
    if parsed.device != "auto":
        pinned(parsed.device)
    return parsed.with_low("fp16") if parsed.low == "auto" else parsed


def plan(policy: Policy, options: Options, model: Any,
         ranges: dict[str, Measured] | None = None, on: str = "", depth: int = 4) -> OnnxMixedPrecision:  # fmt: skip
    """Read `model` (or take a capture of it) and decide; nothing is checked or written yet.

    A plan whose norms a runtime could not fuse is made again with their types settled, `depth` times at most.
    """
    if not options.keep_io:
        policy = replace(policy, output="low")
    capture = model
    with no_garbage_collection():
        if not isinstance(model, frontend.OnnxCapture):
            capture = frontend.read(model, policy.low, provider=options.provider)
        passes = passes_for(policy, options, capture, ranges, on)
        graph, steps = run(capture.graph, passes)
        notes = list(capture.notes)
        if policy.low == "bf16" and sum(node.flops for node in graph) >= LARGE_WORK:
            graph, steps, passes, found = _priced(policy, options, capture, graph, steps, passes)
            notes += found
    low, fp32 = unlike(graph) if depth else (set(), set())
    if low or fp32:
        more = replace(
            options, low=(*options.low, _Named(frozenset(low))), keep_fp32=(*options.keep_fp32, _Named(frozenset(fp32)))
        )
        return plan(policy, more, capture, ranges, on, depth - 1)
    _call_by_name(graph)
    shown = (options.provider or "cpu") if policy.device == "auto" else policy.device
    graph.header.update(source="onnx", policy=str(policy), device=shown)
    made = OnnxMixedPrecision(policy, options, capture, graph, steps, notes, ranges or {}, passes=passes)
    if unknown := sorted({node.op for node in graph if node.decided_by == "unknown"}):
        made.notes.append(f"operators without a rule stay FP32: {', '.join(unknown)}")
    return made


def _priced(
    policy: Policy, options: Options, capture: frontend.OnnxCapture, graph: PrecisionGraph, steps: list[StepRecord],
    passes: list[Pass],
) -> tuple[PrecisionGraph, list[StepRecord], list[Pass], list[str]]:  # fmt: skip
    """A BF16 plan that is not slower than FP32 by prediction, and what is to be said of BF16 on this provider."""
    device, seconds = _device(policy, options), _seconds(policy, options, graph)
    whole, notes = seconds["fp32"], list[str]()
    if seconds["plan"] > whole:
        passes = passes_for(policy, options, capture, bind=False)
        graph, steps = run(capture.graph, passes)
        notes.append(f"BF16 would take {seconds['plan'] / whole:.2g} times as long as FP32 on {device}: "
                     "only what gains by it is BF16")  # fmt: skip
        seconds = _seconds(policy, options, graph)
    if options.provider == "cpu":  # it computes FP16 in FP32, too
        return graph, steps, passes, [*notes, "the CPU provider computes nothing in BF16: FP32 is as fast there"]
    other = policy.with_low("fp16")
    half = _seconds(other, options, run(capture.graph, passes_for(other, options, capture))[0])["plan"]
    if seconds["plan"] > FASTER * half:
        notes.append(
            f"BF16 is a poor choice for {device}: FP16 would be {seconds['plan'] / half:.2g} times as fast (estimated)"
        )
    return graph, steps, passes, notes


def _device(policy: Policy, options: Options) -> str:
    """The row that a plan is priced for."""
    return ROWS.get(options.provider, "cuda-onnx") if policy.device == "auto" else policy.device


def _seconds(policy: Policy, options: Options, graph: PrecisionGraph) -> dict[str, float]:
    from mpcompile.report.costs import Estimate

    return Estimate(graph, policy, _device(policy, options), "onnx").to_dict()


def _call_by_name(graph: PrecisionGraph) -> None:
    """What the model has in half precision already runs in that, whatever the policy."""
    for node in graph:
        if node.out_dtype in LOW and node.kind != "cast" and not node.is_cast:
            node.precision = node.out_dtype  # type: ignore[assignment]
            node.decide("propagate", node.reason, node.decided_by)


def passes_for(policy: Policy, options: Options, capture: frontend.OnnxCapture,
               ranges: dict[str, Measured] | None = None, on: str = "", bind: bool = True) -> list[Pass]:  # fmt: skip
    """The default passes, with the schemas' types and the measured ranges held once the verdicts are given."""
    passes = default_passes(policy, _device(policy, options), "onnx", keep_fp32=options.keep_fp32,
                            force_low=options.low, strict=options.strict, fused=False)  # fmt: skip
    if policy.low not in LOW:
        return passes
    passes = [replace(one, bind=bind) if isinstance(one, Assign) else one for one in passes]
    after = next(i for i, one in enumerate(passes) if one.name == "classify") + 1
    measured: list[Pass] = [MeasuredHazards(policy.low, ranges, on, HEADROOM if on else 1.0)] if ranges else []
    return [*passes[:after], Legalize(policy.low, capture.signatures), *measured, *passes[after:]]


def _several(overrides: Any) -> tuple[Any, ...]:
    return (overrides,) if isinstance(overrides, str) or callable(overrides) else tuple(overrides)


__all__ = ["OnnxMixedPrecision", "Options", "convert"]
