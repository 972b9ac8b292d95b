"""ONNX in, ONNX out: `convert` reads, decides, measures where it is asked to, and checks the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

from mpcompile.errors import OnnxError
from mpcompile.formats import LOW
from mpcompile.garbage import no_garbage_collection
from mpcompile.onnx.converted import OnnxMixedPrecision, worst
from mpcompile.onnx.options import Named, Options, PlanOptions, onnx_policy, options_of
from mpcompile.onnx.plan import plan
from mpcompile.onnx.ranges import OnnxRanges
from mpcompile.onnx.read import reader as frontend
from mpcompile.onnx.run import calibrate as calibrate_room
from mpcompile.onnx.run.generate import NotRun, on_generated
from mpcompile.onnx.tune import sensitivities, smallest
from mpcompile.policy import Policy

# What `auto` aims at when no max_error is given: a few roundings of FP16.
AUTO_ERROR = 1e-2


def convert(
    model: Any,
    policy: str | Policy = "fp16",
    *,
    calibrate: Any = None,
    ranges: Any = True,
    max_error: float | None = None,
    auto: bool = False,
    **given: Unpack[PlanOptions],
) -> OnnxMixedPrecision:
    """Convert an ONNX model to mixed precision.

    Args:
      model: a path, an `onnx.ModelProto` or an `onnx_ir.Model`; it is not changed.
      policy: "fp16" (also for "auto"), "bf16", "fp32", fields as in "low=fp16,output=low", or a `Policy`.
      calibrate: sample inputs: an ``.npz`` path, a mapping of input names to arrays, several of them, or a function
        that returns them. Values that overflow or vanish on them stay FP32, and outputs are compared (`errors`).
      ranges: without samples, run the model on generated inputs of the declared shapes for the ranges of its values (FP16
        alone; seeded, in bounded time, said in the report and in `notes`); False leaves that out. Or ranges that were measured
        before, as an `OnnxRanges` or its file (`mpcompile calibrate`), instead of `calibrate`.
      max_error: largest error of an output on the samples, relative to its largest element; beyond it, an error.
      auto: find a small set of nodes to keep FP32 so that `max_error` (1e-2 when not given) holds; see `kept`.
      given: the other options, as `mpcompile.onnx.options.Options` says them.

    Raises:
      OnnxError: MP601 (not readable), MP602, MP603 (it would not load), MP605 (`max_error`), MP606 (samples), MP611.
      RuleError: MP201 (policy), MP203 (an override that matches nothing), MP207 and MP208 (ranges of another graph, or none).
    """
    if calibrate is None and (auto or max_error is not None):
        raise OnnxError("MP606", "max_error and auto need sample inputs", try_="calibrate='data.npz'")
    resolved, options = onnx_policy(policy), options_of(**given)
    if calibrate is None:
        made = _ranged(resolved, options, model, ranges)
    elif not isinstance(ranges, bool):
        raise OnnxError("MP606", "samples and ranges at once", try_="calibrate= measures ranges itself: no ranges=")
    else:
        made = _calibrated(resolved, options, model, calibrate_room.samples(calibrate), max_error, auto)
    made.check()
    return made


def _ranged(policy: Policy, options: Options, model: Any, ranges: Any) -> OnnxMixedPrecision:
    """Plan without samples: with ranges as they were measured before, or on generated inputs, or with none."""
    if not isinstance(ranges, bool):
        return _as_measured(policy, options, model, OnnxRanges.load(ranges))
    return (_generated if ranges and policy.low == "fp16" else plan)(policy, options, model)


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
        more = replace(options, keep_fp32=(*options.keep_fp32, *([Named(frozenset(kept))] if kept else ())))
        tried = plan(policy, more, capture, ranges)
        tried.errors, tried.kept = calibrate_room.compare(tried._stand_in(), feeds, wanted), list(kept)
        return tried

    kept = smallest(order, lambda names: worst(attempt(names)), limit)
    if kept is None:
        raise OnnxError("MP605", f"no set of FP32 nodes brings the outputs within {limit:.3g}", why=str(made.errors[0]),
                        try_="a larger max_error: what is left is the model's own rounding")  # fmt: skip
    return attempt(kept)


__all__ = ["OnnxMixedPrecision", "Options", "convert"]
