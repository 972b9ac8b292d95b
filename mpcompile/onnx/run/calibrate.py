"""Run an ONNX model on sample inputs: the ranges of all its values, and how far a converted model's results are off."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from mpcompile.errors import MPCompileError, OnnxError
from mpcompile.formats import ITEMSIZE, ROUNDS_TO_ZERO
from mpcompile.onnx.capture import OnnxCapture
from mpcompile.onnx.run import session as ort
from mpcompile.onnx.run.calibrate_bodies import record_bodies
from mpcompile.onnx.run.generate import Bounds
from mpcompile.passes.measured_hazards import Measured

Feeds = Mapping[str, Any]
# Bytes of intermediate values that one run may return.
SLICE = 512 << 20


@dataclass(frozen=True)
class OutputError:
    """How far one output is off: the largest difference, absolute and relative to the largest element."""

    name: str
    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"{self.name}: off by {self.absolute:.3g}, {self.relative:.3g} of its largest element"


def samples(given: Any) -> list[Feeds]:
    """Sample inputs from an ``.npz`` path, a mapping, an iterable of either, or a function that returns one of these.

    Raises:
      OnnxError: MP606.
    """
    if callable(given):
        given = given()
    if isinstance(given, Mapping):
        return [dict(given)]
    if isinstance(given, (str, os.PathLike)):
        try:
            with np.load(given) as data:
                return [{name: data[name] for name in data.files}]
        except (OSError, ValueError) as error:
            raise OnnxError("MP606", "the samples cannot be read", where=os.fspath(given), why=str(error)) from error
    if not isinstance(given, Iterable):
        raise OnnxError("MP606", f"a {type(given).__name__} gives no samples", try_="a dict of arrays, or 'data.npz'")
    found = [feeds for one in given for feeds in samples(one)]
    if not found:
        raise OnnxError("MP606", "there are no samples")
    return found


def record(capture: OnnxCapture, feeds: Sequence[Feeds], low: str, slice_bytes: int = SLICE,
           bounds: Bounds | None = None) -> dict[str, Measured]:  # fmt: skip
    """Ranges of all FP32 values: inputs, those of the main graph and those of the bodies in it, over all samples.

    The main graph's values are fetched in slices of about `slice_bytes`, each in a run of its own.
    """
    seen = record_bodies(capture, feeds, low, bounds)
    inputs = {capture.own(name): name for name in capture.graph.inputs
              if capture.graph.values[name].dtype == "fp32"}  # fmt: skip
    given = [{inputs[key]: np.asarray(array) for key, array in one.items() if key in inputs} for one in feeds]
    try:
        for found in chain(
            given, *(values(capture, names, feeds, bounds=bounds) for names in _slices(capture, slice_bytes))
        ):
            for name, array in found.items():
                measured = measure(array, low)
                if measured is not None:
                    seen[name] = seen[name].join(measured) if name in seen else measured
    except Exception:  # ONNX Runtime has a class for each of its codes, and no base of them
        if bounds is None or not bounds.over or len(seen) <= len(inputs):
            raise
    return seen


def values(capture: OnnxCapture, names: Sequence[str], feeds: Sequence[Feeds],
           model: ir.Model | None = None, bounds: Bounds | None = None) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The values `names` for each sample; `model` is the capture's own unless a rewritten one is given."""
    target = capture.loaded.objects() if model is None else model.clone()
    by_name = {out.name: out for node in target.graph for out in node.outputs}
    onnx_names = {name: capture.own(name) if model is None else name for name in names}
    present = {name: by_name[key] for name, key in onnx_names.items() if key in by_name}
    target.graph.outputs.clear()
    target.graph.outputs.extend(present.values())
    held = ort.session(target, ["CPUExecutionProvider"], bounds.session_options() if bounds else None)
    for one in feeds:
        found = ort.run(held, one, run_options=bounds.options if bounds else None)
        yield dict(zip(present, found.values(), strict=True))


def measure(array: Any, low: str) -> Measured | None:
    """What is to be known of one array; None when it is empty, or has no finite element."""
    if not array.size:
        return None
    least, most = float(array.min()), float(array.max())
    if not (math.isfinite(least) and math.isfinite(most)):
        finite = array[np.isfinite(array)]
        return measure(finite, low) if finite.size else None
    sizes = np.abs(array)
    some = int(np.count_nonzero(sizes))
    zeros = sizes.size - some
    vanishing = int(np.count_nonzero(sizes < ROUNDS_TO_ZERO[low])) - zeros if some else 0
    return Measured(least, most, vanishing / some if some else 0.0)


def _slices(capture: OnnxCapture, limit: int) -> Iterator[list[str]]:
    """Names of the FP32 values that nodes of the main graph make, in groups of about `limit` bytes."""
    group: list[str] = []
    size = 0
    for node in capture.graph:
        for name in node.outputs if not node.scope else ():
            value = capture.graph.values[name]
            if value.dtype != "fp32" or not capture.own(name):
                continue
            bytes_ = value.numel * ITEMSIZE["fp32"]
            if group and size + bytes_ > limit:
                yield group
                group, size = [], 0
            group.append(name)
            size += bytes_
    if group:
        yield group


def reference(source: Any, feeds: Sequence[Feeds], bounds: Bounds | None = None) -> list[dict[str, Any]]:
    """Outputs of the model as it was given, for each sample.

    Raises:
      OnnxError: MP606, for samples that the model itself refuses.
    """
    held = ort.session(source, ["CPUExecutionProvider"], bounds.session_options() if bounds else None)
    try:
        return [ort.run(held, one, run_options=bounds.options if bounds else None) for one in feeds]
    except MPCompileError:
        raise
    except Exception as error:  # ONNX Runtime has a class for each of its codes, and no base of them
        if bounds is not None:
            raise
        why = " ".join(str(error).split())[:400]
        raise OnnxError("MP606", "the model as it was given fails on the samples", why=why) from error


def compare(model: onnx.ModelProto | ir.Model, feeds: Sequence[Feeds], wanted: Sequence[Feeds],
            bounds: Bounds | None = None) -> list[OutputError]:  # fmt: skip
    """How far the outputs of `model` are from `wanted`, worst first; the worst sample of each output counts."""
    held = ort.session(model, ["CPUExecutionProvider"], bounds.session_options() if bounds else None)
    worst: dict[str, OutputError] = {}
    for one, want in zip(feeds, wanted, strict=True):
        for name, got in ort.run(held, one, run_options=bounds.options if bounds else None).items():
            error = difference(name, got, want[name])
            if name not in worst or error.relative > worst[name].relative:
                worst[name] = error
    return sorted(worst.values(), key=lambda error: -error.relative)


def difference(name: str, got: Any, want: Any) -> OutputError:
    """The largest difference of two arrays (or lists of them); infinite where one has a NaN and the other a number."""
    if isinstance(want, list):
        parts = [difference(name, g, w) for g, w in zip(got, want, strict=True)]
        return max(parts, key=lambda part: part.relative, default=OutputError(name, 0.0, 0.0))
    if want is None or np.asarray(want).size == 0 or np.asarray(want).dtype.kind in "USO":
        return OutputError(name, 0.0, 0.0)
    a, b = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0.0, np.abs(a - b))
    absolute = float(np.where(np.isnan(off), np.inf, off).max())
    size = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
    return OutputError(name, absolute, absolute / size if size else absolute)


__all__ = ["Measured", "OutputError", "compare", "difference", "measure", "record", "reference", "samples", "values"]
