"""An ONNX plan's values beside FP32's: node by node, on samples, in true low-precision numerics (simulated).

Values are fetched in slices of a bounded size.  What a node does wrong by itself is found by running it alone, with the
casts that stand before it, on the FP32 run's values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.convenience import extract

from mpcompile.formats import ITEMSIZE, LOW
from mpcompile.graph import Node
from mpcompile.onnx.run import session as ort
from mpcompile.onnx.run.calibrate import SLICE, Feeds, values
from mpcompile.report.comparison import Comparison, ErrorRow
from mpcompile.training.numerics.measure import Lanes, row

if TYPE_CHECKING:
    from mpcompile.onnx.convert import OnnxMixedPrecision


def compare(made: OnnxMixedPrecision, feeds: Sequence[Feeds], notes: Sequence[str] = ()) -> Comparison:
    """Every FP32 value of the main graph, over all samples (the worst of each counts)."""
    low = made.policy.low
    one = _Compared(made)
    rows: dict[str, ErrorRow] = {}
    for nodes in one.slices():
        for found in one.rows(nodes, feeds):
            rows[found.id] = rows[found.id].joined(found) if found.id in rows else found
    if low not in LOW:
        notes = [*notes, "the policy is FP32: there is nothing to compare"]
    return Comparison(str(made.policy), low, made.graph.header.get("device", ""), "", (), 1.0, tuple(rows.values()),
                      batches=len(feeds), notes=tuple(notes), source="onnx")  # fmt: skip


class _Compared:
    """The plan's simulation, and where each value is in it."""

    def __init__(self, made: OnnxMixedPrecision) -> None:
        self.made, self.capture = made, made.capture
        self.simulated = made.written(True).ir()
        self.by_name = {out.name: out for node in self.simulated.graph for out in node.outputs}
        given = [*self.simulated.graph.inputs, *self.simulated.graph.initializers.values()]
        names = {self.capture.own(name): name for name in self.capture.graph.values}
        # Name in the model of a value that some node makes -> its name in the precision graph.
        self.named = {own: name for own, name in names.items() if own not in {value.name for value in given}}

    def slices(self, limit: int = SLICE) -> Iterator[list[Node]]:
        """Nodes of the main graph that make FP32 values, in groups that read and make about `limit` bytes."""
        group, size = list[Node](), 0
        for node in self.capture.graph:
            if node.scope or not any(self._is_full(name) for name in node.outputs):
                continue
            more = sum(self.capture.graph.values[n].numel for n in (*node.inputs, *node.outputs)) * ITEMSIZE["fp32"]
            if group and size + more > limit:
                yield group
                group, size = [], 0
            group.append(node)
            size += more
        if group:
            yield group

    def rows(self, nodes: Sequence[Node], feeds: Sequence[Feeds]) -> Iterator[ErrorRow]:
        made = [name for node in nodes for name in node.outputs if self._is_full(name)]
        carriers = {name: key for name in made if (key := self._carrier(name))}
        cut = {name: self._alone(node, carriers) for node in nodes for name in node.outputs[:1]}
        read = {str(value.name) for model in cut.values() if model for value in model.graph.inputs}
        wanted = list(dict.fromkeys([*made, *(self.named[own] for own in sorted(read & self.named.keys()))]))
        full = values(self.capture, wanted, feeds)
        plan = values(self.capture, list(carriers.values()), feeds, self.simulated)
        for given, have, got in zip(feeds, full, plan, strict=True):
            known = {**{self.capture.own(k): v for k, v in have.items()}, **given}
            for node in nodes:
                yield from self._node_rows(node, carriers, have, got, _run(cut.get(node.outputs[0]), known))

    def _node_rows(self, node: Node, carriers: Mapping[str, str], full: Mapping[str, Any], plan: Mapping[str, Any],
                   fed: Mapping[str, Any]) -> Iterator[ErrorRow]:  # fmt: skip
        for number, name in enumerate(node.outputs):
            key = carriers.get(name, "")
            if key not in plan or name not in full:
                continue
            want, got = _tensor(full[name]), _tensor(plan[key])
            lanes = Lanes(got, want, _tensor(fed[key]) if key in fed else want)
            title = node.id if number == 0 else f"{node.id}:{number + 1}"
            dtype = self.made.graph.values[name].dtype
            yield row(title, node.id, node.op, "forward", node.module, node.source, lanes, self.made.policy.low, dtype)

    def _is_full(self, name: str) -> bool:
        return self.capture.graph.values[name].dtype == "fp32" and bool(self.capture.own(name))

    def _carrier(self, name: str) -> str:
        """What holds the value in the simulation, rounded where the plan holds it low."""
        dtype, own = self.made.graph.values[name].dtype, self.capture.own(name)
        names = [f"{own}_{dtype}_rounded", own] if dtype in LOW else [own]
        return next((key for key in names if key in self.by_name), "")

    def _alone(self, node: Node, carriers: Mapping[str, str]) -> ir.Model | None:
        """The node with the casts around it, whose inputs are values of the FP32 model; None where nothing is rounded."""
        outs = [self.by_name[carriers[name]] for name in node.outputs if name in carriers]
        mine = {self.capture.own(name) for name in node.outputs}
        stops, seen, left = dict[str, ir.Value](), set[int](), list(outs)
        rounds = any(self.made.graph.values[name].dtype in LOW for name in node.outputs)
        while left:
            value = left.pop()
            maker = value.producer()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if maker is None or (value.name in self.named and value.name not in mine):
                stops[str(value.name)] = value
                continue
            rounds = rounds or any(out.dtype in _LOW_TYPES for out in maker.outputs)
            left += [one for one in maker.inputs if one is not None]
        given = [v for v in stops.values() if v.name not in self.simulated.graph.initializers]
        weights = len(given) < len(stops)
        if not outs or not given or any(_has_body(value.producer()) for value in outs) or not (rounds or weights):
            return None
        graph = extract(self.simulated.graph, inputs=given, outputs=outs)
        return ir.Model(graph, ir_version=self.simulated.ir_version)


_LOW_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _has_body(node: ir.Node | None) -> bool:
    return node is not None and any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                                    for a in node.attributes.values())  # fmt: skip


def _run(model: ir.Model | None, known: Mapping[str, Any]) -> dict[str, Any]:
    if model is None:
        return {}
    names = [str(value.name) for value in model.graph.inputs]
    if any(name not in known for name in names):
        return {}
    return ort.run(ort.session(model, ["CPUExecutionProvider"]), {name: known[name] for name in names})


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(array).astype(np.float32)))
