"""What is done to models as `onnx_ir` objects: to walk their graphs, and to settle their types.

Exported models are settled as objects; a model that is converted becomes objects only where a pass of `onnx_ir` is needed.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir

from mpcompile.onnx.read.load import Loaded
from mpcompile.onnx.read.message import bodies, inferred


def graphs(model: ir.Model) -> list[ir.Graph]:
    """The main graph and every graph inside it."""
    found = [model.graph]
    for graph in found:
        found += [body for node in graph for _, body in subgraphs(node)]
    return found


def subgraphs(node: ir.Node) -> list[tuple[str, ir.Graph]]:
    """(attribute name, body) of a control-flow node, named and ordered as `onnx_infer.bodies` does."""
    found: list[tuple[str, ir.Graph]] = []
    for name, attr in node.attributes.items() if node.attributes else ():
        if attr.type == ir.AttributeType.GRAPH:
            found.append((name, attr.value))
        elif attr.type == ir.AttributeType.GRAPHS:
            found += [(f"{name}.{i}", body) for i, body in enumerate(attr.value)]
    return found


def opset(model: ir.Model, domain: str) -> int:
    """The opset version that the model imports of `domain` (1 when it imports none)."""
    imports = model.graph.opset_imports
    return imports.get(domain, imports.get("ai.onnx", 1) if not domain else 1)


def infer(model: ir.Model) -> None:
    """Fill in types and shapes with ONNX's own inference."""
    held = [(value, value.const_value) for value in model.graph.initializers.values()]
    loaded = Loaded(onnx.ModelProto())
    try:
        loaded.take(model)
    finally:
        for value, tensor in held:
            value.const_value = tensor
    _merge(model.graph, inferred(loaded.proto).graph, {})


Types = dict[bytes, tuple[Any, Any]]


def _merge(graph: ir.Graph, proto: onnx.GraphProto, seen: Types) -> None:
    """Take over what was inferred, graph by graph: bodies may use one name for different values."""
    for value, info in zip(graph.inputs, proto.input, strict=False):
        if value.type is None:
            _typed(value, info.type, seen)
    infos = {info.name: info for info in (*proto.value_info, *proto.output)}
    for node, message in zip(graph, proto.node, strict=True):
        for out in node.outputs:
            info = infos.get(str(out.name))
            if info is not None:
                _typed(out, info.type, seen)
        for (_, body), (_, inner) in zip(subgraphs(node), bodies(message), strict=True):
            _merge(body, inner, seen)


def _typed(value: ir.Value, proto: onnx.TypeProto, seen: Types) -> None:
    """Give `value` the type and shape of a message; equal ones are one object (shapes of messages are frozen)."""
    key = proto.SerializeToString()
    if key not in seen:
        seen[key] = (ir.serde.deserialize_type_proto_for_type(proto), ir.serde.deserialize_type_proto_for_shape(proto))
    value.type, value.shape = seen[key]


def resolve_cast_like(node: ir.Node) -> None:
    """CastLike takes its type from a value that may change its own: write down the type that it has now."""
    if node.op_type != "CastLike" or node.domain or node.outputs[0].dtype is None:
        return
    attrs: list[Any] = [ir.AttrInt64("to", node.outputs[0].dtype)]
    attrs += [attr for name, attr in node.attributes.items() if name == "saturate"]
    props = node.metadata_props
    _replace(node, ir.Node("", "Cast", [node.inputs[0]], attrs, name=node.name, metadata_props=props))


def _replace(old: ir.Node, new: ir.Node) -> None:
    graph = old.graph
    assert graph is not None
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


__all__ = ["graphs", "infer", "opset", "resolve_cast_like", "subgraphs"]
