"""Bring an ONNX model into the form that is read: functions inlined, constants as initializers, every type inferred.

Only what does not change a bit of the model's results happens here, on a copy of the model.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper
from onnx_ir.passes import common

from mpcompile.errors import OnnxError
from mpcompile.formats import LOW
from mpcompile.onnx import objects
from mpcompile.onnx.read.load import Loaded, quiet
from mpcompile.onnx.read.message import bodies, inferred, opset
from mpcompile.onnx.schema import may_have_bodies, plain_domain, signature

# The oldest opset in which (nearly) every operator takes the type.
OPSETS = {"fp16": 20, "bf16": 22}
# Operators that mean something else before this opset, and that the version converter does not translate.
CHANGED = {"Scan": 9}
# Attributes of a Constant whose value is no tensor.
PLAIN = frozenset({"value_float", "value_floats", "value_int", "value_ints", "value_string", "value_strings"})


def prepare(loaded: Loaded, low: str) -> list[str]:
    """Let `loaded` hold the prepared model.

    Returns:
      Lines for the user.

    Raises:
      OnnxError: MP601.
    """
    notes: list[str] = []
    found, operators = _survey(loaded.proto.graph)
    for graph in found[1:]:
        _check_outputs(graph)
    if _drop_negative(loaded):
        notes.append("declared shapes have negative dimensions, which were read as unknown ones")
        found, operators = _survey(loaded.proto.graph)
    if loaded.proto.functions:
        model = loaded.objects()
        common.InlinePass()(model)
        loaded.take(model)
        found, operators = _survey(loaded.proto.graph)
    if low in LOW and _raise_opset(loaded, low, operators, notes):
        found, operators = _survey(loaded.proto.graph)
    loaded.proto = inferred(loaded.proto)
    if ("", "CastLike") in operators:
        _resolve_cast_like(loaded)
    found = _survey(loaded.proto.graph)[0] if len(found) > 1 else [loaded.proto.graph]
    lifted = 0
    for graph in reversed(found):  # from the inside out: what is kept of a graph are copies of its nodes
        lifted += _lift_constants(graph) if ("", "Constant") in operators else 0
        if graph is not loaded.proto.graph:
            _own_outputs(graph)
    if lifted:  # before version 4, an initializer had to be an input
        loaded.proto.ir_version = max(loaded.proto.ir_version, 4)
    return notes


def unmade(name: str) -> OnnxError:
    """What is said of a model in which `name` is read, but never made."""
    return OnnxError("MP601", f"nothing makes the value {name!r}, which a node reads or a body returns",
                     why="the model is not valid ONNX", try_="onnx.checker.check_model(model)")  # fmt: skip


def _drop_negative(loaded: Loaded) -> bool:
    """Make negative dimensions (some writers' way to say "any") unknown ones, in a copy; whether there were any."""

    def negative(message: onnx.GraphProto) -> list[onnx.TensorShapeProto.Dimension]:
        infos = [info for graph in _survey(message)[0] for info in (*graph.input, *graph.output, *graph.value_info)]
        return [dim for info in infos for dim in info.type.tensor_type.shape.dim if dim.dim_value < 0]

    if not negative(loaded.proto.graph):
        return False
    twin = onnx.ModelProto()
    twin.CopyFrom(loaded.proto)
    for dim in negative(twin.graph):
        dim.Clear()
    loaded.proto = twin
    return True


def _resolve_cast_like(loaded: Loaded) -> None:
    model = loaded.objects()
    for node in [node for graph in objects.graphs(model) for node in graph]:
        objects.resolve_cast_like(node)
    loaded.take(model)


def sort(loaded: Loaded) -> None:
    """Put the nodes in order, and infer types again: inference goes once, from first to last.

    Raises:
      OnnxError: MP601, when they form a cycle.
    """
    model = loaded.objects()
    try:
        with quiet():
            common.TopologicalSortPass()(model)
    except ValueError as error:
        raise OnnxError("MP601", "the nodes of the model form a cycle", why=str(error)) from error
    loaded.take(model)
    loaded.proto = inferred(loaded.proto)


def _survey(main: onnx.GraphProto) -> tuple[list[onnx.GraphProto], set[tuple[str, str]]]:
    """`main` and every graph inside it; (domain, operator) of every node."""
    found, operators = [main], set[tuple[str, str]]()
    for graph in found:
        here = {(node.domain, node.op_type) for node in graph.node}
        if any(may_have_bodies(*one) for one in here - operators) or len(found) > 1:
            found += [body for node in graph.node if node.attribute for _, body in bodies(node)]
        operators |= here
    return found, {(plain_domain(domain), op) for domain, op in operators}


def _lift_constants(graph: onnx.GraphProto) -> int:
    """Make Constant nodes initializers of their graph, those that it returns apart; how many there were."""
    returned = {info.name for info in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        lifts = node.op_type == "Constant" and not plain_domain(node.domain) and node.output[0] not in returned
        tensor = _constant(node) if lifts else None
        if tensor is None:
            kept.append(node)
        else:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
    lifted = len(graph.node) - len(kept)
    if lifted:
        twins = onnx.GraphProto()
        twins.node.extend(kept)
        del graph.node[:]
        graph.node.MergeFrom(twins.node)
    return lifted


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor that a Constant gives; None for a sparse one."""
    if len(node.attribute) != 1 or node.attribute[0].ref_attr_name:
        return None
    attr = node.attribute[0]
    if attr.name == "value":
        tensor: onnx.TensorProto = attr.t
        return tensor
    if attr.name not in PLAIN:
        return None
    value = onnx.helper.get_attribute_value(attr)
    if attr.name.startswith("value_string"):
        texts = value if isinstance(value, list) else [value]
        dims = [len(texts)] if isinstance(value, list) else []
        return onnx.helper.make_tensor("", onnx.TensorProto.STRING, dims, texts)
    return numpy_helper.from_array(np.array(value, np.int64 if "int" in attr.name else np.float32))


def _check_outputs(body: onnx.GraphProto) -> None:
    """A body returns only what is its own."""
    own = {name for node in body.node for name in node.output}
    own |= {one.name for one in (*body.input, *body.initializer)} | {one.values.name for one in body.sparse_initializer}
    for info in body.output:
        if info.name not in own:
            raise unmade(info.name)


def _own_outputs(graph: onnx.GraphProto) -> None:
    """Bodies give what they make: one that returns a value from outside, or an input, returns a copy."""
    made = {name for node in graph.node for name in node.output}
    for index, info in enumerate(graph.output):
        if info.name not in made:
            name = f"{info.name}_returned_{index}"
            graph.node.add(op_type="Identity", input=[info.name], output=[name])
            info.name = name


def _raise_opset(loaded: Loaded, low: str, operators: set[tuple[str, str]], notes: list[str]) -> bool:
    """Raise the opset when operators of the model take `low` only in a newer one; whether that was done."""
    have, want = opset(loaded.proto, ""), OPSETS[low]
    if have >= want:
        return False
    standard = {op for domain, op in operators if not domain}
    gained = sorted(op for op in standard if _takes(op, want, low) and not _takes(op, have, low))
    changed = any(op in CHANGED and have < CHANGED[op] for op in standard)
    if not gained or changed:
        return False
    from onnxscript import version_converter

    raised = loaded.objects()
    with quiet():
        try:
            version_converter.convert_version(raised, want, fallback=have < 18)
        except Exception as error:  # the converter raises what it likes; the old opset still works
            notes.append(f"opset {have} is kept, raising it met a {type(error).__name__}: {_list(gained)} stay FP32")
            return False
    if objects.opset(raised, "") != want:
        notes.append(f"opset {have} is kept, the converter does not know all operators: {_list(gained)} stay FP32")
        return False
    least = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", want)])
    raised.ir_version = max(raised.ir_version, least)
    notes.append(f"opset raised from {have} to {want}, in which {_list(gained)} take {low}")
    loaded.take(raised)
    return True


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _takes(op: str, version: int, low: str) -> bool:
    """True when a result of `op` can be `low`."""
    types = signature("", op, version, "")
    return any(low in types.allowed.get(variable, ()) for variable in types.outputs)
