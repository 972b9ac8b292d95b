"""The assignment is the exact optimum of its cost model: against brute force, against networkx, in any node order."""

from __future__ import annotations

import itertools
import random

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import front_end_graphs
from synthetic import layered

from mpcompile.cost import CostModel, device, plan_cost
from mpcompile.cut import SINK, SOURCE, CutProblem
from mpcompile.graph import Node, PrecisionGraph, Value
from mpcompile.passes.assign import Assign, _CutProblem, made
from mpcompile.passes.classify import Classify
from mpcompile.passes.normalize import Normalize
from mpcompile.passes.origins import Origins

LOW = "bf16"
OUTPUTS = ("fp32", "low", "keep")


def prepared(graph: PrecisionGraph, flops: int = 0) -> PrecisionGraph:
    for node in graph:
        node.flops = flops if "linear" in node.op or "mm" in node.op or "matmul" in node.op else 0
    Normalize().apply(graph)
    Classify(LOW, partial=True).apply(graph)
    return graph


def with_origins(graph: PrecisionGraph, output: str = "fp32") -> PrecisionGraph:
    """The graph with origins, and with what must keep its digits raised to FP32."""
    Origins(LOW, output).apply(graph)
    return graph


def lawful(plan: PrecisionGraph) -> bool:
    """Law 10 of a plan without casts: what moves a full value low has none but low readers."""
    readers = plan.readers()
    return all(
        reader.precision != "fp32"
        for node in plan
        if node.precision == LOW and not node.out_dtype
        for name in node.outputs
        if plan.values[name].origin == "full"
        for reader in readers[name]
    )


def brute_force(graph: PrecisionGraph, assign: Assign) -> float:
    """The least cost over all plans that keep the fixed precisions, the ties and law 10."""
    problem = _CutProblem(graph.copy(), CostModel(graph, device(assign.device), LOW, assign.fused), LOW, assign.output)
    problem.vertices()
    free = sorted({at for at in problem.places if at is not None} - {SOURCE, SINK})
    best = float("inf")
    for choice in itertools.product((False, True), repeat=len(free)):
        # Vertices of nodes come first, so that places in `free` are those of the vertices.
        problem.graph = plan = graph.copy()
        problem.made = made(plan)
        problem.write_back([True, False, *choice])
        best = min(best, cost_of_plan(graph, plan, assign))
    return best


def cost_of_plan(undecided: PrecisionGraph, plan: PrecisionGraph, assign: Assign) -> float:
    wanted = {"fp32": "fp32", "low": LOW}.get(assign.output, "keep")
    model = CostModel(undecided, device(assign.device), LOW, assign.fused)
    model.graph = plan
    return plan_cost(plan, model, wanted)


# A graph, the work of its products, fused or not, the policy's output, the machine.
PROBLEMS = given(
    front_end_graphs(max_nodes=9),
    st.sampled_from([0, 10**6, 10**9]),
    st.booleans(),
    st.sampled_from(OUTPUTS),
    st.sampled_from(["cpu", "cuda"]),
)


@settings(max_examples=150, deadline=None)
@PROBLEMS
def test_no_plan_is_cheaper(graph: PrecisionGraph, flops: int, fused: bool, output: str, machine: str) -> None:
    graph = prepared(graph, flops)
    assign = Assign(LOW, machine, "global", fused, output)
    plan = graph.copy()
    assign.apply(plan)
    got, best = cost_of_plan(graph, plan, assign), brute_force(graph, assign)
    # Capacities are rounded up to integers of one part in 2**30 of their sum.
    assert got <= best + 1e-6 * (got + best) + 1e-12


@settings(max_examples=150, deadline=None)
@PROBLEMS
def test_no_lawful_plan_is_cheaper(graph: PrecisionGraph, flops: int, fused: bool, output: str, machine: str) -> None:
    """With origins: their ties to FP32 and their readers' sides leave one exact cut."""
    graph = with_origins(prepared(graph, flops), output)
    assign = Assign(LOW, machine, "global", fused, output)
    plan = graph.copy()
    assign.apply(plan)
    assert lawful(plan)
    got, best = cost_of_plan(graph, plan, assign), brute_force(graph, assign)
    assert got <= best + 1e-6 * (got + best) + 1e-12


def moved(second: str, flops: int = 1 << 34, numel: int = 1 << 20) -> PrecisionGraph:
    """An input, seen through a view that a product reads, and `second`."""
    graph = PrecisionGraph()
    graph.add_input(Value("x", "fp32", (numel,), numel, role="input"))
    graph.add_input(Value("w", "fp32", (1024, 1024), 1 << 20, role="parameter"))
    graph.add(Node("view", "aten.view.default", ["x"]), [Value("view", "fp32", (numel,), numel)])
    graph.add(Node("mm", "aten.linear.default", ["view", "w"]), [Value("mm", "fp32", (numel,), numel)])
    graph.nodes["mm"].flops = flops
    reads = ["view", "w"] if "linear" in second else ["view"]
    graph.add(Node("second", second, reads), [Value("second", "fp32", (numel,), numel)])
    graph.nodes["second"].flops = flops if "linear" in second else 0
    graph.outputs = ["mm", "second"]
    return graph


