"""What operations do with the origins of what they read: a column of the rules, looked up for nodes.

Of an operation that `round`s, results are rounded whatever it reads; a `norm` gives values of size 1; a `map` is a curve; a
`select` picks or scales elements; a `place` puts them beside others, a `move` moves them, a `gather` looks them up; `add`,
`multiply`, `divide` and `power` are arithmetic; a `compare` gives no floats; a `source` makes a tensor; a `compute` is all
else, whose FP32 results are full.
"""

from __future__ import annotations

from mpcompile.formats import LOW
from mpcompile.graph import Node
from mpcompile.rules.hazards import base
from mpcompile.rules.table import Rule, Rules, rules_for

# They move elements: where all who read them round what they read, they may move rounded ones.
MOVERS = frozenset({"move", "place", "gather"})


class Behaviours:
    """Operation -> behaviour, and its rule, looked up once per operation."""

    def __init__(self, source: str) -> None:
        self.rules: Rules = rules_for("onnx" if source == "onnx" else "aten")
        self._known: dict[str, str] = {}

    def of(self, node: Node) -> str:
        known = self._known.get(node.op)
        if known is None:
            rule = self.rules.get(node.op)
            known = self._known[node.op] = "move" if node.is_cast else _of_rule(rule) if rule else "compute"
        return "round" if known == "compute" and node.autocast in LOW else known

    def rule(self, node: Node) -> Rule | None:
        return self.rules.get(node.op)


def _of_rule(rule: Rule) -> str:
    """An operation that its author says is low rounds what it reads."""
    return "round" if rule.verdict == "low" and rule.origins == "compute" else rule.origins


def rounds(node: Node, behaviour: str) -> bool:
    """True when `node` rounds what it reads in every mixed-precision scheme, or its caller said that it may."""
    return (behaviour == "round" and node.verdict != "fp32") or is_forced(node)


def is_forced(node: Node) -> bool:
    return node.verdict == "low" and node.decided_by == "override"


def subtracts(node: Node) -> bool:
    factor = node.attrs.get("alpha", 1)
    negative = isinstance(factor, (int, float)) and factor < 0
    return (base(node.op) in ("sub", "rsub", "subtract", "lerp")) != negative
