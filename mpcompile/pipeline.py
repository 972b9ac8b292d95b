"""Run passes over a copy of a graph, and put the default ones together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mpcompile import laws
from mpcompile.garbage import no_garbage_collection
from mpcompile.graph import PrecisionGraph
from mpcompile.passes.base import Pass, PassResult
from mpcompile.policy import Policy
from mpcompile.text import print_graph

# The laws that hold after a pass; after any other pass the graph is only well formed.
STAGE_AFTER = {"assign": "assigned", "insert-casts": "cast", "simplify-casts": "simplified", "verify": "simplified"}


@dataclass(frozen=True)
class StepRecord:
    """What one pass did: its name, seconds, whether the graph changed, its notes, and the text after it if asked."""

    name: str
    seconds: float
    modified: bool
    notes: tuple[str, ...] = ()
    text: str = ""


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
            record = StepRecord(one.name, time.perf_counter() - start, result.modified, result.notes)
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
        return StepRecord(record.name, record.seconds, record.modified, record.notes,
                          print_graph(graph, title=title, **options))  # fmt: skip

    return observe


def verify_each(graph: PrecisionGraph, record: StepRecord) -> None:
    """An observer that checks, after each pass, the laws that hold from there on."""
    laws.verify(graph, stage=STAGE_AFTER.get(record.name, "structure"))


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

    def apply(self, graph: PrecisionGraph) -> PassResult:
        laws.verify(graph, output={"fp32": "fp32", "low": self.low}.get(self.output, "keep"))
        return PassResult(False)


def default_passes(
    policy: Policy,
    device: str = "cpu",
    source: str = "aten",
    *,
    keep_fp32: Any = (),
    force_low: Any = (),
    force_fp8: Any = (),
    strict: bool = False,
    fused: bool = True,
    partial: bool = False,
    verify: bool = True,
) -> list[Pass]:
    """The pipeline of a policy whose `low` is settled ("fp16", "bf16" or "fp32").

    Args:
      device: name of a row of devices.toml.
      source: whose operation names the graph uses: "aten" or "onnx".
      keep_fp32, force_low, force_fp8: the caller's overrides (see `mpcompile.passes.classify`).
      strict: an operation without a rule is an error.
      partial: the graph is one of several of the model, so an override may match in another.
      fused: the graph will be compiled, so casts inside a fused region are free.
      verify: end with the verifier.
    """
    from mpcompile.passes.classify import Classify, refuse_both
    from mpcompile.passes.insert_casts import InsertCasts
    from mpcompile.passes.normalize import Normalize

    refuse_both(keep_fp32, force_low)
    refuse_both(keep_fp32, force_fp8, "fp8")
    low = policy.low
    classify = Classify(low, source, policy.plan, tuple(keep_fp32), tuple(force_low), strict, partial, tuple(force_fp8))
    if low == "fp32":
        from mpcompile.passes.all_fp32 import AllFp32

        return [Normalize(), classify, AllFp32()]
    from mpcompile.passes.assign import Assign
    from mpcompile.passes.hazards import Hazards
    from mpcompile.passes.origins import Origins
    from mpcompile.passes.simplify_casts import SimplifyCasts
    from mpcompile.passes.strict import Strict

    recipe = policy.fp8 if low == "bf16" and (policy.products == "fp8" or force_fp8) else ""
    assign = Assign(
        low, device, policy.plan, fused, policy.output, source, fp8=recipe, fp8_asked=policy.products != "fp8"
    )
    # torch.autocast knows neither hazards nor origins, and plan="autocast" promises its decisions.
    hazards: list[Pass] = [] if policy.plan == "autocast" else [Hazards(low), Origins(low, policy.output)]
    if policy.plan == "strict":
        hazards.append(Strict(low, source))
    passes: list[Pass] = [Normalize(), classify, *hazards, assign, InsertCasts(low, policy.output), SimplifyCasts()]
    return [*passes, Verify(low, policy.output)] if verify else passes
