"""Other ways to look at a report than by node: by module, by operation, its casts, its hazards."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpcompile.errors import printable
from mpcompile.report import quantities
from mpcompile.report.columns import node_seconds
from mpcompile.report.tree import Branch, folded_tree

if TYPE_CHECKING:
    from mpcompile.report.model import Report

WIDTH = 160
# Columns of the tables, and how their numbers read.
_HOW: dict[str, Callable[[Any], str]] = {
    "bytes": quantities.size,
    "seconds": quantities.seconds,
    "flops": lambda value: f"{value:.3g}" if value else "-",
    "times": lambda value: f"{value} x" if value > 1 else "",
    "nodes": lambda value: f"{value:,}",
    "readers": lambda names: ", ".join(names[:4]) + (f", {len(names) - 4} more" if len(names) > 4 else ""),
    "precision": lambda counts: ", ".join(f"{count:,} {name}" for name, count in counts.items()),
    "ranges": lambda found: ", ".join(f"{name} in [{low:.3g}, {high:.3g}]" for name, (low, high) in found.items()),
}
_RIGHT = frozenset({"bytes", "seconds", "flops", "times", "nodes"})


def by_module(report: Report, depth: int, sort: str = "") -> list[dict[str, Any]]:
    """Modules down to `depth` (0: the whole), each with the sums of what is below; blocks that repeat are one row.

    Returns:
      ``{"depth", "module": the last piece of its path, "times": how often it stands in the row above, "modules": paths,
      "nodes", "precision": {name: nodes}, "bytes", "flops", "seconds"}``; sums are over all that a row stands for.
    """
    root = folded_tree(report.nodes, node_seconds(report))
    return list(_branches(root, 0, 1, depth, sort))


def _branches(branch: Branch, at: int, above: int, depth: int, sort: str) -> Iterator[dict[str, Any]]:
    nodes, size, flops, seconds = (sum(one[i] for one in branch.sums.values()) for i in range(4))
    counts = {name: int(one[0]) for name, one in sorted(branch.sums.items(), key=lambda item: -item[1][0])}
    yield {
        "depth": at, "module": branch.name, "times": len(branch.modules) // above, "modules": branch.modules,
        "nodes": int(nodes), "precision": counts, "bytes": int(size), "flops": int(flops), "seconds": seconds,
    }  # fmt: skip
    if at == depth:
        return
    below = [list(_branches(one, at + 1, len(branch.modules), depth, sort)) for one in branch.below.values()]
    for rows in sorted(below, key=lambda rows: _key(sort, "module")(rows[0])) if sort else below:
        yield from rows


def by_operation(report: Report, sort: str = "") -> list[dict[str, Any]]:
    """``{"op", "nodes", "precision": {name: nodes}, "bytes", "flops", "seconds"}`` of each operation, most nodes first."""
    found: dict[str, dict[str, Any]] = {}
    for row, taken in zip(report.nodes, node_seconds(report), strict=True):
        one = found.setdefault(
            row.op, {"op": row.op, "nodes": 0, "precision": Counter(), "bytes": 0, "flops": 0, "seconds": 0.0}
        )
        one["precision"][row.precision] += 1
        for name, more in (("nodes", 1), ("bytes", row.bytes), ("flops", row.flops), ("seconds", taken)):
            one[name] += more
    for one in found.values():
        one["precision"] = dict(one["precision"].most_common())
    return sorted(found.values(), key=_key(sort or "nodes", "op"))


def casts(report: Report, sort: str = "") -> list[dict[str, Any]]:
    """The casts that the rows read or make, largest first (by name under `sort` "name"), in the report's own fields."""
    ids = {row.id for row in report.nodes}
    made = {name for node in report.graph if node.id in ids for name in node.outputs}
    found = [cast.to_dict() for cast in report.casts if cast.value in made or ids & set(cast.readers)]
    return sorted(found, key=_key("name" if sort == "name" else "bytes", "value"))


def hazards(report: Report, sort: str = "") -> list[dict[str, Any]]:
    """``{"node", "op", "module", "source", "reason", "ranges": of what it reads, "bytes", "seconds"}`` of each node that a
    hazard keeps FP32; the reason has the numbers.
    """
    graph = report.graph
    found = [
        {"node": row.id, "op": row.op, "module": row.module, "source": row.source, "reason": row.reason,
         "ranges": {name: span for name in row.inputs if name in graph.values and (span := graph.values[name].range)},
         "bytes": row.bytes, "flops": row.flops, "seconds": taken}
        for row, taken in zip(report.nodes, node_seconds(report), strict=True) if row.decided_by == "hazard"
    ]  # fmt: skip
    return sorted(found, key=_key(sort, "node")) if sort else found


def _key(sort: str, name: str) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    if sort == "name":
        return lambda row: (row[name],)
    column = {"cost": "seconds"}.get(sort, sort)
    return lambda row: (-row.get(column, 0), row[name])


def modules_text(rows: Sequence[dict[str, Any]]) -> str:
    shown = [{**row, "module": "  " * row["depth"] + row["module"]} for row in rows]
    folded = any(row["times"] > 1 for row in rows)
    note = "a row's numbers are the sums of all that it stands for\n" if folded else ""
    return table(shown, ("times", "module", "nodes", "precision", "bytes", "flops", "seconds")) + note


def operations_text(rows: Sequence[dict[str, Any]]) -> str:
    return table(rows, ("op", "nodes", "precision", "bytes", "flops", "seconds"))


def casts_text(rows: Sequence[dict[str, Any]]) -> str:
    text = table(rows, ("value", "from", "to", "bytes", "origin", "readers"))
    sums: dict[str, list[int]] = {}
    for row in rows:
        sums.setdefault(row["origin"], []).append(row["bytes"])
    said = [f"{len(sizes):,} {'yours' if name == 'existing' else name} ({quantities.size(sum(sizes))})"
            for name, sizes in sums.items()]  # fmt: skip
    return text + (f"{', '.join(said)}\n" if said else "")


def hazards_text(rows: Sequence[dict[str, Any]]) -> str:
    return table(rows, ("node", "op", "module", "bytes", "reason", "ranges", "source"))


def table(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> str:
    """The columns `names` of `rows` as plain text; "none" without rows, and no column that is empty throughout."""
    lines = [[_HOW.get(name, str)(row[name]) for name in names] for row in rows]
    if not lines:
        return "none\n"
    made = Table(box=None, pad_edge=False)
    kept = [at for at in range(len(names)) if any(line[at] for line in lines)]
    for at in kept:
        made.add_column(names[at], justify="right" if names[at] in _RIGHT else "left", overflow="fold")
    for line in lines:
        made.add_row(*(Text(printable(line[at]).replace("\n", "\\n")) for at in kept))
    out = io.StringIO()
    Console(
        file=out, width=WIDTH, highlight=False, force_terminal=False, color_system=None, emoji=False, markup=False
    ).print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
