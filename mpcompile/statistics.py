"""Norms that are written out: a value times, or by, a statistic of itself.

``(x - x.mean()) / x.std()``, ``x * rsqrt((x * x).mean() + eps)``, ``x / x.norm()``, ``e / e.sum()``: the result has size 1
whatever x is, so it may be given low as `layer_norm` gives it, once the arithmetic in front of it was FP32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mpcompile.graph import Node, PrecisionGraph
from mpcompile.rules.hazards import ADDS, BOUNDS, CASTS, REDUCTIONS, SPREADS, THROUGH, base

_REDUCTIONS = REDUCTIONS | SPREADS | {"linalg_norm", "amax", "reducemax", "logsumexp"}
_INVERSES = frozenset({"rsqrt", "reciprocal"})
_KEEPS = THROUGH | BOUNDS | ADDS | {"div", "mul", "sqrt", "pow", "abs", "true_divide", "repeat"}


@dataclass
class Statistics:
    """What each value is a statistic of.

    Fields:
      core: value -> the value that it is a square, an absolute value, a view or a centred form of.
      of: value -> (core of what it is a statistic of, whether it is the inverse of it).
    """

    graph: PrecisionGraph
    core: dict[str, str] = field(default_factory=dict)
    of: dict[str, tuple[str, bool]] = field(default_factory=dict)

    def visit(self, node: Node, names: list[str], results: list[str]) -> None:
        """Note what `results` are, given what `names` are."""
        name, first = base(node.op), names[0]
        if name in _REDUCTIONS:
            self.of.update(dict.fromkeys(results, (self.core.get(first, first), False)))
        elif len(names) == 1 and first in self.of:
            self._keep(node, name, first, results)
        elif self._is_form(node, name, names):
            self.core.update(dict.fromkeys(results, self.core.get(first, first)))

    def _keep(self, node: Node, name: str, first: str, results: list[str]) -> None:
        core, inverse = self.of[first]
        power = node.attrs.get("exponent")
        negative = name == "pow" and isinstance(power, (int, float)) and power < 0
        if name in _INVERSES or negative:
            inverse = not inverse
        elif name not in _KEEPS:
            return
        self.of.update(dict.fromkeys(results, (core, inverse)))

    def _is_form(self, node: Node, name: str, names: list[str]) -> bool:
        """Squares and absolute values of the first operand, views and casts of it, and what is left without its mean."""
        first = names[0]
        if len(names) == 1:
            return name in ("square", "abs") or (name == "pow" and node.attrs.get("exponent") == 2) or name in _SHOWN
        if len(names) != 2:
            return False
        if name == "mul":
            return first == names[1]
        if name in ("sub", "subtract"):
            return self.of.get(names[1]) == (self.core.get(first, first), False)
        return False

    def normalizes(self, node: Node, names: list[str], *, inverse: bool) -> bool:
        """True for `node` = a value times an inverse statistic of itself, or by a statistic."""
        if len(names) != 2:
            return False
        for value, factor in (names, names[::-1]) if inverse else (names,):
            found = self.of.get(factor)
            if found == (self.core.get(value, value), inverse):
                return True
        return False


_SHOWN = (THROUGH | CASTS) - {"select", "slice", "index", "gather", "split", "chunk", "unbind", "narrow"}
