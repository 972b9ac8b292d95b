"""What `assign` leaves on the graph: pins, ties, fixed dtypes, reasons; the worked example of its documentation."""

from __future__ import annotations

import pytest

from mpcompile.graph import Node, PrecisionGraph, Value
from mpcompile.passes.assign import Assign

BIG = 1 << 20
HEAVY = 1 << 36


def graph_of(*steps: tuple[str, str, str, tuple[str, ...]], output: str = "") -> PrecisionGraph:
    """Steps are (name, kind, verdict, inputs); "x" is an input, "w" a parameter; a matmul is heavy."""
    graph = PrecisionGraph()
    graph.add_input(Value("x", "fp32", (BIG,), BIG, role="input"))
    graph.add_input(Value("w", "fp32", (BIG,), BIG, role="parameter"))
    for name, kind, verdict, inputs in steps:
        node = Node(name, f"test.{kind}", list(inputs), kind=kind, flops=HEAVY if kind == "matmul" else 0)
        node.verdict, node.reason = verdict, "a rule"  # type: ignore[assignment]
        graph.add(node, [Value(name, "fp32", (BIG,), BIG)])
    graph.outputs = [output or steps[-1][0]]
    return graph


def precisions(graph: PrecisionGraph, **options: object) -> dict[str, str]:
    Assign("bf16", **options).apply(graph)  # type: ignore[arg-type]
    return {node.id: node.precision for node in graph}


def between_two_products() -> PrecisionGraph:
    return graph_of(
        ("a", "matmul", "low", ("x", "w")),
        ("b", "elementwise", "propagate", ("a",)),
        ("c", "matmul", "low", ("b", "w")),
    )


def test_free_nodes_follow_their_neighbours_and_say_what_it_saves() -> None:
    graph = between_two_products()
    assert precisions(graph) == {"a": "bf16", "b": "bf16", "c": "bf16"}
    node = graph.nodes["b"]
    assert node.decided_by == "cost"
    assert "2,097,152 bytes fewer than in FP32" in node.reason


def test_a_free_node_between_fp32_nodes_stays_fp32() -> None:
    graph = graph_of(
        ("a", "elementwise", "fp32", ("x",)),
        ("b", "elementwise", "propagate", ("a",)),
        ("c", "elementwise", "fp32", ("b",)),
    )
    assert precisions(graph)["b"] == "fp32"
    assert graph.nodes["b"].reason == "a rule; FP32, as its neighbours are"


@pytest.mark.parametrize("verdict", ["fp32", "low"])
def test_values_have_the_dtype_that_their_node_gives(verdict: str) -> None:
    graph = graph_of(("a", "matmul", verdict, ("x", "w")))
    precisions(graph, output="keep")
    assert graph.values["a"].dtype == graph.nodes["a"].gives_at(0) == {"fp32": "fp32", "low": "bf16"}[verdict]


def test_a_pinned_result_stays_fp32_on_a_low_node() -> None:
    graph = between_two_products()
    graph.nodes["b"].outputs.append("mean")
    graph.values["mean"] = Value("mean", "fp32", (8,), 8, producer="b")
    graph.nodes["b"].results = {1: "fp32"}
    assert precisions(graph)["b"] == "bf16"
    assert graph.values["b"].dtype == "bf16"
    assert graph.values["mean"].dtype == "fp32"


def test_a_pinned_operand_is_no_reason_to_make_its_source_low() -> None:
    graph = graph_of(
        ("s", "elementwise", "propagate", ("x",)),
        ("a", "matmul", "low", ("x", "w")),
        ("n", "elementwise", "propagate", ("a", "s")),
        ("c", "matmul", "low", ("n", "w")),
    )
    graph.nodes["n"].operands = {1: "fp32"}
    found = precisions(graph)
    assert (found["n"], found["s"]) == ("bf16", "fp32")


def test_groups_agree_and_fp32_wins() -> None:
    graph = between_two_products()
    graph.nodes["a"].group = graph.nodes["b"].group = "loop"
    graph.nodes["b"].verdict = "fp32"
    found = precisions(graph)
    assert (found["a"], found["b"]) == ("fp32", "fp32")
    assert graph.nodes["a"].decided_by == "cost"


def test_integers_keep_their_dtype_and_a_users_cast_its_own() -> None:
    graph = graph_of(("a", "matmul", "low", ("x", "w")), ("up", "cast", "propagate", ("a",)))
    graph.nodes["up"].out_dtype = "fp32"
    graph.add_input(Value("i", "int64", (8,), 8))
    graph.add(Node("j", "test.integer", ["i"], kind="integer", verdict="propagate"), [Value("j", "int64", (8,), 8)])
    found = precisions(graph)
    assert (found["up"], found["j"]) == ("fp32", "keep")
    assert graph.values["j"].dtype == "int64"


def test_the_plan_of_a_plan_changes_nothing() -> None:
    graph = between_two_products()
    assert Assign("bf16").apply(graph).modified
    first = {node.id: node.precision for node in graph}
    for value in graph.values.values():
        value.dtype = "fp32"
    assert not Assign("bf16").apply(graph).modified
    assert first == {node.id: node.precision for node in graph}


def test_a_copy_that_many_readers_share_is_paid_once() -> None:
    """Eight small products read one FP32 result: no one of them pays for its cast, together they do."""

    def products(count: int) -> PrecisionGraph:
        steps = [("e", "matmul", "fp32", ("x", "w"))]
        steps += [(f"m{i}", "matmul", "low", ("e", "w")) for i in range(count)]
        graph = graph_of(*steps, output="e")
        graph.outputs = []
        for i in range(count):
            node = graph.nodes[f"m{i}"]
            # The result is short; the saved work is a third of what the cast of `e` costs.
            graph.values[node.id].shape, graph.values[node.id].numel = (8,), 8
            node.flops = int(1.0e11 * (8 * BIG / 1.0e10 + 2.0e-6) / 3)
        return graph

    assert precisions(products(1))["m0"] == "fp32"
    assert {precisions(products(8))[f"m{i}"] for i in range(8)} == {"bf16"}
