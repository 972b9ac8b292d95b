"""Bring an ONNX model into the form that is read: functions inlined, constants as initializers, every type inferred.

Only what does not change a bit of the model's results happens here, on a copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from mpcompile.frontends.onnx_load import WEIGHT, Loaded, quiet
from mpcompile.frontends.onnx_schema import find_schema, signature
from mpcompile.graph import LOW

# The oldest opset in which (nearly) every operator takes the type.
OPSETS = {"fp16": 20, "bf16": 22}
# Operators that mean something else before this opset, and that the version converter does not translate.
CHANGED = {"Scan": 9}


def prepare(loaded: Loaded, low: str) -> tuple[ir.Model, list[str]]:
    """Prepare ``loaded.model`` in place.

    Returns:
      The model (another object when the opset was raised), and lines for the user.
    """
    notes: list[str] = []
    model, skeleton = loaded.model, loaded.skeleton
    if model.functions:
        common.InlinePass()(model)
        skeleton = None
    found = graphs(model)
    operators = {(n.domain, n.op_type) for graph in found for n in graph}
    if low in LOW:
        model = _raise_opset(model, low, operators, notes)
    same = model is loaded.model and skeleton is not None
    if skeleton is not None and same:
        _take_over(model, _inferred(skeleton))
    else:
        loaded.protos.clear()
        found = graphs(model)
    if not same or ("", "Constant") in operators:
        lifted = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).modified
        if lifted:
            model.ir_version = max(model.ir_version, 4)  # before that, an initializer had to be an input
    if not same:
        infer(model)
    if not same or ("", "CastLike") in operators:
        for node in [n for graph in found for n in graph if n.op_type == "CastLike"]:
            settle_cast_like(node)
    _own_body_outputs(found[1:])
    return model, notes


def graphs(model: ir.Model) -> list[ir.Graph]:
    """The main graph and every graph inside it."""
    found = [model.graph]
    for graph in found:
        found += [body for node in graph for _, body in subgraphs(node)]
    return found


def subgraphs(node: ir.Node) -> list[tuple[str, ir.Graph]]:
    """(attribute name, body) of a control-flow node."""
    found: list[tuple[str, ir.Graph]] = []
    for name, attr in node.attributes.items() if node.attributes else ():
        if attr.type == ir.AttributeType.GRAPH:
            found.append((name, attr.value))
        elif attr.type == ir.AttributeType.GRAPHS:
            found += [(f"{name}.{i}", body) for i, body in enumerate(attr.value)]
    return found


def infer(model: ir.Model) -> None:
    """Fill in types and shapes: ONNX's own inference, then type variables for operators that it does not know."""
    with quiet(), _without_weights(model):
        proto = ir.to_proto(model)
    _take_over(model, _inferred(proto))


def _inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except (RuntimeError, ValueError):  # an operator's inference function that does not like its input
        return proto


def _take_over(model: ir.Model, inferred: onnx.ModelProto) -> None:
    lacking: list[ir.Node] = []
    _merge(model.graph, inferred.graph, {}, lacking)
    for node in lacking:
        _infer_types(node, model)
    if any(out.type is None for node in lacking for out in node.outputs):
        _infer_from_readers(model, lacking)


