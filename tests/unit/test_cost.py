"""What a plan costs: which values are materialised, which casts stand alone, and that long view chains need no stack."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mpcompile.cost import FUSED_CAST, SHADOW_CAST, CostModel, Device, device, plan_cost
from mpcompile.graph import Node, PrecisionGraph, Value

BIG = 1 << 20


def build(*steps: tuple[str, str, tuple[str, ...]], outputs: tuple[str, ...] = ()) -> PrecisionGraph:
    """Steps are (node and value name, kind, inputs); "x" is an input, "w" a parameter; values are FP32 of BIG elements."""
    graph = PrecisionGraph()
    graph.add_input(Value("x", "fp32", (BIG,), BIG, role="input"))
    graph.add_input(Value("w", "fp32", (BIG,), BIG, role="parameter"))
    for name, kind, inputs in steps:
        graph.add(Node(name, f"test.{kind}", list(inputs), kind=kind), [Value(name, "fp32", (BIG,), BIG)])
    graph.outputs = list(outputs)
    return graph


def model(graph: PrecisionGraph, *, fused: bool = True) -> CostModel:
    return CostModel(graph, device("cuda"), "bf16", fused)


@pytest.mark.parametrize(("name", "row"), [("cuda", "cuda"), ("cuda:1", "cuda"), ("cpu", "cpu"), ("xla", "cpu")])
def test_an_unknown_device_has_its_familys_row(name: str, row: str) -> None:
    known, found = device(row), device(name)
    assert found.name == name
    assert all(getattr(found, f.name) == getattr(known, f.name) for f in fields(Device) if f.name != "name")


@pytest.mark.parametrize("name", ["cpu", "cuda", "cpu-onnx"])
def test_low_precision_is_the_faster_one(name: str) -> None:
    row = device(name)
    assert row.rate("bf16") > row.rate("fp32") > 0
    assert row.rate("fp16") > row.rate("fp32")
    assert row.bandwidth > 0
    assert row.launch > 0


def test_a_value_inside_a_fused_region_is_not_materialised() -> None:
    graph = build(("a", "elementwise", ("x",)), ("b", "elementwise", ("a",)))
    assert not model(graph).materialised(graph.values["a"])
    assert model(graph, fused=False).materialised(graph.values["a"])


def test_results_of_kernels_shared_values_and_outputs_are_materialised() -> None:
    graph = build(
        ("mm", "matmul", ("x", "w")),
        ("a", "elementwise", ("mm",)),
        ("b", "elementwise", ("a",)),
        ("c", "elementwise", ("a",)),
        outputs=("c",),
    )
    found = {name: model(graph).materialised(graph.values[name]) for name in ("mm", "a", "b", "c")}
    assert found == {"mm": True, "a": True, "b": False, "c": True}


def test_graph_inputs_and_views_store_nothing() -> None:
    graph = build(("v", "shape", ("x",)), outputs=("v",))
    assert not model(graph).materialised(graph.values["x"])
    assert not model(graph).materialised(graph.values["v"])


def test_prices_of_a_cast() -> None:
    graph = build(("a", "elementwise", ("x",)), ("mm", "matmul", ("a", "w")))
    cost, values = model(graph), graph.values
    row = device("cuda")
    assert cost.cast(values["w"], "bf16", in_memory=True) == SHADOW_CAST
    assert cost.cast(values["a"], "bf16", in_memory=False) == FUSED_CAST
    # The fused kernel that makes `a` writes the copy: no launch of its own, and no read.
    assert cost.cast(values["a"], "bf16", in_memory=True) == pytest.approx(2 * 2 * BIG / row.bandwidth)
    # A kernel's result is read, written and read again by a kernel of its own.
    alone = (4 + 2 * 2) * BIG / row.bandwidth + row.launch
    assert cost.cast(values["mm"], "bf16", in_memory=True) == pytest.approx(alone)


def test_a_view_is_looked_through() -> None:
    graph = build(("v", "shape", ("w",)), ("u", "shape", ("v",)), ("mm", "matmul", ("x", "u")))
    cost = model(graph)
    assert cost.base("u") == "w"
    assert cost.cast(graph.values["u"], "bf16", in_memory=True) == SHADOW_CAST
    assert cost.needs_memory(graph.nodes["v"])


def test_a_view_that_only_fused_kernels_read_is_near() -> None:
    graph = build(("v", "shape", ("x",)), ("a", "elementwise", ("v",)))
    assert not model(graph).needs_memory(graph.nodes["v"])


def test_matrix_work_is_flops_over_rate() -> None:
    graph = build(("mm", "matmul", ("x", "w")))
    graph.nodes["mm"].flops = 10**12
    saved = model(graph).work(graph.nodes["mm"], "fp32") - model(graph).work(graph.nodes["mm"], "bf16")
    row = device("cuda")
    assert saved == pytest.approx(10**12 / row.fp32 - 10**12 / row.bf16)


def test_thousands_of_views_of_views() -> None:
    names = [f"v{i}" for i in range(20_000)]
    steps = [(name, "shape", (before,)) for before, name in zip(["x", *names], names, strict=False)]
    graph = build(*steps, ("mm", "matmul", (names[-1], "w")))
    cost = model(graph)
    assert cost.base(names[-1]) == "x"
    assert cost.needs_memory(graph.nodes["v0"])


def test_a_low_plan_of_heavy_products_costs_less_than_fp32() -> None:
    graph = build(("mm", "matmul", ("x", "w")), ("a", "elementwise", ("mm",)), outputs=("a",))
    graph.nodes["mm"].flops = 10**12
    prices = {}
    for precision in ("fp32", "bf16"):
        plan = graph.copy()
        for node in plan:
            node.precision = precision  # type: ignore[assignment]
            plan.values[node.id].dtype = precision
        prices[precision] = plan_cost(plan, model(plan), "fp32")
    assert 0 < prices["bf16"] < prices["fp32"]
