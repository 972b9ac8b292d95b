"""Origins: what rounding each value would lose, and FP32 for all that would lose it (law 10).

`mpcompile.origins` finds the origins.  This pass writes them down and raises to fp32 what reads or gives a full value and
does not round it in every mixed-precision scheme anyway.  A view, a copy or a lookup of a full value whose readers all
round it stays free: `assign` ties it to them.  Rows are looked up in the FP32 master, so that the gradients of a row that
is looked up often add up in FP32; the cast goes on the rows.

It never lowers a verdict, and leaves alone what the caller decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpcompile.behaviours import MOVERS, rounds
from mpcompile.formats import CASTABLE, LOW
from mpcompile.graph import Node, PrecisionGraph
from mpcompile.origins import Flow
from mpcompile.passes.base import PassResult


@dataclass(frozen=True)
class Origins:
    """Fields:
    low: the low type of the policy.
    output: dtype of floating outputs: "fp32", "low" or "keep".
    """

    low: str
    output: str = "fp32"

    name: ClassVar[str] = "origins"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        flow = Flow(graph, self.low).solve()
        before = {name: value.origin for name, value in graph.values.items()}
        for name, value in graph.values.items():
            value.origin = flow.origin.get(name, "")
        raised = _Ties(flow, self.output).raise_()
        changed = raised > 0 or any(value.origin != before[name] for name, value in graph.values.items())
        return PassResult(changed, (f"{raised} nodes raised to fp32",) if raised else ())


class _Ties:
    """Which nodes must be FP32, and why."""

    def __init__(self, flow: Flow, output: str) -> None:
        self.flow, self.graph = flow, flow.graph
        self.full = {name for name, origin in flow.origin.items() if origin == "full"}
        self.moved = moved_by_rounders(flow, self.full, output)
        # Full value -> (what is full about it, the node that makes it).
        self.causes: dict[str, tuple[str, str]] = {}

    def raise_(self) -> int:
        """Raise what must be raised; how many nodes that were."""
        count = 0
        for name in self.graph.inputs:
            if name in self.full:
                self.causes[name] = f"the graph's {_ROLES[self.graph.values[name].role]}{name}", ""
        for node in self.graph.nodes.values():
            reason = self.reason(node)
            self._note(node)
            if reason:
                node.verdict, node.reason, node.decided_by = "fp32", reason, "hazard"
                count += 1
        return count

    def reason(self, node: Node) -> str:
        """Why `node` must be FP32; "" when it need not, or is what it is for a better reason."""
        if node.verdict == "fp32" or node.is_cast or node.decided_by in ("override", "user-cast"):
            return ""
        how = self.flow.behaviours.of(node)
        if how in ("none", "cast", "round"):
            return ""
        names = self.flow.operands(node)
        read = [name for name in names if name in self.full]
        if how in MOVERS:
            return self._of_mover(node, how, names, read)
        if how == "source" and node.out_dtype:
            return ""
        if read and (
            how in ("norm", "map", "select", "compare", "source") or self._gives_full(node) or node.id in self.flow.wide
        ):
            return self._because(read[0])
        if self._gives_full(node):
            return "FP32, because what weights or rows sum up to, differ by or multiply to has lost no digit yet"
        if how == "compare" or not self.graph.has_float_results(node):
            return (
                "FP32, because weights are compared"
                if any(self.flow.origin[name] in ("weight", "row") for name in names)
                else ""
            )
        return ""

    def _of_mover(self, node: Node, how: str, names: list[str], read: list[str]) -> str:
        if how == "gather" and any(self.flow.origin[name] == "weight" for name in names) and self.flow.by_index(node):
            return (
                "looks rows up in the FP32 master: the gradients of a row add up in FP32, and the cast goes on the rows"
            )
        given = [name for name in node.outputs if name in self.full]
        if given and not self.moved.issuperset(given) and not node.out_dtype:
            return self._because(read[0]) if read else "FP32, because what it moves has all its digits"
        return ""

    def _gives_full(self, node: Node) -> bool:
        """True when a result would be stored low if the node were low, and is full."""
        return any(name in self.full and not node.out_dtype and index not in node.results
                   for index, name in enumerate(node.outputs))  # fmt: skip

    def _because(self, name: str) -> str:
        what, maker = self.causes.get(name, ("a full value", ""))
        through = self.graph.values[name].producer
        return f"FP32, because {what} reaches it{f' through {through}' if through and through != maker else ''}"

    def _note(self, node: Node) -> None:
        """Where the full results of `node` come from."""
        given = [name for name in node.outputs if name in self.full]
        if not given:
            return
        read = next((name for name in self.flow.operands(node) if name in self.full and name in self.causes), None)
        own = node.verdict == "fp32" and self.flow.behaviours.of(node) == "compute"
        cause = self.causes[read] if read is not None and not own else (_made(node), node.id)
        self.causes.update(dict.fromkeys(given, cause))


_ROLES = {
    "input": "input ",
    "buffer": "buffer ",
    "constant": "constant ",
    "parameter": "parameter ",
    "activation": "value ",
}


def _made(node: Node) -> str:
    if node.kind == "cast":
        return f"the program's own cast {node.id}"
    if node.kind in ("factory", "random"):
        return f"the tensor that {node.id} makes"
    return f"the FP32 result of {node.id}" if node.verdict == "fp32" else f"the result of {node.id}"


def moved_by_rounders(flow: Flow, full: set[str], output: str) -> set[str]:
    """The full values that all who read them round, or move to such as round them."""
    found: set[str] = set()
    returned = flow.returned if output != "low" else frozenset()
    for node in reversed(flow.graph.nodes.values()):
        if flow.behaviours.of(node) not in MOVERS:
            continue
        for name in node.outputs:
            if name in full and name not in returned and all(_rounds(flow, r, name, found) for r in flow.readers[name]):
                found.add(name)
    return found


def _rounds(flow: Flow, reader: Node, name: str, moved: set[str]) -> bool:
    how = flow.behaviours.of(reader)
    pinned = reader.operands and any(
        reader.operands.get(slot) == "fp32"
        for slot, read in zip(reader.slots, reader.inputs, strict=True)
        if read == name
    )
    if pinned:
        return False
    if how in MOVERS and reader.verdict != "fp32" and not reader.out_dtype:
        return moved.issuperset(out for out in reader.outputs if flow.graph.values[out].dtype in CASTABLE)
    return rounds(reader, how) or reader.out_dtype in LOW or flow.takes_low(reader, how)
