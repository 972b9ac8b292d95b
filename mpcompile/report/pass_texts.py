"""The graph's text before the passes and after each, line by line, every line that repeats once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpcompile.report.columns import Words
from mpcompile.text import print_graph, print_node

if TYPE_CHECKING:
    from mpcompile.graph import PrecisionGraph
    from mpcompile.pipeline import StepRecord
    from mpcompile.report.model import Report


def pass_texts(report: Report) -> dict[str, Any] | None:
    """The texts, by running the passes again; None where the report cannot.

    Returns:
      ``keys`` and ``lines``, each word once, and ``after``: for the graph as given and after each pass a flat list of key,
      line; None after a pass that changed nothing. A key names the node or the input that a line is of, so that lines of
      two texts can be matched.
    """
    if report.history is None:
        return None
    keys, lines, after = Words(), Words(), list[list[int] | None]()

    def note(graph: PrecisionGraph) -> list[int]:
        return [at for key, line in _lines(graph) for at in (keys.number(key), lines.number(line))]

    def observe(graph: PrecisionGraph, record: StepRecord) -> None:
        after.append(note(graph) if record.modified else None)

    after.append(note(report.history.graph))
    report.history.replay(observe)
    return {"keys": keys.to_list(), "lines": lines.to_list(), "after": after}


def _lines(graph: PrecisionGraph) -> Iterator[tuple[str, str]]:
    """(what the line is of, the line)."""
    given = {name: graph.values[name] for name in graph.inputs if name in graph.values}
    bare = replace(graph, nodes={}, values=given)
    *head, end = print_graph(bare).splitlines()
    yield from ((f" {line.partition(':')[0]}", line) for line in head)
    for node in graph:
        yield node.id, print_node(graph, node)
    yield " return", end