@pytest.mark.parametrize(
    ("second", "expected"),
    [("aten.linear.default", LOW), ("aten.tanh.default", "fp32"), ("aten.exp.default", "fp32")],
)
def test_a_full_value_moves_low_only_where_each_reader_rounds_it(second: str, expected: str) -> None:
    graph = moved(second)
    Classify(LOW, partial=True).apply(graph)
    plan = with_origins(graph)
    assert plan.values["view"].origin == "full"
    undecided, assign = plan.copy(), Assign(LOW)
    assign.apply(plan)
    assert (plan.nodes["view"].precision, plan.nodes["mm"].precision) == (expected, LOW)
    assert lawful(plan)
    best = brute_force(undecided, assign)
    assert cost_of_plan(undecided, plan, assign) == pytest.approx(best, rel=1e-6)


def test_the_oracle_sees_an_unlawful_plan() -> None:
    plan = with_origins(moved("aten.exp.default"))
    for node in plan:
        node.precision = LOW if node.id != "second" else "fp32"
    assert not lawful(plan)


@settings(max_examples=60, deadline=None)
@given(front_end_graphs(max_nodes=14), st.sampled_from([0, 10**9]), st.sampled_from(OUTPUTS))
def test_the_cut_with_origins_is_networkx_s(graph: PrecisionGraph, flops: int, output: str) -> None:
    graph = with_origins(prepared(graph, flops), output)
    plan = _CutProblem(graph, CostModel(graph, device("cuda"), LOW, True), LOW, output)
    plan.run()
    if plan.problem.heads:
        assert_least(plan.problem)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 40))
def test_the_cut_is_networkx_s(seed: int, size: int) -> None:
    rng = random.Random(seed)
    problem = CutProblem()
    vertices = [problem.vertex() for _ in range(size)]
    for _ in range(size * 3):
        a, b = rng.choice([SOURCE, *vertices]), rng.choice([SINK, *vertices])
        capacity = rng.choice([rng.random(), rng.random() * 1e3, float("inf") if a != SOURCE and b != SINK else 1.0])
        problem.edge(a, b, capacity)
    assert_least(problem)


def assert_least(problem: CutProblem) -> None:
    """The solved cut has the value of networkx's minimum cut."""
    graph = nx.DiGraph()
    graph.add_nodes_from([SOURCE, SINK, *range(problem.size)])
    for a, b, c in zip(problem.heads, problem.tails, problem.scaled().tolist(), strict=True):
        known = graph.get_edge_data(a, b, {"capacity": 0})["capacity"]
        graph.add_edge(a, b, capacity=known + c)
    side = problem.solve() if problem.heads else np.ones(problem.size, dtype=bool)
    value = sum(d["capacity"] for a, b, d in graph.edges(data=True) if side[a] and not side[b])
    assert value == nx.minimum_cut_value(graph, SOURCE, SINK)


def test_scaled_capacities_never_leave_32_bits() -> None:
    problem = CutProblem()
    a = problem.vertex()
    for _ in range(1000):
        problem.edge(SOURCE, a, 2.0**60)
        problem.edge(a, SINK, 1e-30)
    whole = problem.scaled()
    assert whole.sum() < 2**31
    assert whole.min() >= 1


def shuffled(graph: PrecisionGraph, seed: int) -> PrecisionGraph:
    """The same graph, its nodes in another topological order and its inputs in another order."""
    rng, twin = random.Random(seed), graph.copy()
    order = list(nx.lexicographical_topological_sort(_with_storage_order(twin), key=lambda _: rng.random()))
    twin.rebuild_order([twin.nodes[name] for name in order])
    names = list(twin.values)
    rng.shuffle(names)
    twin.values = {name: twin.values[name] for name in names}
    return twin


def _with_storage_order(graph: PrecisionGraph) -> nx.DiGraph:
    return graph.to_networkx()


@settings(max_examples=60, deadline=None)
@given(front_end_graphs(max_nodes=14), st.integers(0, 1000))
def test_node_order_does_not_matter(graph: PrecisionGraph, seed: int) -> None:
    graph = prepared(graph, 10**7)
    plans = []
    for version in (graph, shuffled(graph, seed)):
        plan = with_origins(version.copy())
        Assign(LOW).apply(plan)
        origins = {name: value.origin for name, value in plan.values.items()}
        plans.append(({node.id: (node.precision, node.reason) for node in plan}, origins))
    assert plans[0] == plans[1]


