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
from mpcompile.onnx.capture import OnnxCapture
from mpcompile.onnx.read import reader
from mpcompile.onnx.run import calibrate
from mpcompile.onnx.run.generate import NotRun, on_generated
from mpcompile.passes.measured_hazards import Measured
from mpcompile.ranges import write_whole

SCHEMA = "mpcompile.onnx-ranges/1"
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
        for name in (*given, *mine):
            if mine.get(name) != given.get(name):
                why = (
                    "it was not there"
                    if name not in mine
                    else "it is gone"
                    if name not in given
                    else "it is made otherwise"
                )
                raise RuleError("MP207", "the ranges were measured on another graph", where=name, why=why,
                                try_="measure them again: mpcompile calibrate MODEL.onnx")  # fmt: skip


def operations(capture: OnnxCapture) -> dict[str, str]:
    """Value -> a digest of the operation that makes it, its attributes and what it reads; of an initializer its shape."""
    graph = capture.graph
    found = {name: f"initializer {list(graph.values[name].shape)}" for name in capture.tensors if name in graph.values}
    for node in graph:
        said = repr((node.op, list(node.inputs), node.scope, sorted((k, repr(v)) for k, v in node.attrs.items())))
        digest = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
        found.update(dict.fromkeys(node.outputs, f"{node.op} {digest}"))
    return found


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
