"""Static hazards: what the graph itself shows to go wrong in the low type raises verdicts to fp32, with the numbers.

The rows are data (`mpcompile.rules.hazards`).  This pass is one sweep in topological order: at each node, the hazards
that its operands carry, and those that start there.  It never lowers a verdict, and leaves alone what the caller
decided, casts, and nodes that are told their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from mpcompile.graph import Node, PrecisionGraph
from mpcompile.passes.base import PassResult
from mpcompile.rules.hazards import ADDS, BOUNDS, HAZARDS, MASK_SLOT, OUT_OF_RANGE, THROUGH, Facts, Hazard, base, beyond

# Kernels whose cost in FP32 is out of proportion; their masks are handled inside.
NEVER_RAISED = frozenset({"attention", "convolution", "control", "random", "integer"})
NOTHING = frozenset[str]()
PRODUCTS = frozenset({"matmul", "convolution", "attention", "rnn"})
# Their results have a size of their own.
ENDS = PRODUCTS | {"normalization", "softmax", "exponential", "angle", "loss", "comparison", "step"}


class Trail(NamedTuple):
    """A hazard on its way: the nodes that it came through, newest first, and where and why it started."""

    node: str
    reason: str
    numel: int
    before: Trail | None = None


@dataclass(frozen=True)
class Hazards:
    """Fields:
    low: the low type of the policy.
    small: parameters of which no element is larger than `mpcompile.rules.hazards.SMALL`.
    """

    low: str
    small: frozenset[str] = frozenset()

    name: ClassVar[str] = "hazards"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        sweep = _Sweep(Facts(graph, self.low, self.small))
        for node in graph.nodes.values():
            sweep.visit(node)
        changed = [graph.nodes[key].raise_to_fp32(reason) for key, reason in sweep.unfit.items()]
        raised = [(graph.nodes[key], reason) for key, reason in sweep.raised.items()]
        changed += [node.raise_to_fp32(reason) for node, reason in raised if node.kind not in NEVER_RAISED]
        notes = (f"{sum(changed)} nodes raised to fp32",) if any(changed) else ()
        return PassResult(any(changed), notes)


class _Sweep:
    """What is known on the way: the hazards that values carry, and values made of constants and buffers alone."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.values = facts, facts.graph.values
        self.starts: dict[str, list[Hazard]] = {}
        for row in HAZARDS:
            for name in row.at if facts.low in row.low else ():
                self.starts.setdefault(name, []).append(row)
        # Operations that some hazard reaches: at others nothing goes on.
        self.moves = {name for row in HAZARDS if facts.low in row.low for name in row.carries | row.ends}
        self.carried: dict[str, dict[Hazard, Trail]] = {}
        self.fixed = {name for name, value in self.values.items() if value.role in ("constant", "buffer")}
        self.raised: dict[str, str] = {}
        # Nodes that would read infinity, whatever their FP32 costs.
        self.unfit: dict[str, str] = {}
        self.held = {name: reason for name, value in self.values.items() if (reason := beyond(value, facts.low))}
        # Values that no one has computed with yet: a product's operand among them is beyond the low type by itself.
        self.stored = set(self.held)

    def visit(self, node: Node) -> None:
        """Carry and end the hazards that `node` is given; start those that begin here."""
        name = base(node.op)
        if self.held:
            self.read_held(node, name)
        starts = self.starts.get(name, ())
        came: dict[Hazard, Trail] = {}
        for given in reversed(node.inputs) if self.carried and (starts or name in self.moves) else ():
            if given in self.carried:
                came |= self.carried[given]
        fixed = node.kind != "random" and self.fixed.issuperset(node.inputs)
        # Asked last: mostly there is nothing to do.  Integers have no such trouble.
        if not (came or starts or fixed) or not self.facts.graph.has_floats(node):
            return
        for row, trail in came.items():
            ends = name in row.ends
            if (ends or name in row.carries) and self.joins(row, node):
                self.go_on(row, Trail(node.id, trail.reason, trail.numel, trail), node, ends=ends)
        for row in starts:
            if row not in came and (reason := row.starts(self.facts, node)):
                size = sum([self.values[out].numel for out in node.outputs])
                self.go_on(row, Trail(node.id, reason, size), node)
        if fixed:
            self.fixed.update(node.outputs)

    def read_held(self, node: Node, name: str) -> None:
        """Raise what reads a tensor of the model's that the low type cannot hold, and what is computed from it."""
        wide = [key for slot, key in zip(node.slots, node.inputs, strict=True) if self.reads_low(node, slot, key)]
        if not wide or name in BOUNDS or not self.facts.graph.has_floats(node):
            return
        self.unfit.setdefault(node.id, f"{OUT_OF_RANGE.name}: {self.held[wide[0]]}")
        if node.kind in ENDS or name in OUT_OF_RANGE.ends:
            return
        self.held.update(dict.fromkeys(node.outputs, self.held[wide[0]]))
        if name in THROUGH and self.stored.issuperset(wide):
            self.stored.update(node.outputs)

    def reads_low(self, node: Node, slot: int, name: str) -> bool:
        """True where a low `node` would read `name`, a value beyond the low type, as infinity."""
        if name not in self.held or node.operands.get(slot) == "fp32":
            return False
        if node.kind in PRODUCTS:  # what was computed they round, as in every scheme; a mask saturates
            return name in self.stored and (node.kind != "attention" or slot < MASK_SLOT)
        return node.kind not in NEVER_RAISED

    def joins(self, row: Hazard, node: Node) -> bool:
        """False when `row` travels alone and `node` reads numbers that the model computes or learns; sums of rows likewise."""
        if row.rows and base(node.op) in ADDS:
            return all(row in self.carried.get(name, ()) or self.facts.source(name) in self.facts.small
                       for name in node.inputs)  # fmt: skip
        return not row.alone or all(
            row in self.carried.get(name, ()) or name in self.fixed
            for name in node.inputs
            if self.values[name].castable
        )

    def go_on(self, row: Hazard, trail: Trail, node: Node, ends: bool = False) -> None:
        """Raise `node` (and all it came through, where only an end counts), and hand the hazard to its results."""
        step: Trail | None = trail
        while step is not None and (ends or not row.only_if_ended):
            if step.node not in self.raised:
                self.raised[step.node] = f"{row.name}: {trail.reason}"
            step = step.before if row.only_if_ended else None
        for out in node.outputs if not ends else ():
            value = self.values[out]
            lost = (
                not value.castable or node.out_dtype not in ("", "fp32") or (row.shrinks and value.numel > trail.numel)
            )
            if not lost:
                self.carried.setdefault(out, {})[row] = trail
