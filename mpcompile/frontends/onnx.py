"""Read an ONNX model into the precision graph.

The graph is flat: the nodes of an If, Loop or Scan body stand before their control node and carry the path of the
body in `scope`; what they capture from outside they read by name.  The control node reads its own operands and, in
further slots, what its bodies return; loop states and everything else that crosses its border stay FP32.

The front end decides nothing: it says what there is (types, shapes, ranges of constants, work, where a node comes
from) and hands over the type variables of every operator's schema.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from mpcompile.errors import OnnxError
from mpcompile.frontends import onnx_facts as facts
from mpcompile.frontends.onnx_load import load, quiet
from mpcompile.frontends.onnx_prepare import infer, opset, prepare, subgraphs
from mpcompile.frontends.onnx_schema import dtype_name, op_name, signature
from mpcompile.graph import Node, PrecisionGraph, Role, Value
from mpcompile.passes.legalize import Signature


@dataclass
class OnnxCapture:
    """An ONNX model, and the precision graph that was read from it.

    Fields:
      model: the prepared model, which `mpcompile.frontends.onnx_write.write` copies and rewrites.
      source: the model as it was given: a path, a `ModelProto`, or an `onnx_ir.Model`.
      graph: the precision graph.
      signatures: node id -> type variables of its operator.
      nodes, values: node id -> node of `model`, value name -> value of `model`.
      returned: control node id -> (body, index) of each slot beyond the node's own operands.
      notes: lines for the user.
      protos: node of `model` -> the message that it was read from, where it stands for the node as it is.
      annotated: some value has a quantization annotation.
    """

    model: ir.Model
    source: Any = None
    protos: dict[ir.Node, onnx.NodeProto] = field(default_factory=dict)
    annotated: bool = False
    graph: PrecisionGraph = field(default_factory=PrecisionGraph)
    signatures: dict[str, Signature] = field(default_factory=dict)
    nodes: dict[str, ir.Node] = field(default_factory=dict)
    values: dict[str, ir.Value] = field(default_factory=dict)
    returned: dict[str, list[tuple[ir.Graph, int]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read(model: Any, low: str = "fp32", *, provider: str = "") -> OnnxCapture:
    """Read `model` into a precision graph.

    Args:
      model: a path, a `ModelProto`, or an `onnx_ir.Model`; it is not changed.
      low: the low type, for which the opset may have to be raised.
      provider: whose kernels count ("cuda", "cpu"; see ``onnx_kernels.toml``); "" for the schemas alone.

    Raises:
      OnnxError: MP601.
    """
    loaded = load(model)
    prepared, notes = prepare(loaded, low)

    def walk() -> OnnxCapture:
        capture = OnnxCapture(prepared, model, loaded.protos, loaded.annotated, notes=notes)
        capture.graph.header = {"source": "onnx"}
        _Reader(capture, provider).main()
        return capture

    try:
        return walk()
    except KeyError:  # a value that is read before it is made: other tools leave nodes in any order
        with quiet():
            _sort(prepared)
    try:
        return walk()
    except KeyError as error:
        raise OnnxError("MP601", f"nothing makes the value {error.args[0].name!r}, which a node reads or a body returns",
                        why="the model is not valid ONNX", try_="onnx.checker.check_model(model)") from error  # fmt: skip


def _sort(model: ir.Model) -> None:
    """Put the nodes in order, and infer types again: inference goes once, from first to last."""
    try:
        common.TopologicalSortPass()(model)
    except ValueError as error:
        raise OnnxError("MP601", "the nodes of the model form a cycle", why=str(error)) from error
    infer(model)


class _Reader:
    """One walk over the model; `names` are the unique names of values, `ids` those of nodes."""

    def __init__(self, capture: OnnxCapture, provider: str) -> None:
        self.capture, self.graph, self.provider = capture, capture.graph, provider
        self.names: dict[ir.Value, str] = {}
        self.taken: dict[str, int] = {}
        self.ids: dict[str, int] = {}
        self.types: dict[tuple[str, str], tuple[str, Signature]] = {}
        self.dtypes: dict[int, str] = {}
        # Equal shapes of one model are one object.
        self.shapes: dict[tuple[int, bool], tuple[tuple[int | str, ...], int]] = {}

    def main(self) -> None:
        graph = self.capture.model.graph
        for value in graph.inputs:
            self.value(value, "", "input")
            self.graph.inputs.append(self.names[value])
        self.body(graph, "")
        self.graph.outputs = [self.names[value] for value in graph.outputs]

    def body(self, graph: ir.Graph, scope: str) -> None:
        """The inputs, initializers and nodes of `graph`."""
        for value in graph.inputs:
            if value not in self.names:
                self.value(value, scope, "activation")
        for value in graph.initializers.values():
            if value not in self.names:
                made = self.value(value, scope, "parameter")
                if value.const_value is None or made.numel <= 1:
                    made.role = "constant"
        for node in graph:
            self.node(node, scope)

    def value(self, value: ir.Value, scope: str, role: Role, producer: str = "") -> Value:
        name = value.name or f"{producer}_out"
        count = self.taken.get(name, 0)
        self.taken[name] = count + 1
        while count and f"{name}__{count}" in self.taken:
            count += 1
        if count:
            name = f"{name}__{count}"
            self.taken[name] = 1
        known = (id(value.shape), value.shape is None and value.const_value is None and value.dtype is not None)
        size = self.shapes.get(known)
        if size is None:
            size = self.shapes[known] = facts.shape_of(value)
        shape, numel = size
        made = Value(name, self.dtype(value), shape, numel, producer, role, scope=scope)
        if value.const_value is not None and role != "input":
            made.range = facts.range_of(value.const_value)
        self.names[value] = name
        self.graph.values[name] = made
        self.capture.values[name] = value
        return made

    def dtype(self, value: ir.Value) -> str:
        """`_dtype`, asked once per type (equal types of one model are mostly one object)."""
        key = id(value.type)
        if key not in self.dtypes:
            self.dtypes[key] = _dtype(value)
        return self.dtypes[key]

    def node(self, node: ir.Node, scope: str) -> None:
        key = self.fresh(node)
        plain = not node.attributes
        inner = [] if plain else self.bodies(node, key, scope)
        read, names = node.inputs, self.names
        slots = [slot for slot, value in enumerate(read) if value is not None]
        inputs = [names[value] for value in read if value is not None]
        if inner:
            inputs += [names[value] for value in inner]
            slots += range(len(read), len(read) + len(inner))
        op, types = self.rule(node)
        module, source = facts.origin_of(node)
        made = Node(key, op, inputs, [], slots, {} if plain else facts.attributes(node), module, source,
                    scope=scope, flops=facts.flops_of(node))  # fmt: skip
        made.outputs = [self.value(value, scope, "activation", key).name for value in node.outputs]
        if node.op_type == "Cast" and not node.domain:
            made.out_dtype = _dtype(node.outputs[0])
        self.graph.nodes[key] = made
        self.capture.nodes[key] = node
        self.capture.signatures[key] = types

    def bodies(self, node: ir.Node, key: str, scope: str) -> list[ir.Value]:
        """Read the bodies of a control node; what they return."""
        inner: list[ir.Value] = []
        places: list[tuple[ir.Graph, int]] = []
        for name, body in subgraphs(node):
            self.body(body, f"{scope}/{key}.{name}".lstrip("/"))
            inner += list(body.outputs)
            places += [(body, index) for index in range(len(body.outputs))]
        if places:
            self.capture.returned[key] = places
        return inner

    def rule(self, node: ir.Node) -> tuple[str, Signature]:
        key = (node.domain, node.op_type)
        if key not in self.types:
            types = signature(*key, opset(self.capture.model, node.domain), self.provider)
            self.types[key] = (op_name(*key), types)
        op, types = self.types[key]
        if not node.attributes:
            return op, types
        if node.op_type == "BatchNormalization" and len(node.outputs) > 1:
            types = Signature(why="it updates running statistics, which are FP32")
        reduction = node.attributes.get("reduction")
        if reduction is not None and node.op_type.startswith("Scatter") and reduction.as_string() in ("add", "mul"):
            types = Signature(why="it sums into one element, and runtimes refuse it in half precision")
        return op, types

    def fresh(self, node: ir.Node) -> str:
        """A unique id: the node's own name, or its operator and a number."""
        stem = node.name or node.op_type
        count = self.ids.get(stem, 0)
        self.ids[stem] = count + 1
        if count == 0 and node.name:
            return stem
        while f"{stem}_{count}" in self.ids:
            count += 1
        self.ids[f"{stem}_{count}"] = 1
        return f"{stem}_{count}"


def _dtype(value: ir.Value) -> str:
    """The value's element type; "sequence" or "optional" for containers, "unknown" where inference found nothing."""
    if isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
        return "sequence" if isinstance(value.type, ir.SequenceType) else "optional"
    return dtype_name(value.dtype)


__all__ = ["OnnxCapture", "read"]
