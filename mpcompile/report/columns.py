"""A report as columns, small enough for one page: every word that repeats is stored once.

What comes out is JSON and nothing else; `web/data.js` reads it.  Values and casts stand beside the nodes, so that the
page can draw what a node reads and who reads it, casts and all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mpcompile.graph import Node, PrecisionGraph
from mpcompile.report.costs import Estimate
from mpcompile.report.tree import module_tree

if TYPE_CHECKING:
    from mpcompile.report.model import CastRow, Report

# Fields of a node that are words; all but the first repeat.
WORDS = ("op", "kind", "phase", "verdict", "precision", "reason", "decided_by", "module", "source", "was")


class Words:
    """Words and their numbers, in the order in which they came."""

    def __init__(self) -> None:
        self._at: dict[str, int] = {}

    def number(self, word: str) -> int:
        return self._at.setdefault(word, len(self._at))

    def __len__(self) -> int:
        return len(self._at)

    def to_list(self) -> list[str]:
        return list(self._at)


def packed(words: Iterable[str]) -> dict[str, list[Any]]:
    """``{"words": each once, "at": its number at each place}``."""
    pool = Words()
    at = [pool.number(word) for word in words]
    return {"words": pool.to_list(), "at": at}


def page_data(report: Report, seconds: Sequence[float]) -> dict[str, Any]:
    """All that the page's script reads.

    Args:
      seconds: of each row of `report.nodes`, as `node_seconds` gives them.
    """
    nodes: dict[str, Any] = {"id": [row.id for row in report.nodes]}
    nodes |= {name: packed(getattr(row, name) for row in report.nodes) for name in WORDS}
    nodes |= {
        "bytes": [row.bytes for row in report.nodes],
        "flops": [row.flops for row in report.nodes],
        "seconds": [rounded(one) for one in seconds],
    }
    return {
        "fp8": {at: report.graph.nodes[row.id].fp8 for at, row in enumerate(report.nodes)
                if row.id in report.graph.nodes and report.graph.nodes[row.id].fp8},
        "policy": report.policy, "code": [report.code.get(place, "") for place in nodes["source"]["words"]],
        "nodes": nodes, "casts": _casts(report.casts), "values": _links(report),
        "tree": module_tree(report.nodes, seconds, nodes["module"]["words"]),
    }  # fmt: skip


def rounded(seconds: float) -> float:
    """Three digits: an estimate has no more."""
    return float(f"{seconds:.3g}")


def node_seconds(report: Report) -> list[float]:
    """What each row of the report is estimated to take: its matrix work, and the bytes of its results."""
    if not report.graph.nodes:
        return [0.0] * len(report.nodes)
    parts = Estimate.of(report).parts()
    made = {node.id: node.outputs for node in report.graph}
    moved = parts.moved
    return [
        parts.work.get(row.id, 0.0) + sum([moved.get(name, 0.0) for name in made.get(row.id, ())])
        for row in report.nodes
    ]


def _casts(casts: Sequence[CastRow]) -> dict[str, Any]:
    return {
        "value": [cast.value for cast in casts],
        "from": packed(cast.from_ for cast in casts),
        "to": packed(cast.to for cast in casts),
        "origin": packed(cast.origin for cast in casts),
        "readers": [list(cast.readers) for cast in casts],
        "bytes": [cast.bytes for cast in casts],
    }


def _links(report: Report) -> dict[str, Any]:
    """The values that nodes read, and who reads them how.

    ``name`` is empty where it is the maker's; ``maker`` is the row that makes the value, or -1; ``reads`` is flat: row,
    value, cast (-1 for none), for each operand; ``returned`` lists values that the graph returns, each with its cast.
    """
    graph = report.graph
    rows = {row.id: at for at, row in enumerate(report.nodes)}
    casts = {(cast.value, cast.to): at for at, cast in enumerate(report.casts)}
    pool, reads = Words(), list[int]()
    for row, at in rows.items():
        if row in graph.nodes:
            for name in dict.fromkeys(graph.nodes[row].inputs):
                root, cast = through_casts(graph, name)
                reads += at, pool.number(root), casts.get(cast, -1) if cast else -1
    returned = [[pool.number(root), casts.get(cast, -1) if cast else -1]
                for root, cast in (through_casts(graph, name) for name in graph.outputs)]  # fmt: skip
    values = [graph.values[name] for name in pool.to_list()]
    return {
        "name": ["" if value.producer == value.name else value.name for value in values],
        "maker": [rows.get(value.producer, -1) for value in values],
        "role": packed(value.role for value in values),
        "type": packed(f"{value.dtype}[{', '.join(map(str, value.shape))}]" for value in values),
        "origin": packed(value.origin for value in values),
        "bytes": [value.bytes for value in values],
        "reads": reads,
        "returned": returned,
    }


def through_casts(graph: PrecisionGraph, name: str) -> tuple[str, tuple[str, str] | None]:
    """The value that `name` is a cast of, and that cast's value and dtype; the value itself when it is none."""
    cast: tuple[str, str] | None = None
    maker: Node | None = graph.producer(name)
    while maker is not None and maker.is_cast and maker.inputs:
        cast = cast or (maker.inputs[0], graph.values[name].dtype)
        name = maker.inputs[0]
        maker = graph.producer(name)
    return name, cast


__all__ = ["node_seconds", "packed", "page_data", "rounded", "through_casts"]
