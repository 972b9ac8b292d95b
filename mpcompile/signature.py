"""The types that an operation's schema and the target's kernels allow, as data that front ends hand to the passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Signature:
    """Type variables of one operation.

    Fields:
      inputs: type variable of each operand slot; slots past the end belong to the last one when `variadic`.
      outputs: type variable of each result.
      allowed: type variable -> precisions that it may be.
      why: the reason when a type is refused, e.g. "Range takes no bf16 at opset 18".
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    allowed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    variadic: bool = False
    variadic_out: bool = False
    why: str = ""

    def input(self, slot: int) -> str:
        return _at(self.inputs, slot, self.variadic)

    def output(self, index: int) -> str:
        return _at(self.outputs, index, self.variadic_out)


# Operations of which nothing is known: FP32 on every side.
UNKNOWN = Signature(why="its types are not known")


def _at(row: tuple[str, ...], index: int, variadic: bool) -> str:
    if index < len(row):
        return row[index]
    return row[-1] if row and variadic else ""
