"""A check in words, such as ``loss < 0.01 and finite``: names, numbers, comparisons, and/or/not. Nothing is executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpcompile.errors import UsageError, suggest

_COMPARES: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """A check that was read.

    >>> Condition.parse("loss<0.01 and finite", ["loss", "finite"]).holds({"loss": 0.001, "finite": 1.0})
    True
    """

    text: str
    tree: ast.expr
    names: frozenset[str]

    @classmethod
    def parse(cls, text: str, known: Iterable[str]) -> Condition:
        """Read `text`, whose names are among `known`.

        Raises:
          UsageError: MP812.
        """
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise UsageError("MP812", f"the check {text!r} cannot be read", why=str(error),
                             try_="--check 'loss < 0.01'") from error  # fmt: skip
        names = frozenset(_names(tree, text, list(known)))
        if not names:
            raise UsageError("MP812", f"the check {text!r} measures nothing", try_=f"it may name {', '.join(known)}")
        return cls(text, tree, names)

    def holds(self, measured: Mapping[str, float]) -> bool:
        return bool(_value(self.tree, measured))


def _names(tree: ast.expr, text: str, known: list[str]) -> Iterable[str]:
    for part in ast.walk(tree):
        if isinstance(part, ast.Name):
            if part.id not in known:
                near = suggest(part.id, known)
                raise UsageError("MP812", f"the check {text!r} names {part.id!r}, which is not measured",
                                 try_=f"did you mean {near}?" if near else f"it may name {', '.join(known)}")  # fmt: skip
            yield part.id
        elif not isinstance(part, _ALLOWED) or not isinstance(getattr(part, "value", 0), (int, float)):
            why, remedy = f"{type(part).__name__} is not allowed", "a function: --check FILE.py:FUNCTION"
            raise UsageError("MP812", f"the check {text!r} is more than a comparison", why=why, try_=remedy)


_ALLOWED = (
    ast.Compare,
    ast.BoolOp,
    ast.And,
    ast.Or,
    ast.UnaryOp,
    ast.Not,
    ast.USub,
    ast.Constant,
    ast.Load,
    *_COMPARES,
)


def _value(tree: ast.expr, measured: Mapping[str, float]) -> Any:
    if isinstance(tree, ast.Name):
        return measured[tree.id]
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.UnaryOp):
        inner = _value(tree.operand, measured)
        return not inner if isinstance(tree.op, ast.Not) else -inner
    if isinstance(tree, ast.BoolOp):
        parts = (_value(part, measured) for part in tree.values)
        return all(parts) if isinstance(tree.op, ast.And) else any(parts)
    assert isinstance(tree, ast.Compare)
    sides = [_value(side, measured) for side in (tree.left, *tree.comparators)]
    return all(_COMPARES[type(op)](a, b) for op, a, b in zip(tree.ops, sides[:-1], sides[1:], strict=True))


__all__ = ["Condition"]
