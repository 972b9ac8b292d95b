"""The hazards beyond the golden texts: ONNX names, and what must not be raised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import front_end_graphs

from mpcompile.graph import PrecisionGraph
from mpcompile.parse import parse_graph
from mpcompile.passes.hazards import Hazards
from mpcompile.pipeline import run
from mpcompile.rules.hazards import HAZARDS, base
from mpcompile.text import print_graph

INPUTS = """
graph
input x: fp32[8, 64]
input s: fp32[8, 1]
input ids: int64[8]
input flags: bool[8]
input two: fp32[] <role='constant' range=(2.0, 2.0)>
input tiny: fp32[] <role='constant' range=(1e-09, 1e-09)>
input mask: fp32[8, 64] <role='constant' range=(-1e+09, 0.0)>
input unbounded: fp32[] <role='constant' range=(3.4028234663852886e+38, 3.4028234663852886e+38)>
input minus_infinity: fp32[] <role='constant' range=(-inf, 0.0)>
"""

# text -> the nodes that FP16 raises
CASES = {
    "ONNX norm": ("""
        sq: fp32[8, 64] = onnx::Pow(x, two)
        mean: fp32[8, 1] = onnx::ReduceMean(sq)
        eps: fp32[8, 1] = onnx::Add(mean, tiny)
        root: fp32[8, 1] = onnx::Sqrt(eps)
        y: fp32[8, 64] = onnx::Div(x, root)
        out: fp32[8, 64] = onnx::Mul(y, s)""", {"sq", "mean", "eps", "root"}),
    "ONNX constant mask": ("""
        add: fp32[8, 64] = onnx::Add(x, mask)
        soft: fp32[8, 64] = onnx::Softmax(add)
        out: fp32[8, 64] = onnx::MatMul(soft, x)""", {"add", "soft"}),
    "a constant of -inf fits": ("""
        add: fp32[8, 64] = onnx::Add(x, minus_infinity)
        soft: fp32[8, 64] = onnx::Softmax(add)""", set()),
    "FLT_MAX as a bound means no bound": ("y: fp32[8, 64] = onnx::Clip(x, 2:unbounded)", set()),
    "2 to the x is no square": ("""
        p: fp32[8, 64] = onnx::Pow(two, x)
        mean: fp32[8, 1] = onnx::ReduceMean(p)""", {"p"}),
    "what reads a power may read infinity": ("""
        p: fp32[8, 64] = aten.pow.Tensor_Scalar(x) {'exponent': 4}
        y: fp32[8, 64] = aten.mul.Tensor(p) {'other': 1e-06}
        z: fp32[8, 64] = aten.relu.default(y)""", {"p", "y"}),
    "a root of a power is in range": ("""
        p: fp32[8, 64] = aten.pow.Tensor_Scalar(x) {'exponent': 0.5}
        y: fp32[8, 64] = aten.mul.Tensor(p, x)""", set()),
    "a square without a reduction": ("y: fp32[8, 64] = aten.mul.Tensor(x, x)", set()),
    "a square through a view": ("""
        sq: fp32[8, 64] = aten.pow.Tensor_Scalar(x) {'exponent': 2}
        v: fp32[512] = aten.view.default(sq)
        sum: fp32[] = aten.sum.default(v)""", {"sq", "v", "sum"}),
    "attention keeps its kernel": ("""
        big: fp32[8, 64] = aten.mul.Tensor(x) {'other': -1e+09}
        att: fp32[8, 64] = aten.scaled_dot_product_attention.default(x, x, x, big) | low ? attention rule""", {"big"}),
    "a clamp inside the range": ("y: fp32[8, 64] = aten.clamp.default(x) {'min': -100.0, 'max': 100.0}", set()),
    "a clamp at FP16's own bounds": ("y: fp32[8, 64] = aten.clamp.default(x) {'min': -65504.0, 'max': 65504.0}", set()),
    "a clamp beyond": ("y: fp32[8, 64] = aten.clamp.default(x) {'min': -1e+05}", {"y"}),
    "integers may be large": ("y: int64[8] = aten.clamp.default(ids) {'max': 1000000000}", set()),
    "a slice to the end is no number": ("y: fp32[8, 64] = aten.slice.Tensor(x) {'end': 9223372036854775807}", set()),
    "softmax of logits scaled down": ("""
        q: fp32[8, 64] = aten.div.Tensor(x) {'other': 8.0}
        soft: fp32[8, 64] = aten.softmax.int(q)""", set()),
    "division by less than one scales up": ("""
        q: fp32[8, 64] = aten.div.Tensor(x) {'other': 0.07}
        soft: fp32[8, 64] = aten.softmax.int(q)""", {"q", "soft"}),
    "arange, arithmetic, index": ("""
        n: fp32[8] = aten.arange.default() {'end': 8} out_dtype='fp32'
        half: fp32[8] = aten.div.Tensor(n) {'other': 2.0}
        floor: fp32[8] = aten.floor.default(half)
        i: int64[8] = aten.to.dtype(floor) | ? ? cast rule out_dtype='int64'""", {"half", "floor"}),
    "a mask of bools is no index": ("""
        m: fp32[8] = aten.to.dtype(flags) | ? ? cast rule out_dtype='fp32'
        y: fp32[8] = aten.mul.Tensor(m) {'other': 0.5}""", set()),
    "labels meet the model's numbers": ("""
        t: fp32[8, 1] = aten.to.dtype(ids) | ? ? cast rule out_dtype='fp32'
        d: fp32[8, 64] = aten.sub.Tensor(x, t)""", set()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_fp16_raises(name: str) -> None:
    lines, raised = CASES[name]
    text = INPUTS + "\n".join(line.strip() for line in lines.splitlines()) + "\nreturn x\n"
    graph, (record,) = run(parse_graph(text), [Hazards("fp16")])
    assert {node.id for node in graph if node.decided_by == "hazard"} == raised
    assert record.modified == bool(raised)
    assert all(node.reason for node in graph if node.id in raised)


@given(front_end_graphs(), st.sampled_from(["fp16", "bf16"]))
def test_a_hazard_only_raises_and_only_once(graph: PrecisionGraph, low: str) -> None:
    after, _ = run(graph, [Hazards(low)])
    for node in graph:
        now = after.nodes[node.id]
        assert now.verdict in (node.verdict, "fp32")
        now.verdict, now.reason, now.decided_by = node.verdict, node.reason, node.decided_by
    assert print_graph(after) == print_graph(graph)
    once, _ = run(graph, [Hazards(low)])
    _, (record,) = run(once, [Hazards(low)])
    assert not record.modified


@pytest.mark.parametrize(("op", "name"), [
    ("aten._softmax.default", "softmax"), ("aten.masked_fill_.Scalar", "masked_fill"),
    ("onnx::ReduceMean", "reducemean"),
    ("com.microsoft::Gelu", "gelu"), ("prims.convert_element_type.default", "convert_element_type"), ("mul", "mul"),
])  # fmt: skip
def test_base_names(op: str, name: str) -> None:
    assert base(op) == name


def test_rows_are_named_once() -> None:
    assert len({row.name for row in HAZARDS}) == len(HAZARDS)
