"""The whole pipeline on random programs: the laws that speak of runs (7, 8, 9) and of every pass."""

from __future__ import annotations

import random

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st
from strategies import front_end_graphs

from mpcompile import laws
from mpcompile.formats import CASTABLE, LOW
from mpcompile.graph import Node, PrecisionGraph
from mpcompile.passes.normalize import erase_casts
from mpcompile.pipeline import honest, run, together, verify_each
from mpcompile.policy import Policy
from mpcompile.recipes import fx_passes
from mpcompile.text import print_graph

policies = st.builds(
    Policy,
    low=st.sampled_from(["fp16", "bf16"]),
    plan=st.sampled_from(["global", "strict"]),
    output=st.sampled_from(["fp32", "low", "keep"]),
)


def rewritten(graph: PrecisionGraph, policy: Policy) -> PrecisionGraph:
    return run(graph, fx_passes(policy), together(verify_each, honest(graph)))[0]


def dtype_of(policy: Policy) -> str:
    return {"fp32": "fp32", "low": policy.low}.get(policy.output, "keep")


@given(front_end_graphs(), policies)
def test_the_laws_hold_after_every_pass(graph: PrecisionGraph, policy: Policy) -> None:
    after = rewritten(graph, policy)
    laws.verify(after, graph, output=dtype_of(policy))


@given(front_end_graphs(), policies)
def test_what_must_be_fp32_is_never_low_and_integers_are_untouched(graph: PrecisionGraph, policy: Policy) -> None:
    after = rewritten(graph, policy)
    for node in after:
        if node.verdict == "fp32":
            assert node.precision in ("fp32", "keep")
            assert not {after.values[name].dtype for name in node.inputs} & LOW or node.precision == "keep"
    for name, value in graph.values.items():
        if value.dtype not in CASTABLE:
            assert after.values[name].dtype == value.dtype


@given(front_end_graphs(), policies)
def test_a_second_run_changes_nothing(graph: PrecisionGraph, policy: Policy) -> None:
    once = rewritten(graph, policy)
    assert print_graph(rewritten(once, policy)) == print_graph(once)


@given(front_end_graphs(), policies)
def test_erasing_the_casts_gives_the_program_back(graph: PrecisionGraph, policy: Policy) -> None:
    after = rewritten(graph, policy)
    erase_casts(after)
    assert after.inputs == graph.inputs
    assert [program(node) for node in after] == [program(node) for node in graph]
    assert after.outputs == graph.outputs


@given(front_end_graphs(), policies, st.randoms(use_true_random=False))
def test_node_order_does_not_matter(graph: PrecisionGraph, policy: Policy, chance: random.Random) -> None:
    shuffled = graph.copy()
    shuffled.rebuild_order(shuffle(graph, chance))
    first, second = rewritten(graph, policy), rewritten(shuffled, policy)
    assert sorted(print_graph(second).splitlines()) == sorted(print_graph(first).splitlines())


@given(front_end_graphs(), st.sampled_from(["fp16", "bf16"]))
def test_a_strict_plan_stores_nothing_below_what_autocast_stores(graph: PrecisionGraph, low: str) -> None:
    """But where the program itself made the storage low, and views whose casts stand on their other side."""
    strict, peer = (rewritten(graph, Policy(low, plan)) for plan in ("strict", "autocast"))  # type: ignore[arg-type]
    for node in strict:
        if node.precision in LOW and not node.is_cast and node.kind != "shape" and node.decided_by != "user-cast":
            assert peer.nodes[node.id].precision in (*LOW, "keep")


@given(front_end_graphs())
def test_the_policy_fp32_changes_no_dtype(graph: PrecisionGraph) -> None:
    after, _ = run(graph, fx_passes(Policy("fp32")))
    assert not after.casts()
    assert {n: v.dtype for n, v in after.values.items()} == {n: v.dtype for n, v in graph.values.items()}


def program(node: Node) -> tuple[object, ...]:
    """What a front end wrote of a node."""
    return node.id, node.op, node.inputs, node.outputs, node.slots, node.attrs, node.module, node.out_dtype


def shuffle(graph: PrecisionGraph, chance: random.Random) -> list[Node]:
    """Another topological order, which keeps the order of nodes that touch one written storage."""
    order = graph.to_networkx()
    last: dict[str, str] = {}
    for node in graph:
        for alias in {graph.values[n].alias for n in (*node.inputs, *node.outputs)} - {""}:
            if alias in last:
                order.add_edge(last[alias], node.id)
            last[alias] = node.id
    rank = {node.id: chance.random() for node in graph}
    return [graph.nodes[key] for key in nx.lexicographical_topological_sort(order, key=rank.__getitem__)]
