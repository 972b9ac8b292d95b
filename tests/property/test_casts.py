"""Inserting, simplifying and erasing casts, on random plans."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import decided_graphs

from mpcompile import laws
from mpcompile.errors import LawError
from mpcompile.formats import CASTABLE, LOW
from mpcompile.graph import PrecisionGraph
from mpcompile.passes.insert_casts import InsertCasts
from mpcompile.passes.normalize import Normalize, erase_casts
from mpcompile.passes.simplify_casts import SimplifyCasts, _Editor, _worth_a_look, cast_bytes
from mpcompile.pipeline import run
from mpcompile.text import print_graph

low_types = st.sampled_from(["fp16", "bf16"])
outputs = st.sampled_from(["fp32", "low", "keep"])


@st.composite
def cast_graphs(draw: st.DrawFn) -> tuple[PrecisionGraph, PrecisionGraph, str, str]:
    """(before, after insert-casts, low, output)."""
    low, output = draw(low_types), draw(outputs)
    before = draw(decided_graphs(low))
    return before, run(before, [InsertCasts(low, output)])[0], low, output


def dtype_of(low: str, output: str) -> str:
    return {"fp32": "fp32", "low": low}.get(output, "keep")


@given(cast_graphs())
def test_inserted_casts_satisfy_the_laws(case: tuple[PrecisionGraph, PrecisionGraph, str, str]) -> None:
    before, after, low, output = case
    laws.verify(after, before, output=dtype_of(low, output))


@given(cast_graphs())
def test_inserting_again_changes_nothing(case: tuple[PrecisionGraph, PrecisionGraph, str, str]) -> None:
    _, after, low, output = case
    again, (record,) = run(after, [InsertCasts(low, output)])
    assert print_graph(again) == print_graph(after)
    assert not record.modified


@given(cast_graphs())
def test_erasing_gives_the_graph_back(case: tuple[PrecisionGraph, PrecisionGraph, str, str]) -> None:
    before, after, _, _ = case
    erase_casts(after)
    assert print_graph(after) == print_graph(before)


@given(cast_graphs())
def test_simplify_keeps_the_laws_and_never_costs_more(case: tuple[PrecisionGraph, PrecisionGraph, str, str]) -> None:
    before, inserted, low, output = case
    after, (record,) = run(inserted, [SimplifyCasts()])
    laws.verify(after, before, output=dtype_of(low, output))
    assert cast_bytes(after) <= cast_bytes(inserted)
    assert record.modified == (print_graph(after) != print_graph(inserted))
    again, (record,) = run(after, [SimplifyCasts()])
    assert print_graph(again) == print_graph(after)
    assert not record.modified


@given(cast_graphs(), st.booleans())
def test_a_graph_not_worth_a_look_has_nothing_to_rewrite(
    case: tuple[PrecisionGraph, PrecisionGraph, str, str], simplified: bool
) -> None:
    graph = case[1]
    if simplified:
        graph, _ = run(graph, [SimplifyCasts()])
    looked = _worth_a_look(graph)
    assert not _Editor(graph).round() or looked


@given(cast_graphs())
def test_seeds_and_integers_stay_as_they_were(case: tuple[PrecisionGraph, PrecisionGraph, str, str]) -> None:
    before, inserted, _, _ = case
    after, _ = run(inserted, [SimplifyCasts()])
    for node in before:
        now = after.nodes[node.id]
        if node.verdict == "fp32" and node.kind != "cast":
            read = {after.values[n].dtype for n in now.inputs}
            assert now.precision == "fp32"
            assert not read & LOW
        if node.verdict == "low":
            assert now.precision == node.precision
    for name, value in before.values.items():
        if value.dtype not in CASTABLE:
            assert after.values[name] == value
            assert not any(cast.inputs[0] == name for cast in after.casts())


@given(cast_graphs(), st.randoms())
def test_a_broken_cast_is_found(case: tuple[PrecisionGraph, PrecisionGraph, str, str], chance: random.Random) -> None:
    before, after, low, output = case
    casts = [c for c in after.casts() if c.outputs[0] not in after.outputs]
    if not casts:
        return
    cast = chance.choice(casts)
    for node in after.nodes.values():
        node.inputs = [cast.inputs[0] if name == cast.outputs[0] else name for name in node.inputs]
    with pytest.raises(LawError, match="MP401"):
        laws.verify(after, before, output=dtype_of(low, output))


@given(decided_graphs())
def test_normalize_is_idempotent(graph: PrecisionGraph) -> None:
    once, _ = run(graph, [Normalize()])
    twice, (record,) = run(once, [Normalize()])
    assert print_graph(twice) == print_graph(once)
    assert not record.modified
