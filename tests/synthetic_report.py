"""Reports of graphs that are made here: stacks of any size, and one whose names attack the page."""

from __future__ import annotations

from collections.abc import Sequence

from mpcompile.graph import Node, PrecisionGraph, Value
from mpcompile.pipeline import History, run
from mpcompile.policy import Policy
from mpcompile.recipes import fx_passes
from mpcompile.report.model import Report, build_report

# Runs, opens a tag or leaves a script wherever a name is taken for HTML.
HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1><b-hostile>\"'&\u2028\ud800"
SIDE = 512


def graph_of(blocks: int) -> PrecisionGraph:
    """`blocks` blocks of linear, gelu, exp, layer norm, and an operation without a rule at the end."""
    graph = PrecisionGraph(header={"source": "fx"})
    graph.add_input(_value("x"))
    last = "x"
    for i in range(blocks):
        weight = graph.add_input(_value(f"h.{i}.w", role="parameter"))
        norm = graph.add_input(Value(f"h.{i}.n", "fp32", (SIDE,), SIDE, role="parameter"))
        steps = [("linear", "aten.linear.default", [last, weight.name], f"h.{i}.fc"),
                 ("gelu", "aten.gelu.default", [f"linear{i}"], f"h.{i}"),
                 ("exp", "aten.exp.default", [f"gelu{i}"], f"h.{i}"),
                 ("norm", "aten.layer_norm.default", [f"gelu{i}", norm.name], f"h.{i}.ln"),
                 ("add", "aten.add.Tensor", [f"norm{i}", f"exp{i}"], f"h.{i}")]  # fmt: skip
        for stem, op, inputs, module in steps:
            last = f"{stem}{i}"
            node = Node(last, op, inputs, slots=[0, 2] if stem == "norm" else [], module=module,
                        source=f"model.py:{10 + len(stem)}", flops=2 * SIDE**3 if stem == "linear" else 0)  # fmt: skip
            graph.add(node, [_value(last)])
    graph.add(Node("mystery", "mylib.mystery.default", [last]), [_value("mystery")])
    graph.outputs = ["mystery"]
    return graph


def _value(name: str, **more: str) -> Value:
    return Value(name, "fp32", (SIDE, SIDE), SIDE * SIDE, **more)  # type: ignore[arg-type]


def reported(graph: PrecisionGraph, policy: str = "bf16", keep_fp32: Sequence[str] = ()) -> Report:
    settled = Policy.parse(policy)
    passes = fx_passes(settled, keep_fp32=keep_fp32)
    after, steps = run(graph, passes)
    return build_report(after, settled, "cpu", steps=steps, before=graph, history=History(graph, passes))


def stacked(blocks: int, policy: str = "bf16", keep_fp32: Sequence[str] = ()) -> Report:
    return reported(graph_of(blocks), policy, keep_fp32)


def hostile() -> Report:
    """Every name that a user, a model file or an operator gives is `HOSTILE`, or holds it."""
    graph = graph_of(2)
    for node in graph:
        node.module, node.source = HOSTILE, HOSTILE
    graph.add(Node(HOSTILE, f"evil::{HOSTILE}", ["mystery"]), [_value(f"{HOSTILE}_value")])
    graph.outputs = [f"{HOSTILE}_value"]
    return reported(graph)
