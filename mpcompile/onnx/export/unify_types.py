"""Make every type of an exported ONNX model explicit and legal: PyTorch promotes types silently, ONNX never does.

PyTorch's kernels take a low activation with FP32 norm weights, and a 0-dim tensor does not widen one with dimensions;
ONNX's operators want one type per type variable.  Where operands of one variable differ, the smaller change is cast:
everything goes to the type that the exporter recorded for the result, else to that of the first operand.  Casts of
initializers are folded into the initializers, exactly as the runtime would compute them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from mpcompile.onnx.export.sequences import plain_splits
from mpcompile.onnx.objects import graphs, infer, opset, resolve_cast_like
from mpcompile.onnx.schema import signature
from mpcompile.onnx.tensors import DATA_TYPES, NUMPY_TYPES

FLOATS = set(DATA_TYPES.values())


def unify_types(model: ir.Model, provider: str = "") -> int:
    """Settle the types of `model` in place; the number of casts that had to be added.

    Args:
      provider: whose kernels count beside the schemas: what has none in a low type computes in FP32.
    """
    if model.functions:
        common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    plain_splits(model)
    recorded = _forget_types(model)
    infer(model)
    added = sum(_node(model, node, recorded, provider) for graph in graphs(model) for node in list(graph))
    for graph in graphs(model):
        for node in list(graph):
            resolve_cast_like(node)
    fold_casts(model)
    return added


def _forget_types(model: ir.Model) -> dict[ir.Value, Any]:
    """Types as the exporter recorded them, taken off the values: they are PyTorch's, and ONNX's may differ."""
    found = {out: out.type for graph in graphs(model) for node in graph for out in node.outputs if out.type is not None}
    for value in found:
        if not value.is_graph_output():
            value.type = None
    return found


def _node(model: ir.Model, node: ir.Node, recorded: dict[ir.Value, Any], provider: str) -> int:
    types = signature(node.domain, node.op_type, opset(model, node.domain), provider)
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype in FLOATS:
            groups.setdefault(types.input(index) or f"slot {index}", []).append(index)
    added = 0
    chosen: dict[str, Any] = {}
    for variable, slots in groups.items():
        dtypes = {node.inputs[slot].dtype for slot in slots}  # type: ignore[union-attr]
        chosen[variable] = _target(node, types, variable, slots, dtypes, recorded)
        added += sum(_cast_operand(node, slot, chosen[variable]) for slot in slots)
    for index, out in enumerate(node.outputs):
        variable = types.output(index)
        if variable in chosen and out.dtype != chosen[variable]:
            out.type = ir.TensorType(chosen[variable])
        elif out.type is None:
            out.type = recorded.get(out)
    return added


def _target(node: ir.Node, types: Any, variable: str, slots: list[int], dtypes: set[Any],
            recorded: dict[ir.Value, Any]) -> Any:  # fmt: skip
    """The one type that the operands of `variable` get."""
    allowed = types.allowed.get(variable)
    wanted = next(iter(dtypes)) if len(dtypes) == 1 else None
    if wanted is None:
        outputs = (out for i, out in enumerate(node.outputs) if types.output(i) == variable)
        meant = next((recorded[out].dtype for out in outputs if out in recorded), None)
        wanted = meant if meant in dtypes else node.inputs[slots[0]].dtype  # type: ignore[union-attr]
    name = next(key for key, dtype in DATA_TYPES.items() if dtype == wanted)
    return wanted if allowed is None or not allowed or name in allowed else ir.DataType.FLOAT


def _cast_operand(node: ir.Node, slot: int, dtype: Any) -> int:
    value = node.inputs[slot]
    assert value is not None
    if value.dtype == dtype:
        return 0
    name = f"{value.name}_to_{dtype.name.lower()}_{node.name or node.outputs[0].name}_{slot}"
    out = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[out], name=f"{name}/Cast",
                   metadata_props={"mpcompile.origin": "inserted"})  # fmt: skip
    assert node.graph is not None
    node.graph.insert_before(node, cast)
    node.replace_input_with(slot, out)
    return 1


def fold_casts(model: ir.Model) -> int:
    """Cast initializers now, to nearest even as the runtime would; how many casts that saved."""
    folded = 0
    made: dict[tuple[ir.Value, Any], ir.Value] = {}
    for graph in list(graphs(model)):
        for node in list(graph):
            source = node.inputs[0] if node.op_type == "Cast" and node.inputs else None
            if source is None or source.const_value is None or source.is_graph_input():
                continue
            if source.dtype not in FLOATS or node.outputs[0].dtype not in FLOATS or node.outputs[0].is_graph_output():
                continue
            out = node.outputs[0]
            key = (source, out.dtype)
            if key not in made:
                made[key] = _converted(source, out)
            out.replace_all_uses_with(made[key])
            graph.remove(node, safe=True)
            folded += 1
    for value in {source for source, _ in made}:
        if not value.uses() and not value.is_graph_output() and value.graph is not None:
            value.graph.initializers.pop(str(value.name))
    return folded


def _converted(source: ir.Value, out: ir.Value) -> ir.Value:
    name = next(key for key, dtype in DATA_TYPES.items() if dtype == out.dtype)
    stem = f"{source.name}_{name}"
    with np.errstate(over="ignore"):
        array = np.asarray(source.const_value.numpy()).astype(NUMPY_TYPES[name])  # type: ignore[union-attr]
    graph = source.graph
    assert graph is not None
    while stem in graph.initializers:
        stem += "_"
    made = ir.Value(name=stem, type=out.type, shape=source.shape, const_value=ir.tensor(array, name=stem))
    graph.register_initializer(made)
    return made
