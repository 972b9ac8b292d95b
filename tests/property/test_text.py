"""The text form prints and reads back everything, and prints what is not whole."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import any_graphs, front_end_graphs

from mpcompile.errors import LawError
from mpcompile.graph import PrecisionGraph
from mpcompile.parse import parse_graph
from mpcompile.text import diff, print_graph


@given(any_graphs())
def test_round_trip(graph: PrecisionGraph) -> None:
    text = print_graph(graph, title="after x, 1.0 ms")
    again = parse_graph(text)
    assert again == graph
    assert print_graph(again, title="after x, 1.0 ms") == text


@given(front_end_graphs(), st.randoms())
def test_half_built_graphs_print(graph: PrecisionGraph, chance: random.Random) -> None:
    for name in list(graph.values):
        if chance.random() < 0.3:
            del graph.values[name]
    for key in list(graph.nodes):
        if chance.random() < 0.3:
            graph.nodes[key].slots = []
            graph.nodes[key].attrs = {"it": object()}
    for options in ({}, {"detail": "short"}, {"fold": 1}):
        assert print_graph(graph, **options).startswith("graph")


@given(front_end_graphs())
def test_a_line_cut_short_is_an_error_with_its_place(graph: PrecisionGraph) -> None:
    text = print_graph(graph)
    line = text.index("input") + len("input ")
    with pytest.raises(LawError, match=r"MP412: line 2, column \d+"):
        parse_graph(text[:line])


@given(front_end_graphs())
def test_a_diff_names_what_changed_and_nothing_else(graph: PrecisionGraph) -> None:
    before = print_graph(graph, title="one")
    assert diff(before, print_graph(graph, title="two")) == ""
    node = next(iter(graph.nodes.values()))
    node.reason = "because"
    changed = [
        line for line in diff(before, print_graph(graph)).splitlines() if line.startswith("+") and "because" in line
    ]
    assert len(changed) == 1
