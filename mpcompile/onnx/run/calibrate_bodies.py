"""Ranges of the values inside the bodies of If, Loop and Scan, which no output of the model shows.

A copy of the model measures itself: each body gives one more output, with a row (-least, most, share that vanishes) for
each of its values; a row is the largest of all iterations, and minus infinity where a branch was not taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mpcompile.formats import ROUNDS_TO_ZERO
from mpcompile.onnx.capture import OnnxCapture, region_path
from mpcompile.onnx.objects import opset, subgraphs
from mpcompile.onnx.run import session as ort
from mpcompile.onnx.run.generate import Bounds
from mpcompile.passes.measured_hazards import Measured

NEVER = -np.inf
CONTROL = ("If", "Loop", "Scan")


def record_bodies(capture: OnnxCapture, feeds: Sequence[Mapping[str, Any]], low: str,
                  bounds: Bounds | None = None) -> dict[str, Measured]:  # fmt: skip
    """Ranges of the FP32 values of all bodies, over all samples."""
    wanted = {name for node in capture.graph if node.scope for name in node.outputs
              if capture.graph.values[name].dtype == "fp32" and capture.own(name)}  # fmt: skip
    if not wanted:
        return {}
    target = capture.loaded.objects()
    inner = {value: name for value, name in _results(capture, target.graph, "") if name in wanted}
    probe = _BodyProbe(low, opset(target, ""), inner)
    found = [row for node in list(target.graph) for row in probe.control(node)]
    if not found:
        return {}
    target.graph.outputs.clear()
    target.graph.outputs.extend(value for value, _ in found)
    held = ort.session(target, ["CPUExecutionProvider"], bounds.session_options() if bounds else None)
    seen = dict[str, Measured]()
    for one in feeds:
        rows_of = ort.run(held, one, run_options=bounds.options if bounds else None)
        for (_, names), rows in zip(found, rows_of.values(), strict=True):
            for name, measured in _read(names, rows):
                seen[name] = seen[name].join(measured) if name in seen else measured
    return seen


def _read(names: Iterable[str], rows: Any) -> Iterator[tuple[str, Measured]]:
    for name, (least, most, vanishing) in zip(names, rows.tolist(), strict=True):
        if np.isfinite(most):
            yield name, Measured(-least, most, max(vanishing, 0.0))


def _results(capture: OnnxCapture, graph: ir.Graph, scope: str) -> Iterator[tuple[ir.Value, str]]:
    """The results of all nodes in `graph` and in its bodies, with their names in the precision graph."""
    for key, node in zip(capture.regions[scope].ids, graph, strict=True):
        yield from zip(node.outputs, capture.graph.nodes[key].outputs, strict=True)
        for name, body in subgraphs(node):
            yield from _results(capture, body, region_path(scope, key, name))


Rows = tuple[ir.Value, list[str]]


class _BodyProbe:
    """Adds what measures; `names` are those of the values to measure."""

    def __init__(self, low: str, version: int, names: Mapping[ir.Value, str]) -> None:
        self.low, self.version, self.names, self.count = low, version, names, 0

    def control(self, node: ir.Node) -> list[Rows]:
        """Let the bodies of `node` measure; its new results, in the graph that it stands in."""
        found: list[Rows] = []
        bodies = [body for _, body in subgraphs(node)] if node.op_type in CONTROL and not node.domain else []
        for body in bodies:
            rows = self.body(body)
            if rows is None:
                continue
            value, names = rows
            body.outputs.append(value)
            for other in bodies:  # both branches of an If return as much
                if other is not body:
                    other.outputs.append(self.constant(other, np.full((len(names), 3), NEVER, np.float32)))
            node.resize_outputs(len(node.outputs) + 1)
            made = node.outputs[-1]
            made.name, made.type = self.fresh(), ir.TensorType(ir.DataType.FLOAT)
            for name in ("scan_output_axes", "scan_output_directions"):
                if name in node.attributes:
                    node.attributes[name] = ir.AttrInt64s(name, [*node.attributes[name].as_ints(), 0])
            found.append((made if node.op_type == "If" else self.over_iterations(node, made, len(names)), names))
        return found

    def body(self, graph: ir.Graph) -> Rows | None:
        """One value with a row for each value of `graph` and of the bodies in it."""
        parts: list[ir.Value] = []
        names: list[str] = []
        for node in list(graph):
            for value, inner in self.control(node):
                parts.append(value)
                names += inner
            for out in [out for out in node.outputs if out in self.names]:
                parts.append(self.row(graph, out))
                names.append(self.names[out])
        if not parts:
            return None
        value = self.add(graph, "Concat", parts, axis=0)
        value.shape = ir.Shape([len(names), 3])
        return value, names

    def row(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        """(-least, most, share) of the finite elements, as [1, 3]."""
        flat = self.add(graph, "Reshape", [value, self.constant(graph, np.array([-1]))])
        # One more element, so that nothing is ever reduced over nothing.
        flat = self.add(graph, "Concat", [flat, self.constant(graph, np.array([np.nan], np.float32))], axis=0)
        strange = [self.add(graph, op, [flat], dtype=ir.DataType.BOOL) for op in ("IsNaN", "IsInf")]
        bad = self.add(graph, "Or", strange, dtype=ir.DataType.BOOL)
        never, zero, smallest = (self.constant(graph, np.float32(x)) for x in (NEVER, 0, ROUNDS_TO_ZERO[self.low]))
        size = self.add(graph, "Where", [bad, zero, self.add(graph, "Abs", [flat])])
        ends = [
            self.add(graph, "ReduceMax", [self.add(graph, "Where", [bad, never, one])], keepdims=1)
            for one in (self.add(graph, "Neg", [flat]), flat)
        ]
        some = self.add(graph, "Greater", [size, zero], dtype=ir.DataType.BOOL)
        tiny = self.add(graph, "And", [some, self.add(graph, "Less", [size, smallest], dtype=ir.DataType.BOOL)],
                        dtype=ir.DataType.BOOL)  # fmt: skip
        counts = [self.add(graph, "Cast", [one], to=int(ir.DataType.FLOAT)) for one in (tiny, some)]
        lost, all_ = (self.add(graph, "ReduceSum", [one], keepdims=1) for one in counts)
        share = self.add(graph, "Div", [lost, self.add(graph, "Max", [all_, self.constant(graph, np.float32(1))])])
        row = self.add(graph, "Concat", [*ends, share], axis=0)
        return self.add(graph, "Reshape", [row, self.constant(graph, np.array([1, 3]))])

    def over_iterations(self, node: ir.Node, stacked: ir.Value, count: int) -> ir.Value:
        """The largest of [iterations, count, 3]; there may have been none."""
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        never = self.constant(graph, np.full((1, count, 3), NEVER, np.float32))
        stacked = self.add(graph, "Concat", [never, stacked], axis=0)
        if self.version >= 18:
            return self.add(graph, "ReduceMax", [stacked, self.constant(graph, np.array([0]))], keepdims=0)
        return self.add(graph, "ReduceMax", [stacked], keepdims=0, axes=[0])

    def add(self, graph: ir.Graph, op: str, inputs: Sequence[ir.Value], dtype: Any = ir.DataType.FLOAT,
            **attributes: Any) -> ir.Value:  # fmt: skip
        out = ir.Value(name=self.fresh(), type=ir.TensorType(dtype))
        held = [ir.AttrInt64s(k, v) if isinstance(v, list) else ir.AttrInt64(k, v) for k, v in attributes.items()]
        graph.append(ir.Node("", op, inputs, held, outputs=[out], name=out.name))
        return out

    def constant(self, graph: ir.Graph, array: Any) -> ir.Value:
        tensor = ir.tensor(np.asarray(array))
        out = ir.Value(name=self.fresh(), type=ir.TensorType(tensor.dtype), shape=ir.Shape(np.shape(array)))
        graph.append(ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[out], name=out.name))
        return out

    def fresh(self) -> str:
        self.count += 1
        return f"mpcompile.range.{self.count}"


__all__ = ["record_bodies"]
