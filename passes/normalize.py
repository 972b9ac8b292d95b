"""Bring a front end's graph into the one form that the other passes expect.

- Casts of ours from an earlier run are erased, so that a second run decides afresh and comes out the same (law 7).
- The user's own casts are recognised: a node that is told a dtype gives that dtype.  A cast to the dtype that its input
  has anyway is no work, but it is a wish (the ``.float()`` of a hand-written norm), so it stays.
- Values that share storage are one alias group, however the front end found them out: what an in-place operation
  returns is what it was given.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from networkx.utils import UnionFind

from mpcompile.formats import ITEMSIZE
from mpcompile.graph import Node, PrecisionGraph
from mpcompile.passes.base import PassResult

# Argument by which an operation is told its dtype.  Value: the operations that have it; empty for all.
DTYPE_ARGUMENTS: dict[str, tuple[str, ...]] = {"dtype": (), "out_dtype": (), "to": ("onnx::Cast",)}


@dataclass(frozen=True)
class Normalize:
    """No options."""

    name: ClassVar[str] = "normalize"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        erased = erase_casts(graph)
        changed = [_told(graph, node) for node in graph.nodes.values()]
        aliased = _close_aliases(graph)
        notes = (f"{erased} casts of an earlier run erased",) if erased else ()
        return PassResult(bool(erased) or any(changed) or aliased, notes)


def erase_casts(graph: PrecisionGraph) -> int:
    """Take out every cast of ours, in place; readers read what was cast. Returns how many there were."""
    root: dict[str, str] = {}
    for cast in graph.casts():
        root[cast.outputs[0]] = root.get(cast.inputs[0], cast.inputs[0])
        del graph.nodes[cast.id], graph.values[cast.outputs[0]]
    if root:
        for node in graph.nodes.values():
            node.inputs = [root.get(name, name) for name in node.inputs]
        graph.outputs = [root.get(name, name) for name in graph.outputs]
    return len(root)


def _told(graph: PrecisionGraph, node: Node) -> bool:
    """Write down the dtype that `node` is told to give, where the front end has not."""
    if not node.attrs or node.out_dtype or node.is_cast or not node.outputs:
        return False
    for argument, ops in DTYPE_ARGUMENTS.items():
        dtype = node.attrs.get(argument)
        if isinstance(dtype, str) and dtype in ITEMSIZE and (not ops or node.op in ops):
            node.out_dtype = dtype
            return True
    return False


def _close_aliases(graph: PrecisionGraph) -> bool:
    """Give every set of values that share storage one name: the smallest of its alias names."""
    sets: UnionFind[str] = UnionFind()
    found = False
    for node in graph.nodes.values():
        if not _in_place(node.op) or not node.inputs or not node.outputs:
            continue
        given, result = graph.values[node.inputs[0]], graph.values[node.outputs[0]]
        found |= not (given.alias and result.alias)
        given.alias = given.alias or result.alias or f"storage:{given.name}"
        result.alias = result.alias or given.alias
        sets.union(given.alias, result.alias)
    if not sets.parents:
        return False
    names = {alias: min(group) for group in sets.to_sets() for alias in group}
    moved = [value for value in graph.values.values() if names.get(value.alias, value.alias) != value.alias]
    for value in moved:
        value.alias = names[value.alias]
    return found or bool(moved)


@cache
def _in_place(op: str) -> bool:
    """True for "aten.add_.Tensor" and the like, which return their first operand."""
    packet = op.rpartition(".")[0] if op.startswith("aten.") else ""
    return packet.endswith("_") and not packet.endswith("__")
