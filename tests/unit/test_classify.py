"""Classify: rules, overrides, the user's own casts and regions, unknown ops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from synthetic import layered

import mpcompile.rules as rules_room
from mpcompile.errors import RuleError
from mpcompile.graph import Node, PrecisionGraph, Value
from mpcompile.passes.classify import Classify, unmatched
from mpcompile.rules import Rule, register, rules_for
from mpcompile.rules.table import Rules


@pytest.fixture
def rows() -> Iterator[Rules]:
    """The ATen rules, put back afterwards."""
    found = {source: rules_for(source) for source in ("aten", "onnx")}
    before = {source: dict(rules._rows) for source, rules in found.items()}
    yield found["aten"]
    for source, rules in found.items():
        rules._rows = before[source]
        rules._found.clear()


def graph_of(*nodes: tuple[str, str] | tuple[str, str, dict[str, Any]], dtype: str = "fp32") -> PrecisionGraph:
    """A chain of nodes (id, op, other fields), each reading the one before."""
    graph = PrecisionGraph(header={"source": "fx"})
    last = graph.add_input(Value("x", dtype, (4, 4), 16, role="input")).name
    for id_, op, *rest in nodes:
        fields: dict[str, Any] = {"module": f"body.{id_}", **(rest[0] if rest else {})}
        result = fields.pop("gives", dtype)
        graph.add(Node(id_, op, [last], **fields), [Value(id_, result, (4, 4), 16)])
        last = id_
    graph.outputs = [last]
    return graph


def decided(graph: PrecisionGraph, **options: Any) -> dict[str, tuple[str, str]]:
    Classify("bf16", **options).apply(graph)
    return {node.id: (str(node.verdict), node.decided_by) for node in graph}


CHAIN = (("fc", "aten.linear.default"), ("act", "aten.relu.default"), ("e", "aten.exp.default"))


def test_rules_decide_and_give_kind_and_reason() -> None:
    graph = graph_of(*CHAIN)
    assert decided(graph) == {"fc": ("low", "rule"), "act": ("propagate", "rule"), "e": ("fp32", "rule")}
    assert [node.kind for node in graph] == ["matmul", "elementwise", "exponential"]
    assert all(node.reason for node in graph)


def test_operand_facts_of_the_rule_reach_the_node() -> None:
    graph = graph_of(("norm", "aten.native_layer_norm.default"))
    decided(graph)
    assert graph.nodes["norm"].operands == {2: "fp32", 3: "fp32"}
    assert graph.nodes["norm"].results == {1: "fp32", 2: "fp32"}


@pytest.mark.parametrize(
    ("glob", "chosen"),
    [
        ("body.fc", {"fc"}),
        ("body", {"fc", "act", "e"}),
        ("*.e", {"e"}),
        ("aten.linear", {"fc"}),
        ("aten.linear.default", {"fc"}),
        ("aten.[le]*", {"fc", "e"}),
        ("act", {"act"}),
        ("?c", {"fc"}),
    ],
)
def test_a_glob_names_modules_operations_and_nodes(glob: str, chosen: set[str]) -> None:
    for option, verdict in (("keep_fp32", "fp32"), ("force_low", "low")):
        found = decided(graph_of(*CHAIN), **{option: (glob,)})
        assert {id_ for id_, decision in found.items() if decision[1] == "override"} == chosen
        assert {found[id_][0] for id_ in chosen} == {verdict}


def test_a_module_glob_stops_at_the_dot() -> None:
    graph = graph_of(("a", "aten.relu.default", {"module": "dec.0"}), ("b", "aten.relu.default", {"module": "dec.01"}))
    assert decided(graph, keep_fp32=("dec.0",)) == {"a": ("fp32", "override"), "b": ("propagate", "rule")}


def test_a_callable_may_ask_for_what_the_rules_say() -> None:
    graph = graph_of(("a", "aten.linear.default"), ("b", "aten.exp.default"))
    Classify("bf16", keep_fp32=(lambda n: n.kind == "matmul",), force_low=(lambda n: n.verdict == "fp32",)).apply(graph)
    assert [n.verdict for n in graph] == ["fp32", "low"]


def test_a_callable_chooses_nodes_and_is_named_in_the_reason() -> None:
    def deep(node: Node) -> bool:
        return node.op.startswith("aten.relu")

    graph = graph_of(*CHAIN)
    assert decided(graph, keep_fp32=(deep,))["act"] == ("fp32", "override")
    assert graph.nodes["act"].reason == "keep_fp32='deep'"


def test_keep_fp32_wins_over_low() -> None:
    assert decided(graph_of(*CHAIN), keep_fp32=("fc",), force_low=("body",))["fc"] == ("fp32", "override")


def test_the_callers_word_lowers_even_what_its_kind_keeps() -> None:
    assert decided(graph_of(*CHAIN), force_low=("e",))["e"] == ("low", "override")


def test_no_override_touches_casts_integers_and_opaque_bodies() -> None:
    graph = graph_of(
        ("cast", "aten.to.dtype", {"out_dtype": "fp16", "gives": "fp16"}),
        ("size", "aten.sym_size.int"),
        ("body", "hop.cond"),
    )
    found = decided(graph, force_low=("*",))
    assert found == {"cast": ("propagate", "user-cast"), "size": ("propagate", "rule"), "body": ("fp32", "rule")}


@pytest.mark.parametrize("option", ["keep_fp32", "force_low"])
def test_a_glob_that_matches_nothing_is_an_error_with_near_names(option: str) -> None:
    with pytest.raises(RuleError, match="MP203") as caught:
        decided(graph_of(*CHAIN), **{option: ("body.fcc",)})
    assert "body.fc" in str(caught.value)
    assert ("low=" if option == "force_low" else "keep_fp32=") in str(caught.value)


def test_a_part_of_a_model_may_leave_a_glob_to_the_other_parts() -> None:
    one, other = graph_of(*CHAIN), graph_of(("elsewhere", "aten.relu.default"))
    assert decided(one, keep_fp32=("elsewhere",), partial=True)["fc"] == ("low", "rule")
    assert unmatched([one, other], ("elsewhere", "nowhere*", bool)) == ["nowhere*"]


def test_an_unknown_op_is_fp32_and_says_how_to_register_it() -> None:
    graph = graph_of(("mine", "mylib.op.default"))
    assert decided(graph) == {"mine": ("fp32", "unknown")}
    assert 'mpcompile.rules.register("mylib.op.default"' in graph.nodes["mine"].reason


def test_strict_refuses_an_unknown_op_where_it_stands() -> None:
    graph = graph_of(("mine", "mylib.op.default", {"source": "model.py:7"}))
    with pytest.raises(RuleError, match="MP205") as caught:
        decided(graph, strict=True)
    assert "mylib.op.default" in str(caught.value)
    assert "body.mine model.py:7" in str(caught.value)


def test_a_registered_op_is_known(rows: Rules) -> None:
    register("mylib::op", "matmul")
    register("mylib::sum", verdict="fp32", reason="adds up a galaxy")
    graph = graph_of(("mine", "mylib.op.default"), ("sum", "mylib.sum.overload"))
    assert decided(graph, strict=True) == {"mine": ("low", "rule"), "sum": ("fp32", "rule")}
    assert graph.nodes["sum"].reason == "adds up a galaxy"


def test_the_programs_own_region_keeps_fp32() -> None:
    graph = graph_of(
        ("off", "aten.linear.default", {"region": "off"}), ("low", "aten.linear.default", {"region": "bf16"})
    )
    assert decided(graph) == {"off": ("fp32", "autocast-region"), "low": ("low", "rule")}


@pytest.mark.parametrize("dtype", ["fp64", "complex64"])
def test_what_meets_wider_numbers_stays_as_it_is(dtype: str) -> None:
    assert decided(graph_of(("fc", "aten.linear.default"), dtype=dtype))["fc"][0] == "fp32"


def test_an_attribute_may_change_the_verdict() -> None:
    plain = graph_of(("put", "aten.index_put.default"))
    adding = graph_of(("put", "aten.index_put.default", {"attrs": {"accumulate": True}}))
    assert decided(plain)["put"][0] == "propagate"
    assert decided(adding)["put"][0] == "fp32"


def test_a_frozen_low_table_is_read_as_it_is() -> None:
    graph = graph_of(("rows", "aten.embedding.default"), dtype="bf16")
    decided(graph)
    assert graph.nodes["rows"].operands == {0: "any"}
    assert graph.nodes["rows"].out_dtype == "bf16"


def test_the_autocast_plan_takes_the_lists_of_torch_and_says_so() -> None:
    graph = graph_of(
        ("fc", "aten.linear.default"),
        ("s", "aten.softmax.int"),
        ("a", "aten.addcmul.default"),
        ("r", "aten.relu.default"),
    )
    found = decided(graph, plan="autocast")
    assert [verdict for verdict, _ in found.values()] == ["low", "fp32", "propagate", "propagate"]
    assert "autocast" in graph.nodes["s"].reason


def test_a_second_run_changes_nothing() -> None:
    graph = graph_of(*CHAIN)
    assert Classify("bf16", keep_fp32=("fc",)).apply(graph).modified
    assert not Classify("bf16", keep_fp32=("fc",)).apply(graph).modified


def test_it_is_linear_and_fast() -> None:
    graph = layered(20_000)
    Classify("bf16").apply(graph)
    start = time.process_time()
    Classify("bf16", keep_fp32=("*norm*",)).apply(graph)
    # 5 to 14 us a node where it was measured; ten times as much means that something stopped being linear.
    assert (time.process_time() - start) / len(graph) < 150e-6


def test_the_public_names_of_the_rules() -> None:
    assert {"Kind", "Rule", "Rules", "register", "rules_for"} <= set(rules_room.__all__)
    assert isinstance(next(iter(rules_for("aten"))), Rule)
