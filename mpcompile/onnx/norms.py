"""Layer norms in elementary operations, which ONNX Runtime fuses: they must have the types that its fusion takes.

The fusion looks through a cast in front of the norm and makes one `LayerNormalization` of what it found, whose input,
weight and bias have one type: so weight and bias are applied in the type in which the norm's input is stored, and
what stands between (mean, square, root, division) is FP32.  Any other mixture gives a model that does not load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpcompile.formats import LOW
from mpcompile.graph import Node, PrecisionGraph


def unlike(graph: PrecisionGraph) -> tuple[set[str], set[str]]:
    """Nodes of norms that must be low, and nodes that must be FP32, and in this plan are not."""
    low, fp32 = set[str](), set[str]()
    readers = {name: [reader for reader, _ in uses] for name, uses in graph.uses().items()}
    for node in [node for node in graph if node.op == "onnx::Div"]:
        core = _core(graph, node)
        if not core:
            continue
        fp32 |= {one.id for one in core if one.precision in LOW}
        stored = graph.values[_stored(graph, core[1].inputs[0])].dtype
        for one in _tail(graph, node, readers):
            if one.precision != stored and {one.precision, stored} <= {"fp32", *LOW}:
                (low if stored in LOW else fp32).add(one.id)
    return low, fp32


def _core(graph: PrecisionGraph, division: Node) -> list[Node]:
    """The division, the subtraction, square, mean, sum and root of (x - mean) / sqrt(mean((x - mean)²) + eps)."""
    if len(division.inputs) != 2:
        return []
    centred = _maker(graph, division.inputs[0], "Sub")
    root = _maker(graph, division.inputs[1], "Sqrt")
    added = root and _maker(graph, root.inputs[0], "Add")
    spread = added and next((m for name in added.inputs if (m := _maker(graph, name, "ReduceMean"))), None)
    square = spread and (_maker(graph, spread.inputs[0], "Pow") or _maker(graph, spread.inputs[0], "Mul"))
    if not (centred and root and added and spread and square):
        return []
    mean = _maker(graph, centred.inputs[1], "ReduceMean")
    return [division, centred, root, added, spread, square, *([mean] if mean else [])]


def _stored(graph: PrecisionGraph, name: str) -> str:
    """What a cast, or casts, show."""
    while (maker := graph.producer(name)) is not None and _is_cast(maker):
        name = maker.inputs[0]
    return name


def _maker(graph: PrecisionGraph, name: str, op: str) -> Node | None:
    maker = graph.producer(_stored(graph, name))
    return maker if maker is not None and maker.op == f"onnx::{op}" else None


def _tail(graph: PrecisionGraph, node: Node, readers: dict[str, list[str]]) -> Iterator[Node]:
    """The product with the weight and the sum with the bias, when the result goes there alone."""
    for op in ("onnx::Mul", "onnx::Add"):
        after = _after(graph, node.outputs[0], readers)
        if len(after) != 1 or after[0].op != op:
            return
        node = after[0]
        yield node


def _after(graph: PrecisionGraph, name: str, readers: dict[str, list[str]]) -> Sequence[Node]:
    """Who reads a value, itself or by a cast."""
    found: list[Node] = []
    for reader in (graph.nodes[key] for key in readers.get(name, ())):
        found += _after(graph, reader.outputs[0], readers) if _is_cast(reader) else [reader]
    return found


def _is_cast(node: Node) -> bool:
    return node.is_cast or node.op == "onnx::Cast"


__all__ = ["unlike"]
