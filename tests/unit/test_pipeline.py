"""The pipeline runs on a copy, tells its observer, and says where it failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from strategies import decided_graphs

from mpcompile.graph import PrecisionGraph
from mpcompile.parse import parse_graph
from mpcompile.passes.base import PassResult
from mpcompile.passes.insert_casts import InsertCasts
from mpcompile.passes.normalize import Normalize
from mpcompile.pipeline import StepRecord, keep_text, run, together, verify_each
from mpcompile.policy import Policy
from mpcompile.recipes import fx_passes
from mpcompile.text import print_graph


@dataclass(frozen=True)
class Wreck:
    """Damages whatever it is given, and then fails."""

    name: ClassVar[str] = "wreck"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        for node in graph:
            node.inputs.clear()
            node.attrs = {**node.attrs, "broken": True}
            node.operands = {**node.operands, 0: "fp32"}
        for value in graph.values.values():
            value.dtype = "int8"
        graph.outputs.clear()
        graph.header["broken"] = "yes"
        raise RuntimeError("on purpose")


@given(decided_graphs())
def test_a_failing_pass_leaves_the_callers_graph_alone(graph: PrecisionGraph) -> None:
    text = print_graph(graph)
    with pytest.raises(RuntimeError, match="on purpose") as caught:
        run(graph, [Normalize(), Wreck()])
    assert print_graph(graph) == text
    assert caught.value.__notes__ == [
        "  in pass wreck (passes done before it: normalize); the graph it was given is untouched (MP408)"
    ]


@given(decided_graphs())
def test_a_pipeline_that_succeeds_leaves_it_alone_too(graph: PrecisionGraph) -> None:
    text = print_graph(graph)
    run(graph, [Normalize(), InsertCasts("bf16")], verify_each)
    assert print_graph(graph) == text


def test_observers_are_called_in_order_and_may_replace_the_record() -> None:
    graph = parse_graph(
        "graph\ninput x: fp32[2]\ny: fp32[2] = aten.exp.default(x) | fp32 fp32 exponential rule\nreturn y\n"
    )
    seen: list[str] = []

    def note(graph: PrecisionGraph, record: StepRecord) -> None:
        seen.append(record.text.splitlines()[0].partition(",")[0])

    _, records = run(graph, [Normalize(), InsertCasts("bf16")], together(keep_text(), note))
    assert seen == ["# after normalize", "# after insert-casts"]
    assert parse_graph(records[1].text) == graph
    _, records = run(graph, [Normalize(), InsertCasts("bf16")], keep_text(["insert-casts"], detail="short"))
    assert [bool(record.text) for record in records] == [False, True]


def test_an_observer_that_fails_names_the_pass_too() -> None:
    graph = parse_graph(
        "graph\ninput x: fp32[2]\ny: fp32[2] = aten.exp.default(x) | low bf16 exponential rule\nreturn y\n"
    )
    with pytest.raises(Exception, match="MP401") as caught:
        run(graph, [InsertCasts("fp16")], verify_each)
    assert "in pass insert-casts" in caught.value.__notes__[-1]


@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_a_cast_costs_the_same_before_and_after(low: str) -> None:
    """A second run finds the plan's dtypes: priced by them, the cast of a returned view moved over the view."""
    graph = parse_graph("graph source=fx\ninput x: fp32[64]\nn0: fp32[64] = aten.view.default(x)\nreturn n0\n")
    passes = fx_passes(Policy(low, output="low"))
    once, _ = run(graph, passes)
    assert print_graph(run(once, passes)[0]) == print_graph(once)
