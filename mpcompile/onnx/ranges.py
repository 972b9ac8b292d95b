"""Measured ranges of an ONNX model's values as a file: `mpcompile calibrate model.onnx`, ``mpcompile(..., ranges=FILE)``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpcompile.errors import OnnxError, RuleError
from mpcompile.measured_graph import alike
from mpcompile.onnx.capture import OnnxCapture
from mpcompile.onnx.read import reader
from mpcompile.onnx.run import calibrate
from mpcompile.onnx.run.generate import NotRun, on_generated
from mpcompile.onnx.tensors import flat
from mpcompile.passes.measured_hazards import Measured
from mpcompile.ranges import write_whole

SCHEMA = "mpcompile.onnx-ranges/2"
# How an entry of `operations` begins.
INPUT, WEIGHT, NUMBER, SIZES, AXES = "input", "initializer", "number", "sizes", "axes"
CONSTANTS = (WEIGHT, NUMBER, SIZES, AXES)
# Integers of no more elements than this are compared; those of these operators say which axes, whatever the sizes are.
FEW = 16
WITH_AXES = frozenset(("Squeeze", "Unsqueeze", "CumSum", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd",
                       "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"))  # fmt: skip
# BF16 reaches as far as FP32: what is measured is for FP16.
LOW = "fp16"


@dataclass(frozen=True)
class OnnxRanges:
    """What the FP32 values of a model were on sample inputs.

    Fields:
      values: name of a value in the plan -> smallest, largest, and the share that FP16 rounds to zero.
      operations: what makes each value and what it reads: the ranges of another graph are refused.
      on: the inputs, in words, where they were generated; "" for the user's own samples.
    """

    values: Mapping[str, Measured]
    operations: Mapping[str, str]
    on: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file; it appears whole or not at all."""
        values = {name: [one.least, one.most, one.vanishing] for name, one in self.values.items()}
        data = {"schema": SCHEMA, "on": self.on, "operations": dict(self.operations), "values": values}
        write_whole(path, data)

    @classmethod
    def load(cls, given: Any) -> OnnxRanges:
        """`given` itself, or what its file holds.

        Raises:
          RuleError: MP208.
        """
        if isinstance(given, OnnxRanges):
            return given
        if not isinstance(given, (str, os.PathLike)):
            raise RuleError("MP208", f"a {type(given).__name__} holds no ranges", try_='ranges="ranges.json"')
        try:
            data = json.loads(Path(given).read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"its schema is {data['schema']!r}, not {SCHEMA!r}")
            values = {str(name): Measured(*map(float, one)) for name, one in data["values"].items()}
            return cls(values, {str(name): str(one) for name, one in data["operations"].items()}, str(data["on"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RuleError("MP208", f"{os.fspath(given)} holds no ranges of an ONNX model",
                            why=f"{type(error).__name__}: {error}",
                            try_="mpcompile calibrate MODEL.onnx -o ranges.json") from error  # fmt: skip

    def check(self, capture: OnnxCapture) -> None:
        """Refuse a graph that is not the one that was measured.

        Raises:
          RuleError: MP207, with the first value that is another.
        """
        mine, given = self.operations, operations(capture)
        # What follows from the inputs' sizes is the same where those are.
        sizes = all(mine.get(name) == said for name, said in given.items() if said.startswith(INPUT))
        for name in (*given, *mine):
            if why := _differs(mine.get(name), given.get(name), sizes):
                raise RuleError("MP207", "the ranges were measured on another graph", where=name, why=why,
                                try_="measure them again: mpcompile calibrate MODEL.onnx")  # fmt: skip


def _differs(was: str | None, now: str | None, sizes: bool) -> str:
    """What is otherwise, in words; "" for nothing."""
    if was is None or now is None:
        return "it was not there" if was is None else "it is gone"
    if was == now:
        return ""
    (kind, before), (other, after) = (one.partition(" ")[::2] for one in (was, now))
    if kind == other == INPUT:
        return "" if before.count(",") == after.count(",") else f"its shape is {after} and was {before}"
    if kind == other == NUMBER:
        return "" if alike("", float(before), float(after), sizes) else f"it is {after} and was {before}"
    if kind == other == SIZES and not sizes:
        return ""
    return f"it is {now} and was {was}" if kind in CONSTANTS and other in CONSTANTS else "it is made otherwise"


def operations(capture: OnnxCapture) -> dict[str, str]:
    """Value -> what it is, in words: an input and its shape, an initializer and its shape, or its number if it is but one
    (or a few integers), or a digest of the operation that makes the value, its attributes and what it reads.
    """
    graph = capture.graph
    found = {name: f"{INPUT} {list(graph.values[name].shape)}" for name in graph.inputs if name not in capture.tensors}
    places = {name for node in graph if node.op.rpartition("::")[2] in WITH_AXES for name in node.inputs[1:]}
    found |= {name: _constant(capture, name, name in places) for name in capture.tensors if name in graph.values}
    for node in graph:
        said = repr((node.op, list(node.inputs), node.scope, sorted((k, repr(v)) for k, v in node.attrs.items())))
        digest = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
        found.update(dict.fromkeys(node.outputs, f"{node.op} {digest}"))
    return found


def _constant(capture: OnnxCapture, name: str, axes: bool) -> str:
    value = capture.graph.values[name]
    if value.range is not None and value.numel == 1:
        return f"{NUMBER} {value.range[0]:.9g}"
    if value.dtype in ("int64", "int32") and value.numel <= FEW and len(value.shape) <= 1:
        return f"{AXES if axes else SIZES} {flat(capture.tensors[name]).tolist()}"
    return f"{WEIGHT} {list(value.shape)}"


def measure(model: Any, samples: Any = None, provider: str = "cuda") -> OnnxRanges:
    """Run an ONNX model on samples, or on generated inputs, and note the ranges of its FP32 values.

    Args:
      model: a path, an `onnx.ModelProto` or an `onnx_ir.Model`; it is not changed.
      samples: as `calibrate` of `mpcompile.onnx.convert.convert`.

    Raises:
      OnnxError: MP601; MP606, for samples that the model refuses, or where there are none and it runs on nothing generated.
    """
    capture = reader.read(model, LOW, provider=provider)
    if samples is not None:
        feeds = calibrate.samples(samples)
        calibrate.reference(capture.source, feeds)  # samples that the model refuses are an error of theirs
        return OnnxRanges(calibrate.record(capture, feeds, LOW), operations(capture))
    try:
        said, values = on_generated(capture, lambda feeds, bounds: calibrate.record(capture, feeds, LOW, bounds=bounds))
    except NotRun as why:
        raise OnnxError("MP606", f"there are no samples, and {why}", try_="--samples data.npz") from why
    return OnnxRanges(values, operations(capture), said)


__all__ = ["OnnxRanges", "measure", "operations"]
