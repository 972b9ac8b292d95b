"""`measured-hazards` case by case: which measured values raise which nodes."""

from __future__ import annotations

import pytest

from mpcompile.graph import PrecisionGraph
from mpcompile.parse import parse_graph
from mpcompile.passes.classify import Classify
from mpcompile.passes.measured_hazards import VANISHING, Measured, MeasuredHazards
from mpcompile.pipeline import StepRecord, run

TEXT = """
graph
input x: fp32[8, 8]
input w: fp32[8, 8]
input ids: int64[8]
a: fp32[8, 8] = onnx::MatMul(x, w)
b: fp32[8, 8] = onnx::Relu(a)
c: fp32[8, 8] = onnx::MatMul(b, w)
"""


def measured(low: str, **options: object) -> tuple[PrecisionGraph, StepRecord]:
    graph, _ = run(parse_graph(TEXT), [Classify(low, "onnx")])
    graph, results = run(graph, [MeasuredHazards(low, **options)])  # type: ignore[arg-type]
    return graph, results[0]


def raised(graph: PrecisionGraph) -> set[str]:
    return {node.id for node in graph if node.verdict == "fp32"}


@pytest.mark.parametrize(("low", "most", "raises"), [
    ("fp16", 65504.0, False), ("fp16", 65505.0, True), ("bf16", 65505.0, False), ("bf16", 3.3e38, False), ("bf16", 3.4e38, True),
])  # fmt: skip
def test_beyond_the_largest_number_maker_and_reader_stay_fp32(low: str, most: float, raises: bool) -> None:
    for seen in (Measured(-1.0, most), Measured(-most, 1.0)):
        graph, result = measured(low, ranges={"a": seen})
        assert raised(graph) == ({"a", "b"} if raises else set())
        assert result.modified is raises


def test_headroom_counts_what_other_inputs_may_do() -> None:
    ranges = {"b": Measured(0.0, 40000.0)}
    assert raised(measured("fp16", ranges=ranges)[0]) == set()
    graph, _ = measured("fp16", ranges=ranges, headroom=2.0)
    assert raised(graph) == {"b", "c"}
    assert "near fp16's largest number" in graph.nodes["b"].reason


@pytest.mark.parametrize(("share", "raises"), [(VANISHING, False), (VANISHING + 0.01, True)])
def test_most_elements_that_round_to_zero_raise(share: float, raises: bool) -> None:
    graph, _ = measured("fp16", ranges={"a": Measured(-1e-9, 1e-9, share)})
    assert raised(graph) == ({"a", "b"} if raises else set())


def test_a_range_speaks_before_a_gradient_and_generated_inputs_are_said() -> None:
    graph, result = measured(
        "fp16", ranges={"a": Measured(0.0, 1e6)}, gradients={"a": "has a gradient", "b": "vanishes"}, on="3 inputs"
    )
    assert "measured on generated inputs: 'a' reaches 1e+06" in graph.nodes["a"].reason
    assert "'b' vanishes" in graph.nodes["c"].reason
    assert result.notes == ("3 nodes raised to fp32 by measured ranges, on 3 inputs",)


def test_an_override_is_a_better_right_than_a_measurement() -> None:
    graph, _ = run(parse_graph(TEXT), [Classify("fp16", "onnx")])
    graph.nodes["a"].decide("low", "the caller says so", "override")
    graph, _ = run(graph, [MeasuredHazards("fp16", {"a": Measured(0.0, 1e6)})])
    assert raised(graph) == {"b"}


def test_integers_and_unknown_names_raise_nothing() -> None:
    graph, result = measured("fp16", ranges={"ids": Measured(0, 1e9), "nobody": Measured(0, 1e9)})
    assert (raised(graph), result.modified, result.notes) == (set(), False, ())


def test_ranges_join_to_the_wider_one() -> None:
    assert Measured(-1.0, 2.0, 0.1).join(Measured(-3.0, 1.0, 0.4)) == Measured(-3.0, 2.0, 0.4)
