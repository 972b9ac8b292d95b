"""The text form of a precision graph: everything in it, compact, and read back by `mpcompile.parse.parse_graph`.

    graph source=fx device=cpu
    input x: fp32[8, s0]
    input w: fp32[4, 8] <role='parameter'>
    y: bf16[8, 4] = aten.linear.default(x_bf16, w_bf16) | low bf16 matmul rule 'tensor cores' @ head 'm.py:4'
    return y_fp32

A node's line is its outputs, op, operands (``2:b`` is b at slot 2), arguments, then after ``|`` verdict, precision,
kind, who decided and why, then ``@`` module and source line, then what is not as usual, as ``key=literal``.  Names
with odd characters are quoted.  Printing never fails: what a half-built graph lacks is printed as ``?``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from itertools import groupby
from typing import Any

from mpcompile.graph import Node, PrecisionGraph, Value

WORD = r"[A-Za-z_/$%.][\w./$%-]*(?:::[\w./$-]+)*"
_BARE = re.compile(WORD + r"\Z")
_NODE_LINE = {"id", "op", "inputs", "outputs", "slots", "attrs", "verdict", "precision", "kind", "decided_by", "reason",
              "module", "source"}  # fmt: skip
_VALUE_LINE = {"name", "dtype", "shape"}


@dataclass(frozen=True)
class Opaque:
    """An argument with no literal form (a torch dtype, a device): what is known of it is how it prints."""

    text: str

    def __repr__(self) -> str:
        return self.text


def print_graph(graph: PrecisionGraph, *, title: str = "", detail: str = "full", fold: int = 0) -> str:
    """The text of `graph`.

    Args:
      title: a comment for the first line, such as "after assign, 1.3 ms".
      detail: "full" (parses back), or "short" (no arguments, reasons or rare fields: for reading).
      fold: with a depth, runs of nodes of one module (its path cut to that depth) become one comment line each.
    """
    lines = [f"# {title}"] if title else []
    lines.append(" ".join(["graph", *(f"{_name(k)}={_name(v)}" for k, v in graph.header.items())]))
    given = set(graph.inputs)
    lines += [f"input {_value(graph, name)}" for name in graph.inputs]
    owned = {name for node in graph.nodes.values() for name in node.outputs}
    lines += [f"value {_value(graph, name)}" for name in graph.values if name not in given and name not in owned]
    if fold:
        lines += _folded(graph, fold)
    else:
        lines += [print_node(graph, node, detail=detail) for node in graph.nodes.values()]
    lines.append(f"return {', '.join(map(_name, graph.outputs))}".rstrip())
    return "\n".join(lines) + "\n"


def print_node(graph: PrecisionGraph, node: Node, *, detail: str = "full") -> str:
    """The line of one node."""
    outputs = ", ".join(_value(graph, name, node) for name in node.outputs)
    slots = node.slots if len(node.slots) == len(node.inputs) else range(len(node.inputs))
    operands = (
        _name(n) if i == s else f"{s}:{_name(n)}" for i, (n, s) in enumerate(zip(node.inputs, slots, strict=True))
    )
    call = f"{_name(node.op)}({', '.join(operands)})"
    line = f"{outputs} = {call}" if outputs else call
    short = detail == "short"
    if node.attrs and not short:
        line += f" {literal(node.attrs)}"
    if node.verdict or node.precision or node.kind or node.reason or node.decided_by != "rule":
        words = [_word(w) for w in (node.verdict, node.precision, node.kind, node.decided_by)]
        line += f" | {' '.join(words)}" + (f" {node.reason!r}" if node.reason and not short else "")
    if node.module or node.source:
        line += f" @ {_word(node.module)}" + (f" {node.source!r}" if node.source else "")
    return line if short else line + "".join(f" {k}={literal(v)}" for k, v in _rare(node))


def _rare(node: Node) -> Iterator[tuple[str, Any]]:
    """Fields of `node` that no fixed place of the line shows, where they are not as usual."""
    if not node.outputs or node.id != node.outputs[0]:
        yield "id", node.id
    for spec in fields(Node):
        if spec.name in _NODE_LINE:
            continue
        value = getattr(node, spec.name)
        usual = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        if value != usual:
            yield spec.name, value


def _value(graph: PrecisionGraph, name: str, node: Node | None = None) -> str:
    value = graph.values.get(name)
    if value is None:
        return f"{_name(name)}: ?"
    shape = ", ".join(_name(d) if isinstance(d, str) else str(d) for d in value.shape)
    rare = " ".join(f"{k}={literal(v)}" for k, v in _rare_value(value, node))
    return f"{_name(name)}: {_name(value.dtype)}[{shape}]" + (f" <{rare}>" if rare else "")


def _rare_value(value: Value, node: Node | None) -> Iterator[tuple[str, Any]]:
    usual = usual_fields(value.shape, node)
    for spec in fields(Value):
        if spec.name not in _VALUE_LINE and getattr(value, spec.name) != usual[spec.name]:
            yield spec.name, getattr(value, spec.name)


def usual_fields(shape: tuple[int | str, ...], node: Node | None) -> dict[str, Any]:
    """What the fields of a value are when its line does not say."""
    usual = {spec.name: spec.default for spec in fields(Value)}
    sizes = [d for d in shape if isinstance(d, int)]
    usual["numel"] = math.prod(sizes) if len(sizes) == len(shape) else 1
    usual["role"] = "activation" if node else "input"
    if node:
        usual.update(producer=node.id, scope=node.scope)
    return usual


def _folded(graph: PrecisionGraph, depth: int) -> Iterator[str]:
    for module, run in groupby(graph.nodes.values(), lambda n: ".".join(n.module.split(".")[:depth])):
        nodes = list(run)
        counts = Counter("cast" if n.is_cast else n.precision or n.verdict or "undecided" for n in nodes)
        parts = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        yield f"# {module or '(top)'}: {len(nodes)} nodes, {parts}"


def _name(word: str) -> str:
    """`word` as it stands in the text: quoted where the parser would not read it as one word."""
    return word if _BARE.match(word) else repr(word)


def _word(word: str) -> str:
    return _name(word) if word else "?"


def literal(value: Any) -> str:
    """`value` as a literal that `ast` reads; what has no literal form becomes ``obj('…')``."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(literal, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if value is None or type(value) in (bool, int, float, str, bytes):
        return repr(value)
    try:
        return f"obj({str(value)!r})"
    except Exception:  # a third party's __str__: printing never fails
        return f"obj({type(value).__name__!r})"


def diff(before: str, after: str, names: tuple[str, str] = ("before", "after")) -> str:
    """A unified diff of two texts ("" when equal); titles do not count."""
    old, new = ([line for line in text.splitlines() if not line.startswith("#")] for text in (before, after))
    return "\n".join(difflib.unified_diff(old, new, *names, lineterm="", n=1))