@contextmanager
def _without_weights(model: ir.Model) -> Iterator[None]:
    """Large initializers become promises of a file, which shape inference never opens."""
    held = [(v, v.const_value) for g in graphs(model) for v in g.initializers.values()
            if v.const_value is not None and v.const_value.nbytes > WEIGHT]  # fmt: skip
    for value, tensor in held:
        shape, name = ir.Shape(tensor.shape.numpy()), value.name or ""
        value.const_value = ir.ExternalTensor("weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
    try:
        yield
    finally:
        for value, tensor in held:
            value.const_value = tensor


Types = dict[bytes, tuple[Any, Any]]


def _merge(graph: ir.Graph, inferred: onnx.GraphProto, seen: Types, lacking: list[ir.Node]) -> None:
    """Take over what was inferred, graph by graph: bodies may use one name for different values."""
    for value, info in zip(graph.inputs, inferred.input, strict=False):
        if value.type is None:
            _typed(value, info.type, seen)
    infos = {info.name: info for info in (*inferred.value_info, *inferred.output)}
    for node, proto in zip(graph, inferred.node, strict=True):
        known = True
        for out in node.outputs:
            info = infos.get(out.name)
            if info is not None:
                _typed(out, info.type, seen)
            known = known and out.type is not None
        if not known:
            lacking.append(node)
        if not proto.attribute:
            continue
        single = onnx.AttributeProto.GRAPH
        for name, body in subgraphs(node):
            stem, _, index = name.partition(".")
            attr = next(attr for attr in proto.attribute if attr.name == stem)
            _merge(body, attr.g if attr.type == single else attr.graphs[int(index)], seen, lacking)


def _typed(value: ir.Value, proto: onnx.TypeProto, seen: Types) -> None:
    """Give `value` the type and shape of a message; equal ones are one object (shapes of messages are frozen)."""
    key = proto.SerializeToString()
    if key not in seen:
        seen[key] = (ir.serde.deserialize_type_proto_for_type(proto), ir.serde.deserialize_type_proto_for_shape(proto))
    value.type, value.shape = seen[key]


def _infer_types(node: ir.Node, model: ir.Model) -> None:
    """Give outputs without a type that of an operand with the same type variable."""
    if not find_schema(node.domain, node.op_type, opset(model, node.domain)):
        return
    types = signature(node.domain, node.op_type, opset(model, node.domain), "")
    known = {types.input(i): v.type for i, v in enumerate(node.inputs) if v is not None and v.type is not None}
    for index, out in enumerate(node.outputs):
        if out.type is None and known.get(types.output(index)) is not None:
            out.type = known[types.output(index)]


def opset(model: ir.Model, domain: str) -> int:
    """The opset version that the model imports of `domain` (1 when it imports none)."""
    imports = model.graph.opset_imports
    return imports.get(domain, imports.get("ai.onnx", 1) if not domain else 1)


def _raise_opset(model: ir.Model, low: str, operators: set[tuple[str, str]], notes: list[str]) -> ir.Model:
    """Raise the opset when operators of the model take `low` only in a newer one."""
    have, want = opset(model, ""), OPSETS[low]
    if have >= want:
        return model
    operators = {(domain, op) for domain, op in operators if domain in ("", "ai.onnx")}
    gained = sorted(op for name, op in operators if _takes(name, op, want, low) and not _takes(name, op, have, low))
    changed = any(op in CHANGED and have < CHANGED[op] for _, op in operators)
    if not gained or changed:
        return model
    from onnxscript import version_converter

    raised = model.clone()
    with quiet():
        try:
            version_converter.convert_version(raised, want, fallback=have < 18)
        except Exception as error:  # the converter raises what it likes; the old opset still works
            notes.append(f"opset {have} is kept, raising it met a {type(error).__name__}: {_list(gained)} stay FP32")
            return model
    if opset(raised, "") != want:
        notes.append(f"opset {have} is kept, the converter does not know all operators: {_list(gained)} stay FP32")
        return model
    least = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", want)])
    raised.ir_version = max(raised.ir_version, least)
    notes.append(f"opset raised from {have} to {want}, in which {_list(gained)} take {low}")
    return raised


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _takes(domain: str, op: str, version: int, low: str) -> bool:
    """True when a result of `op` can be `low`."""
    types = signature(domain, op, version, "")
    return any(low in types.allowed.get(variable, ()) for variable in types.outputs)


def _infer_from_readers(model: ir.Model, lacking: list[ir.Node]) -> None:
    """What a custom operator gives has the type that its readers need: that of their other operands and results."""
    for node in reversed(lacking):
        for out in node.outputs:
            for reader, slot in out.uses():
                out.type = out.type or _needed(reader, slot, model)
    for node in lacking:
        _infer_types(node, model)


def _needed(reader: ir.Node, slot: int, model: ir.Model) -> Any:
    """The type of the operands and results of `reader` that share a type variable with operand `slot`."""
    version = opset(model, reader.domain)
    if not find_schema(reader.domain, reader.op_type, version):
        return None
    types = signature(reader.domain, reader.op_type, version, "")
    variable = types.input(slot)
    peers = [v for i, v in enumerate(reader.inputs) if v is not None and i != slot and types.input(i) == variable]
    peers += [v for i, v in enumerate(reader.outputs) if types.output(i) == variable]
    known = (value.type for value in peers if variable and isinstance(value.type, ir.TensorType))
    return next(known, None)


def settle_cast_like(node: ir.Node) -> None:
    """CastLike takes its type from a value that may change its own: write down the type that it has now."""
    if node.op_type != "CastLike" or node.domain or node.outputs[0].dtype is None:
        return
    attrs = [ir.AttrInt64("to", node.outputs[0].dtype)]
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


def _own_body_outputs(bodies: list[ir.Graph]) -> None:
    """Bodies give what they make: one that returns a value from outside, or an input, returns a copy."""
    for graph in bodies:
        for index, out in enumerate(graph.outputs):
            maker = out.producer()
            if maker is not None and maker.graph is graph:
                continue
            copy = ir.Node("", "Identity", [out], name=None)
            copy.outputs[0].name = f"{out.name}_returned_{index}"
            copy.outputs[0].type, copy.outputs[0].shape = out.type, out.shape
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
