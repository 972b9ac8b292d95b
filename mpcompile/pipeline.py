"""Run passes over a copy of a graph; `mpcompile.recipes` says which ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mpcompile import laws
from mpcompile.garbage import no_garbage_collection
from mpcompile.graph import PrecisionGraph
from mpcompile.passes.base import Pass, PassResult
from mpcompile.text import print_graph


@dataclass(frozen=True)
class StepRecord:
    """What one pass did: its name, seconds, whether the graph changed, its notes, and the text after it if asked.

    `ensures` is how far the laws hold after it.
    """

    name: str
    seconds: float
    modified: bool
    notes: tuple[str, ...] = ()
    text: str = ""
    ensures: str = "structure"


Observer = Callable[[PrecisionGraph, StepRecord], StepRecord | None]


def run(graph: PrecisionGraph, passes: Iterable[Pass],
        observer: Observer | None = None) -> tuple[PrecisionGraph, list[StepRecord]]:  # fmt: skip
    """Run `passes` in order on a copy of `graph`; the caller's graph stays as it is, whatever happens.

    Args:
      observer: called after each pass with the graph and the pass's record; what it returns replaces the record.

    Raises:
      Exception: what a pass or the observer raised, with a note that names the pass and those before it.
    """
    with no_garbage_collection():
        return _run(graph.copy(), passes, observer)


def _run(graph: PrecisionGraph, passes: Iterable[Pass],
         observer: Observer | None) -> tuple[PrecisionGraph, list[StepRecord]]:  # fmt: skip
    records: list[StepRecord] = []
    for one in passes:
        start = time.perf_counter()
        try:
            result = one.apply(graph)
            record = StepRecord(
                one.name, time.perf_counter() - start, result.modified, result.notes, ensures=one.ensures
            )
            records.append((observer(graph, record) if observer else None) or record)
        except Exception as error:
            done = ", ".join(r.name for r in records) or "none"
            error.add_note(
                f"  in pass {one.name} (passes done before it: {done}); the graph it was given is untouched (MP408)"
            )
            raise
    return graph, records


@dataclass(frozen=True)
class History:
    """A graph as it was read, and the passes that decided on it."""

    graph: PrecisionGraph
    passes: Sequence[Pass]

    def replay(self, observer: Observer) -> None:
        """Run the passes again, for the sake of an observer (see `run`)."""
        run(self.graph, self.passes, observer)


def keep_text(names: Sequence[str] = (), **options: Any) -> Observer:
    """An observer that keeps the text after the passes of `names` (all when empty) in their records."""

    def observe(graph: PrecisionGraph, record: StepRecord) -> StepRecord | None:
        if names and record.name not in names:
            return None
        title = f"after {record.name}, {record.seconds * 1e3:.1f} ms"
        return replace(record, text=print_graph(graph, title=title, **options))

    return observe


def verify_each(graph: PrecisionGraph, record: StepRecord) -> None:
    """An observer that checks, after each pass, the laws that hold from there on."""
    laws.verify(graph, stage=record.ensures)


def honest(graph: PrecisionGraph) -> Observer:
    """An observer for a run on `graph` that checks what each pass says of itself: `modified`, against the text.

    Raises:
      AssertionError: a pass changed the graph and said that it did not, or the other way round.
    """
    before = [print_graph(graph)]

    def observe(graph: PrecisionGraph, record: StepRecord) -> None:
        text = print_graph(graph)
        if record.modified != (text != before[0]):
            raise AssertionError(f"pass {record.name} says modified={record.modified}")
        before[0] = text

    return observe


def together(*observers: Observer) -> Observer:
    """One observer that calls `observers` in order, each with the record that the one before left."""

    def observe(graph: PrecisionGraph, record: StepRecord) -> StepRecord:
        for one in observers:
            record = one(graph, record) or record
        return record

    return observe


@dataclass(frozen=True)
class Verify:
    """Check every law once, at the end; `output` as in `Policy`."""

    low: str
    output: str = "keep"

    name: ClassVar[str] = "verify"
    ensures: ClassVar[str] = "simplified"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        laws.verify(graph, output={"fp32": "fp32", "low": self.low}.get(self.output, "keep"))
        return PassResult(False)