def chain(*ops: str, numel: int = 1 << 20, flops: int = 1 << 34) -> PrecisionGraph:
    """x -> op -> op ..., with a weight for each linear."""
    graph = PrecisionGraph()
    value = graph.add_input(Value("x", "fp32", (numel,), numel, role="input")).name
    for i, op in enumerate(ops):
        inputs = [value]
        if "linear" in op:
            inputs.append(graph.add_input(Value(f"w{i}", "fp32", (1024, 1024), 1 << 20, role="parameter")).name)
        graph.add(
            Node(f"n{i}", op, inputs, flops=flops if "linear" in op else 0), [Value(f"v{i}", "fp32", (numel,), numel)]
        )
        value = f"v{i}"
    graph.outputs = [value]
    return graph


def decided(graph: PrecisionGraph, **options: object) -> dict[str, str]:
    Classify(LOW, partial=True).apply(graph)
    Assign(LOW, **options).apply(graph)  # type: ignore[arg-type]
    return {node.id: node.precision for node in graph}


def test_values_between_products_stay_low() -> None:
    found = decided(chain("aten.linear.default", "aten.gelu.default", "aten.tanh.default", "aten.linear.default"))
    assert set(found.values()) == {LOW}


def test_a_product_too_small_to_pay_for_its_casts_stays_fp32_and_says_so() -> None:
    graph = chain("aten.linear.default", numel=64, flops=1 << 10)
    assert decided(graph)["n0"] == "fp32"
    assert "too small" in graph.nodes["n0"].reason
    assert graph.nodes["n0"].decided_by == "cost"


@pytest.mark.parametrize("flops", [1 << 10, 1 << 20, 1 << 21, 1 << 23, 1 << 30])
def test_a_low_product_has_a_price_however_small_where_the_device_says_so(flops: int) -> None:
    """On a CPU, BF16 pays from where the work saved is the call's price on; on a GPU both types cost a launch."""
    row = device("cpu")
    saved = flops / row.fp32 - flops / row.bf16
    graph = chain("aten.linear.default", numel=64, flops=flops)
    assert (decided(graph)["n0"] == LOW) == (saved > row.low_call_overhead["bf16"])
    assert device("cuda").low_call_overhead == {}


def test_an_override_is_not_a_wish() -> None:
    graph = chain("aten.linear.default", numel=64, flops=1 << 10)
    Classify(LOW, force_low=("n0",)).apply(graph)
    Assign(LOW).apply(graph)
    assert graph.nodes["n0"].precision == LOW


def test_the_residual_stream_of_a_transformer_is_low() -> None:
    graph = layered(110)
    Classify(LOW).apply(graph)
    Assign(LOW).apply(graph)
    *stream, last = [node for node in graph if node.id.endswith("_add")]
    assert {node.precision for node in stream} == {LOW}
    # The last sum is the graph's FP32 output: writing it once in FP32 is cheaper than writing it twice.
    assert last.precision == "fp32"


@pytest.mark.parametrize(("before", "after", "expected"), [(1 << 10, 1 << 20, LOW), (1 << 20, 1 << 10, "fp32")])
def test_a_cast_stands_on_the_smaller_side(before: int, after: int, expected: str) -> None:
    """An FP32 kernel's result, seen through a view (an expand, a slice), read by a low product."""
    graph = PrecisionGraph()
    graph.add_input(Value("x", "fp32", (before,), before, role="input"))
    graph.add_input(Value("w", "fp32", (1024, 1024), 1 << 20, role="parameter"))
    graph.add(Node("view", "aten.expand.default" if after > before else "aten.slice.Tensor", ["x"]),
              [Value("view", "fp32", (after,), after)])  # fmt: skip
    graph.add(Node("mm", "aten.linear.default", ["view", "w"], flops=1 << 34), [Value("mm", "fp32", (after,), after)])
    graph.outputs = ["mm"]
    assert decided(graph)["view"] == expected


def test_written_storage_has_one_precision() -> None:
    graph = chain("aten.linear.default", "aten.add_.Tensor", "aten.linear.default")
    graph.values["v0"].alias = graph.values["v1"].alias = "storage0"
    found = decided(graph)
    assert found["n0"] == found["n1"]


def test_autocast_follows_its_operands() -> None:
    graph = chain("aten.linear.default", "aten.add.Tensor", "aten.exp.default", "aten.add.Tensor")
    for node, verdict in zip(graph, ("low", "propagate", "fp32", "propagate"), strict=True):
        node.verdict, node.kind = verdict, "elementwise"
    Assign(LOW, plan="autocast").apply(graph)
    assert [node.precision for node in graph] == [LOW, LOW, "fp32", "fp32"]
