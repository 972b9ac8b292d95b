"""A layered graph of any size: attention-like blocks with a residual stream, as the front ends would read them."""

from __future__ import annotations

from mpcompile.graph import Node, PrecisionGraph, Value

WIDTH = 256
BLOCK = 11  # nodes per block


def layered(nodes: int) -> PrecisionGraph:
    """About `nodes` nodes: norm, two products with bias, activation, residual add, and a softmax per block."""
    graph = PrecisionGraph(header={"source": "fx"})
    stream = graph.add_input(Value("x", "fp32", (64, WIDTH), 64 * WIDTH, role="input")).name
    for block in range(max(1, nodes // BLOCK)):
        stream = _block(graph, f"b{block}", stream)
    graph.outputs = [stream]
    return graph


def _block(graph: PrecisionGraph, name: str, stream: str) -> str:
    def parameter(part: str, *shape: int) -> str:
        count = WIDTH * (WIDTH if len(shape) == 2 else 1)
        return graph.add_input(Value(f"{name}.{part}", "fp32", shape, count, role="parameter")).name

    def node(part: str, op: str, *inputs: str, flops: int = 0) -> str:
        made = Node(f"{name}_{part}", op, list(inputs), module=name, source="model.py:1", flops=flops)
        graph.add(made, [Value(f"{name}_{part}", "fp32", (64, WIDTH), 64 * WIDTH)])
        return f"{name}_{part}"

    work = 2 * 64 * WIDTH * WIDTH
    norm = node("norm", "aten.softmax.int", stream)
    first = node("fc1", "aten.linear.default", norm, parameter("w1", WIDTH, WIDTH), parameter("b1", WIDTH), flops=work)
    gate = node("gelu", "aten.gelu.default", first)
    view = node("view", "aten.view.default", gate)
    second = node("fc2", "aten.linear.default", view, parameter("w2", WIDTH, WIDTH), parameter("b2", WIDTH), flops=work)
    power = node("exp", "aten.exp.default", second)
    scaled = node("mul", "aten.mul.Tensor", power, parameter("s", WIDTH))
    bounded = node("tanh", "aten.tanh.default", scaled)
    total = node("sum", "aten.add.Tensor", bounded, gate)
    turned = node("t", "aten.transpose.int", total)
    return node("add", "aten.add.Tensor", turned, stream)
