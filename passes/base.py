"""What a pass is: a frozen dataclass with a kebab-case name, whose fields are its options, and one `apply`.

A pass takes a valid graph and leaves a valid one; in between it may be anything.  It edits the graph it is given
(the pipeline hands it a copy of the caller's) and says honestly whether it changed anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from mpcompile.graph import PrecisionGraph


@dataclass(frozen=True)
class PassResult:
    """`modified` is True exactly when the graph differs from what was given; `notes` are lines for the user."""

    modified: bool
    notes: tuple[str, ...] = ()


class Pass(Protocol):
    """One step of the pipeline.

    Fields:
      ensures: how far the laws hold after it: "structure", "assigned", "cast" or "simplified" (see `mpcompile.laws`).
    """

    name: ClassVar[str]
    ensures: ClassVar[str]

    def apply(self, graph: PrecisionGraph) -> PassResult: ...
