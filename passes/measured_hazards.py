"""Ranges that were measured on sample inputs: what overflows or vanishes in the low type raises its node to fp32.

A value beyond the low type's largest number is infinity in every cast of it, so the node that makes it and the nodes
that read it stay FP32.  The same holds for a value most of whose elements the low type rounds to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from mpcompile.formats import LARGEST, ROUNDS_TO_ZERO
from mpcompile.graph import PrecisionGraph
from mpcompile.passes.base import PassResult

# Share of the non-zero elements that may be rounded to zero.
VANISHING = 0.5


@dataclass(frozen=True)
class Measured:
    """What was seen of one value.

    Fields:
      least, most: smallest and largest finite element.
      vanishing: share of the non-zero elements that the low type rounds to zero.
    """

    least: float
    most: float
    vanishing: float = 0.0

    def join(self, other: Measured) -> Measured:
        return Measured(min(self.least, other.least), max(self.most, other.most), max(self.vanishing, other.vanishing))


@dataclass(frozen=True)
class MeasuredHazards:
    """Fields:
    low: the low type of the policy.
    ranges: value name -> what was measured.
    on: the inputs on which that was, in words; "" for samples of the user's.
    headroom: how many times larger values may be on other inputs.
    gradients: value name -> why its gradient is unfit for the low type.
    """

    low: str
    ranges: Mapping[str, Measured] = field(default_factory=dict)
    on: str = ""
    headroom: float = 1.0
    gradients: Mapping[str, str] = field(default_factory=dict)

    name: ClassVar[str] = "measured-hazards"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        reasons = {name: reason for name, seen in self.ranges.items() if (reason := self._reason(seen))}
        reasons = {**self.gradients, **reasons}
        raised = 0
        for node in graph:
            found = next((name for name in (*node.outputs, *node.inputs) if name in reasons), "")
            if found and graph.values[found].castable:
                raised += node.raise_to_fp32(
                    f"measured{' on generated inputs' if self.on else ''}: {found!r} {reasons[found]}"
                )
        note = f"{raised} nodes raised to fp32 by measured ranges" + (f", on {self.on}" if self.on else "")
        return PassResult(bool(raised), (note,) if raised or self.on else ())

    def _reason(self, seen: Measured) -> str:
        size, limit = max(abs(seen.least), abs(seen.most)), LARGEST[self.low]
        if size > limit:
            return f"reaches {size:.4g}, beyond {self.low}'s largest number, {limit:.6g}"
        if size * self.headroom > limit:
            return f"reaches {size:.4g}, near {self.low}'s largest number, {limit:.6g}"
        if seen.vanishing > VANISHING:
            return f"has {seen.vanishing:.0%} of its elements below {ROUNDS_TO_ZERO[self.low]:.2g}, zero in {self.low}"
        return ""
