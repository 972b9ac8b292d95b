"""Any ONNX model with half-precision parts as one that every runtime computes: FP32 operators and rounded values.

Each value of a low type becomes an FP32 value that went through the low type and back.  A cast down is such a round
trip, a cast up is nothing; inputs and outputs keep their types.  It is how a model that was not made by `convert` (an
exported one, a training step) is tested where no provider has its kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from mpcompile.formats import LOW
from mpcompile.onnx.objects import graphs
from mpcompile.onnx.tensors import DATA_TYPES, NUMPY_TYPES

LOW_TYPES = {DATA_TYPES[low]: NUMPY_TYPES[low] for low in LOW}
# They move elements and round nothing.
EXACT = {
    "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Concat", "Expand", "Gather",
    "GatherND", "GatherElements", "Tile", "Where", "Relu", "Neg", "Abs", "Max", "Min", "If", "Loop", "Scan", "Pad",
    "MaxPool", "ReduceMax", "ReduceMin", "TopK", "DepthToSpace", "SpaceToDepth", "Compress", "Trilu",
    "SplitToSequence", "SequenceAt", "SequenceConstruct", "SequenceInsert", "ConcatFromSequence",
}  # fmt: skip


def simulate(model: ir.Model) -> ir.Model:
    """A copy of `model`, all of whose types are known, without low arithmetic."""
    twin = model.clone()
    for graph in graphs(twin):
        for value in graph.initializers.values():
            _raise_initializer(value)
        if graph is not twin.graph:
            for value in graph.inputs:
                _raise_type(value)
    outputs = [(value, value.dtype) for value in twin.graph.outputs]
    for graph in list(graphs(twin)):
        for node in list(graph):
            _node(node)
    for value in twin.graph.inputs:
        _raise_input(twin.graph, value)
    for index, (value, dtype) in enumerate(outputs):
        if dtype in LOW_TYPES:
            _lower_output(twin.graph, index, value, dtype)
    return twin


def _node(node: ir.Node) -> None:
    """Compute in FP32; round what was low."""
    if node.op_type == "Constant" and not node.domain:
        attr = node.attributes.get("value")
        if attr is not None and attr.value.dtype in LOW_TYPES:
            node.attributes["value"] = ir.AttrTensor("value", _fp32(attr.value, node.outputs[0].name))
    elif node.op_type == "ConstantOfShape" and "value" in node.attributes:
        held = node.attributes["value"].value
        if held.dtype in LOW_TYPES:
            node.attributes["value"] = ir.AttrTensor("value", _fp32(held, ""))
    _retype(node)
    for out in list(node.outputs):
        dtype = out.dtype
        if dtype not in LOW_TYPES:
            continue
        _raise_type(out)
        if node.op_type not in EXACT and isinstance(out.type, ir.TensorType):
            _round(out, dtype)


def _retype(node: ir.Node) -> None:
    """Attributes that name a low type name FP32."""
    for name in ("to", "dtype", "output_dtype", "stash_type", "softmax_precision"):
        attr = node.attributes.get(name)
        if attr is not None and attr.type == ir.AttributeType.INT and attr.value in [int(t) for t in LOW_TYPES]:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)


def _round(value: ir.Value, dtype: ir.DataType) -> None:
    """Let all readers of `value` read it rounded."""
    maker = value.producer()
    assert maker is not None
    assert maker.graph is not None
    down = _cast(value, dtype, f"{value.name}_down")
    up = _cast(down.outputs[0], ir.DataType.FLOAT, f"{value.name}_rounded")
    value.replace_all_uses_with(up.outputs[0], replace_graph_outputs=True)
    down.replace_input_with(0, value)
    maker.graph.insert_after(maker, [down, up])


def _raise_input(graph: ir.Graph, value: ir.Value) -> None:
    dtype = value.dtype
    if dtype not in LOW_TYPES:
        return
    up = _cast(value, ir.DataType.FLOAT, f"{value.name}_up")
    value.replace_all_uses_with(up.outputs[0])
    up.replace_input_with(0, value)
    first = next(iter(graph), None)
    if first is None:
        graph.append(up)
    else:
        graph.insert_before(first, up)


def _lower_output(graph: ir.Graph, index: int, before: ir.Value, dtype: ir.DataType) -> None:
    """Give output number `index` in its own type and under its own name."""
    value = graph.outputs[index]
    if value.dtype == dtype:
        return
    name = before.name
    before.name = f"{name}_before"
    down = _cast(value, dtype, str(name))
    graph.append(down)
    graph.outputs[index] = down.outputs[0]


def _raise_initializer(value: ir.Value) -> None:
    if value.const_value is not None and value.const_value.dtype in LOW_TYPES:
        value.const_value = _fp32(value.const_value, value.name)
        _raise_type(value)


def _raise_type(value: ir.Value) -> None:
    if value.dtype in LOW_TYPES:
        fp32, is_list = ir.TensorType(ir.DataType.FLOAT), isinstance(value.type, ir.SequenceType)
        value.type = ir.SequenceType(fp32) if is_list else fp32


def _fp32(tensor: Any, name: str | None) -> ir.Tensor[Any]:
    return ir.Tensor(np.asarray(tensor.numpy()).astype(np.float32), name=name)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    out = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[out], name=f"{name}/Cast")
