"""Decide on an ONNX model: the passes, held to the price of BF16 on the provider."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpcompile.formats import LOW
from mpcompile.garbage import no_garbage_collection
from mpcompile.graph import PrecisionGraph
from mpcompile.onnx.converted import OnnxMixedPrecision
from mpcompile.onnx.norms import unlike
from mpcompile.onnx.options import Named, Options, row_of
from mpcompile.onnx.read import reader as frontend
from mpcompile.passes.base import Pass
from mpcompile.passes.measured_hazards import Measured, MeasuredHazards
from mpcompile.pipeline import StepRecord, run
from mpcompile.policy import Policy
from mpcompile.recipes import onnx_passes

if TYPE_CHECKING:
    pass


# Floating-point operations from which on a plan in BF16 is held to its price, and how much faster FP16 is worth a line.
LARGE_WORK, FASTER = 1e8, 1.3
# How much larger than on generated inputs values may be on real ones.
HEADROOM = 4.0


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
            options, low=(*options.low, Named(frozenset(low))), keep_fp32=(*options.keep_fp32, Named(frozenset(fp32)))
        )
        return plan(policy, more, capture, ranges, on, depth - 1)
    _call_by_name(graph)
    shown = (options.provider or "cpu") if policy.device == "auto" else policy.device
    graph.header.update(source="onnx", policy=str(policy), device=shown)
    made = OnnxMixedPrecision(policy, options, capture, graph, steps, notes, ranges or {}, passes=passes, replan=plan)
    if unknown := sorted({node.op for node in graph if node.decided_by == "unknown"}):
        made.notes.append(f"operators without a rule stay FP32: {', '.join(unknown)}")
    return made


def _priced(
    policy: Policy, options: Options, capture: frontend.OnnxCapture, graph: PrecisionGraph, steps: list[StepRecord],
    passes: list[Pass],
) -> tuple[PrecisionGraph, list[StepRecord], list[Pass], list[str]]:  # fmt: skip
    """A BF16 plan that is not slower than FP32 by prediction, and what is to be said of BF16 on this provider."""
    device, seconds = row_of(policy, options), _seconds(policy, options, graph)
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


def _seconds(policy: Policy, options: Options, graph: PrecisionGraph) -> dict[str, float]:
    from mpcompile.report.costs import Estimate

    return Estimate(graph, policy, row_of(policy, options), "onnx").to_dict()


def _call_by_name(graph: PrecisionGraph) -> None:
    """What the model has in half precision already runs in that, whatever the policy."""
    for node in graph:
        if node.out_dtype in LOW and node.kind != "cast" and not node.is_cast:
            node.precision = node.out_dtype  # type: ignore[assignment]
            node.decide("propagate", node.reason, node.decided_by)


def passes_for(policy: Policy, options: Options, capture: frontend.OnnxCapture,
               ranges: dict[str, Measured] | None = None, on: str = "", bind: bool = True) -> list[Pass]:  # fmt: skip
    """The passes for a capture, with its schemas' types and the measured ranges."""
    measured = MeasuredHazards(policy.low, ranges, on, HEADROOM if on else 1.0) if ranges else None
    return onnx_passes(policy, row_of(policy, options), keep_fp32=options.keep_fp32, force_low=options.low,
                       strict=options.strict, fused=False, bind=bind, signatures=capture.signatures,
                       measured=measured)  # fmt: skip
