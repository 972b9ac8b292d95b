"""`legalize` case by case: what of a node's types the schema, its constants or its neighbours hold at FP32."""

from __future__ import annotations

import math

import pytest

from mpcompile.graph import PrecisionGraph
from mpcompile.parse import parse_graph
from mpcompile.passes.classify import Classify
from mpcompile.passes.legalize import Legalize
from mpcompile.pipeline import run
from mpcompile.signature import Signature

LOW = frozenset({"fp32", "fp16"})
FREE = Signature(("T", "T"), ("T",), {"T": LOW})
INPUTS = "graph\ninput x: fp32[8, 8]\ninput w: fp32[8, 8]\ninput h: fp16[8, 8]\ninput ids: int64[8]\n"


def legalized(
    text: str, *, inputs: str = "", low: tuple[str, ...] = (), **signatures: Signature
) -> tuple[PrecisionGraph, bool]:
    """(graph after classify and legalize, whether legalize changed it)."""
    graph = parse_graph(f"{INPUTS}{inputs}{text}")
    graph, _ = run(graph, [Classify("fp16", "onnx")])
    for name in low:
        graph.nodes[name].decide("low", "the caller says so", "override")
    graph, results = run(graph, [Legalize("fp16", signatures)])
    return graph, results[0].modified


def test_a_node_whose_type_may_be_low_is_left_alone() -> None:
    graph, changed = legalized("y: fp32[8, 8] = onnx::MatMul(x, w)", y=FREE)
    assert not changed
    assert graph.nodes["y"].verdict != "fp32"


def test_a_node_without_a_signature_takes_and_gives_fp32() -> None:
    graph, changed = legalized("y: fp32[8, 8] = onnx::MatMul(x, w)")
    assert changed
    assert (graph.nodes["y"].verdict, graph.nodes["y"].reason) == ("fp32", "its types are not known")


def test_a_refused_type_says_the_schema_s_reason_and_outranks_the_caller() -> None:
    refused = Signature(("T", "T"), ("T",), {"T": frozenset({"fp32"})}, why="MatMul takes no fp16 at opset 0")
    graph, _ = legalized("y: fp32[8, 8] = onnx::MatMul(x, w)", low=("y",), y=refused)
    assert (graph.nodes["y"].verdict, graph.nodes["y"].reason) == ("fp32", refused.why)


def test_another_variable_that_may_not_be_low_is_pinned_and_the_node_stays_low() -> None:
    two = Signature(("T", "S"), ("T",), {"T": LOW, "S": frozenset({"fp32"})})
    graph, _ = legalized("y: fp32[8, 8] = onnx::MatMul(x, w)", y=two)
    assert graph.nodes["y"].verdict != "fp32"
    assert graph.nodes["y"].operands == {1: "fp32"}


def test_a_result_of_a_variable_that_no_operand_has_is_pinned() -> None:
    graph, _ = legalized(
        "y: fp32[8, 8], s: fp32[8] = onnx::Norm(x)", y=Signature(("T",), ("T", "U"), {"T": LOW, "U": LOW})
    )
    assert graph.nodes["y"].results.get(1) == "fp32"


@pytest.mark.parametrize(
    ("end", "stays"), [(65504.0, False), (65519.9, False), (65520.0, True), (1e7, True), (math.inf, False)]
)
def test_a_constant_that_rounds_to_infinity_keeps_its_reader_fp32(end: float, stays: bool) -> None:
    large = f"input c: fp32[] <role='constant' range=(0.0, {end!r})>\n"
    graph, _ = legalized("y: fp32[8, 8] = onnx::Mul(x, c)", inputs=large, y=FREE)
    assert (graph.nodes["y"].verdict == "fp32") == stays


def test_the_caller_may_have_a_large_constant_in_low() -> None:
    large = "input c: fp32[] <role='constant' range=(0.0, 1e7)>\n"
    graph, _ = legalized("y: fp32[8, 8] = onnx::Mul(x, c)", inputs=large, low=("y",), y=FREE)
    assert graph.nodes["y"].verdict == "low"


def test_half_precision_of_the_model_is_left_as_it_is() -> None:
    graph, _ = legalized("y: fp16[8, 8] = onnx::Add(h, h)", y=FREE)
    node = graph.nodes["y"]
    assert (node.out_dtype, node.results, node.operands) == ("fp16", {0: "fp16"}, {0: "any", 1: "any"})


@pytest.mark.parametrize("hops", [1, 8, 9])
def test_arithmetic_that_ends_in_integers_stays_fp32_for_eight_operations(hops: int) -> None:
    chain = "\n".join(f"a{i}: fp32[8, 8] = onnx::Add({f'a{i - 1}' if i else 'x'}, w)" for i in range(hops))
    graph, _ = legalized(
        f"{chain}\ny: int64[8, 8] = onnx::Cast(a{hops - 1}) {{'to': 7}} out_dtype='int64'",
        **{f"a{i}": FREE for i in range(hops)}, y=Signature(("T1",), ("T2",), {"T1": LOW}),
    )  # fmt: skip
    raised = [node.id for node in graph if "becomes integers" in node.reason]
    assert len(raised) == min(hops, 8)
    assert ("a0" in raised) == (hops <= 8)


def test_what_stands_between_dequantize_and_quantize_stays_fp32() -> None:
    inputs = "input q: int8[8, 8]\ninput s: fp32[]\ninput z: int8[]\n"
    text = """d: fp32[8, 8] = onnx::DequantizeLinear(q, s, z)
m: fp32[8, 8] = onnx::MatMul(d, w)
y: fp32[8, 8] = onnx::Add(x, w)"""
    graph, _ = legalized(text, inputs=inputs, d=Signature(("Q", "T", "Q"), ("T",), {"T": LOW}), m=FREE, y=FREE)
    assert graph.nodes["m"].reason == "part of a quantized pattern"
    assert graph.nodes["y"].verdict != "fp32"
