"""Random precision graphs for the property tests.

`any_graphs`: anything the text form must print and read, sense or no sense.
`front_end_graphs`: what a front end hands over: real operations, in-place ones and views of written storage, the user's
own casts, integers, nothing decided.
`decided_graphs`: the same after a random, lawful assignment, so that the cast passes are tested on every plan, not only
on those that the minimum cut prefers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from mpcompile.formats import CASTABLE
from mpcompile.graph import Node, PrecisionGraph, Value

names = st.text(min_size=1, max_size=8) | st.from_regex(r"[a-z]{1,3}(\.[0-9])?", fullmatch=True)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text(max_size=3) | st.integers()
lists = lambda inner: st.lists(inner, max_size=3)  # noqa: E731
literals = st.recursive(
    scalars,
    lambda inner: lists(inner) | lists(inner).map(tuple) | st.dictionaries(keys, inner, max_size=2),
    max_leaves=6,
)
dtypes = st.sampled_from(["fp32", "fp16", "bf16", "fp64", "int64", "bool", "complex64", "scalar"])
shapes = st.lists(st.integers(0, 64) | names, max_size=3).map(tuple)


@st.composite
def any_graphs(draw: st.DrawFn) -> PrecisionGraph:
    """Graphs whose every field is drawn at random; only names are in order."""
    graph = PrecisionGraph(header=draw(st.dictionaries(names, st.text(max_size=6), max_size=2)))
    pool = draw(st.lists(names, min_size=1, max_size=12, unique=True))
    for name in pool[: draw(st.integers(0, 3))]:
        graph.add_input(draw(_any_value(name)))
    for name in pool[len(graph.inputs) :]:
        node = draw(_any_node(name, list(graph.values)))
        results = [draw(_any_value(f"{name}:{i}" if i else name)) for i in range(draw(st.integers(0, 2)))]
        graph.add(node, results)
    graph.outputs = draw(st.lists(st.sampled_from(sorted(graph.values)), max_size=3)) if graph.values else []
    return graph


@st.composite
def _any_value(draw: st.DrawFn, name: str) -> Value:
    limits = st.none() | st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False))
    return Value(name, draw(dtypes), draw(shapes), draw(st.integers(0, 99)), role=draw(st.sampled_from(
        ["input", "parameter", "buffer", "constant", "activation"])), range=draw(limits),
        alias=draw(st.just("") | names), scope=draw(st.just("") | names))  # fmt: skip


@st.composite
def _any_node(draw: st.DrawFn, name: str, known: list[str]) -> Node:
    inputs = draw(st.lists(st.sampled_from(known), max_size=3)) if known else []
    word = st.just("") | names
    return Node(
        id=draw(st.just(name) | st.just(f"{name}!")),
        op=draw(st.sampled_from(["aten.add.Tensor", "onnx::MatMul", "mp.cast"]) | names),
        inputs=inputs,
        slots=draw(st.lists(st.integers(0, 9), min_size=len(inputs), max_size=len(inputs))),
        attrs=draw(st.dictionaries(st.text(max_size=4), literals, max_size=2)),
        module=draw(word), source=draw(word), scope=draw(word), group=draw(word), kind=draw(word), reason=draw(word),
        phase=draw(st.sampled_from(["forward", "backward", "optimizer"])),
        flops=draw(st.integers(0, 10)),
        region=draw(st.sampled_from([None, "off", "bf16"])),
        out_dtype=draw(st.just("") | dtypes),
        verdict=draw(st.sampled_from(["", "low", "fp32", "propagate"])),
        precision=draw(st.sampled_from(["", "fp16", "bf16", "fp32", "keep"])),
        decided_by=draw(st.sampled_from(["rule", "override", "cost"])),
        operands=draw(st.dictionaries(st.integers(0, 3), st.sampled_from(["fp32", "any"]), max_size=2)),
        results=draw(st.dictionaries(st.integers(0, 1), st.just("fp32"), max_size=1)),
        origin=draw(st.sampled_from(["", "inserted", "existing", "shadow"])),
    )  # fmt: skip


@dataclass(frozen=True)
class Template:
    """One operation that graphs are made of; `out` is the dtype it gives ("": that of its first operand)."""

    op: str
    kind: str
    operands: int = 1
    out: str = ""
    shrink: int = 1  # elements: divided by this
    grow: int = 1  # elements: multiplied by this
    attrs: dict[str, Any] = field(default_factory=dict)


MATMUL = Template("aten.mm.default", "matmul", 2)
TEMPLATES = (
    MATMUL,
    Template("aten.add.Tensor", "elementwise", 2),
    Template("aten.relu.default", "elementwise"),
    Template("aten.mul.Tensor", "elementwise", attrs={"other": 3.0}),
    Template("aten.exp.default", "exponential"),
    Template("aten.softmax.int", "softmax", attrs={"dim": -1}),
    Template("aten.view.default", "shape"),
    Template("aten.slice.Tensor", "shape", shrink=4, attrs={"dim": 0}),
    Template("aten.expand.default", "shape", grow=4),
    Template("aten.to.dtype", "cast", out="fp32", attrs={"dtype": "fp32"}),
    Template("aten.to.dtype", "cast", out="bf16", attrs={"dtype": "bf16"}),
    Template("aten.to.dtype", "cast", out="int64", attrs={"dtype": "int64"}),
    Template("aten.argmax.default", "small-reduction", out="int64"),
    Template("aten.add_.Tensor", "elementwise", 2),
)


@st.composite
def front_end_graphs(draw: st.DrawFn, min_nodes: int = 1, max_nodes: int = 14) -> PrecisionGraph:
    """Graphs as a front end reads them: valid, with nothing decided."""
    graph = PrecisionGraph(header={"source": "fx"})
    for index in range(draw(st.integers(1, 3))):
        role = draw(st.sampled_from(["input", "parameter", "buffer"]))
        dtype = draw(st.sampled_from(["fp32", "fp32", "fp32", "int64", "fp64", "bf16"])) if role == "input" else "fp32"
        graph.add_input(Value(f"i{index}", dtype, (64,), 64, role=role))
    graph.add_input(Value("x", "fp32", (64,), 64, role="input"))
    for index in range(draw(st.integers(min_nodes, max_nodes))):
        _grow(draw, graph, f"n{index}")
    pool = sorted(graph.values)
    graph.outputs = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3))
    _close_storage(graph)
    return graph


def _grow(draw: st.DrawFn, graph: PrecisionGraph, name: str) -> None:
    template = draw(st.sampled_from(TEMPLATES))
    floats = sorted(n for n, v in graph.values.items() if v.castable)
    read = [draw(st.sampled_from(floats)) for _ in range(template.operands)]
    first = graph.values[read[0]]
    numel = max(1, first.numel // template.shrink) * template.grow
    node = Node(name, template.op, read, attrs=dict(template.attrs), module=draw(st.sampled_from(["a", "b.0", "b.1"])))
    if template.kind == "cast":
        node.out_dtype = template.out
    graph.add(node, [Value(name, template.out or first.dtype, (numel,), numel)])


def _close_storage(graph: PrecisionGraph) -> None:
    """What an in-place operation touches, and all its views, is one alias group."""
    owner: dict[str, str] = {}
    written = set()
    for node in graph.nodes.values():
        in_place = "_." in node.op
        if in_place or node.op.startswith(("aten.view", "aten.slice", "aten.expand")):
            owner[node.outputs[0]] = owner.get(node.inputs[0], node.inputs[0])
            if in_place:
                written.add(owner[node.outputs[0]])
    for name, value in graph.values.items():
        if owner.get(name, name) in written:
            value.alias = f"storage:{owner.get(name, name)}"


@st.composite
def decided_graphs(draw: st.DrawFn, low: str = "bf16", max_nodes: int = 14) -> PrecisionGraph:
    """Graphs after a lawful assignment that is otherwise random; every alias group has one precision."""
    graph = draw(front_end_graphs(max_nodes=max_nodes))
    kinds = {t.op: t.kind for t in TEMPLATES}
    storage = {v.alias: v.dtype for n in graph.inputs for v in [graph.values[n]] if v.alias}
    for node in graph.nodes.values():
        value = graph.values[node.outputs[0]]
        node.kind = kinds[node.op]
        wish = draw(st.sampled_from([low, "fp32"]))
        if value.alias:
            wish = storage.setdefault(value.alias, node.out_dtype or wish)
        if not value.castable:
            wish = "keep"
        _decide(node, value, wish, draw(st.booleans()))
    return graph


def _decide(node: Node, value: Value, wish: str, free: bool) -> None:
    node.precision = wish  # type: ignore[assignment]
    node.verdict = "propagate" if free or wish == "keep" else "fp32" if wish == "fp32" else "low"
    if value.castable:
        value.dtype = node.gives_at(0)


def floats_of(graph: PrecisionGraph) -> list[str]:
    return [name for name, value in graph.values.items() if value.dtype in CASTABLE]
