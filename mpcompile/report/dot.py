"""A precision graph in Graphviz' language: one box per node, coloured by precision; casts are small diamonds."""

from __future__ import annotations

import json
from collections.abc import Iterator

from mpcompile.formats import FORMATS
from mpcompile.graph import Node, PrecisionGraph

FILL = {**{one.name: one.fill for one in FORMATS}, "keep": "#eeeeee"}


def dot(graph: PrecisionGraph) -> str:
    """The text; ``dot -Tsvg`` draws it."""
    lines = ['digraph plan {', '  node [shape=box, style=filled, fontname="sans-serif", fontsize=10];']  # fmt: skip
    lines += [f"  {_name(name)} [label={_name(name)}, shape=plain, fillcolor=white];" for name in _given(graph)]
    lines += [_box(node) for node in graph]
    lines += list(_edges(graph))
    return "\n".join([*lines, "}"]) + "\n"


def _given(graph: PrecisionGraph) -> list[str]:
    """Graph inputs that are not parameters: weights would hide the shape of the program."""
    return [name for name in graph.inputs if graph.values[name].role != "parameter"]


def _box(node: Node) -> str:
    if node.is_cast:
        return f"  {_name(node.id)} [label={_name(str(node.attrs['to']))}, shape=diamond, height=0.2, fillcolor=white];"
    label, fill = _name(f"{node.id}\n{node.op}\n{node.precision or '?'}"), _name(FILL.get(node.precision, "white"))
    return f"  {_name(node.id)} [label={label}, tooltip={_name(node.reason)}, fillcolor={fill}];"


def _edges(graph: PrecisionGraph) -> Iterator[str]:
    shown = set(_given(graph))
    for node in graph:
        for name in node.inputs:
            value = graph.values[name]
            source = value.producer or (name if name in shown else "")
            if source:
                yield f"  {_name(source)} -> {_name(node.id)} [label={_name(value.dtype)}, fontsize=8];"


def _name(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
