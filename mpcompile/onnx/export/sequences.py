"""Splits as `Split`: the exporter writes a list of tensors and picks from it, and lists take no BF16."""

from __future__ import annotations

import onnx_ir as ir

from mpcompile.onnx.objects import graphs


def plain_splits(model: ir.Model) -> int:
    """Put `Split` in place of every SplitToSequence whose parts are picked by fixed numbers; how many there were.

    Constants are initializers.  Lists that are used otherwise, and parts of a size that nobody knows, stay.
    """
    return sum(_split(node) for graph in graphs(model) for node in list(graph) if node.op_type == "SplitToSequence")


def _split(node: ir.Node) -> bool:
    picks = [use.node for use in node.outputs[0].uses()]
    places = [_number(pick.inputs[1]) for pick in picks if pick.op_type == "SequenceAt"]
    sizes = _sizes(node)
    if node.outputs[0].is_graph_output() or len(places) < len(picks) or None in places or not sizes:
        return False
    graph, source = node.graph, node.inputs[0]
    assert graph is not None
    assert source is not None
    stem = f"{node.outputs[0].name}_part"
    parts = [ir.Value(name=f"{stem}_{i}", type=source.type) for i in range(len(sizes))]
    axis = ir.AttrInt64("axis", _axis(node))
    table = ir.Value(name=f"{stem}_sizes", const_value=ir.tensor(sizes, dtype=ir.DataType.INT64, name=f"{stem}_sizes"))
    table.type, table.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(sizes)])
    graph.register_initializer(table)
    made = ir.Node("", "Split", [source, table], [axis], outputs=parts, name=node.name)
    made.metadata_props.update(node.metadata_props)
    graph.insert_before(node, made)
    for pick, place in zip(picks, places, strict=True):
        assert place is not None
        assert pick.graph is not None
        part, before = parts[place], pick.outputs[0]
        part.shape = before.shape
        if before.is_graph_output():
            pick.graph.insert_before(pick, copy := ir.Node("", "Identity", [part], name=pick.name))
            copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = before.name, before.type, before.shape
            part = copy.outputs[0]
        before.replace_all_uses_with(part, replace_graph_outputs=True)
        pick.graph.remove(pick, safe=True)
    graph.remove(node, safe=True)
    return True


def _sizes(node: ir.Node) -> list[int]:
    """The length of each part; empty when it is not known."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    table = node.inputs[1] if len(node.inputs) > 1 else None
    if table is None:  # parts of one row each, without their dimension if `keepdims` says so
        return []
    held = table.const_value
    if held is None:
        return []
    if held.shape.rank():
        return [int(size) for size in held.numpy()]
    each, whole = int(held.numpy()), shape[_axis(node)] if shape is not None else None
    if not isinstance(whole, int) or each < 1:
        return []
    return [min(each, whole - start) for start in range(0, whole, each)]


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0


def _number(value: ir.Value | None) -> int | None:
    held = value.const_value if value is not None else None
    return None if held is None else int(held.numpy())


__all__ = ["plain_splits"]
