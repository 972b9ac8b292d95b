"""One module of a report: what runs inside it in which precision, why, and the casts at its border."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mpcompile.formats import LOW
from mpcompile.report.columns import node_seconds
from mpcompile.report.costs import Estimate
from mpcompile.report.headline import main_reasons

if TYPE_CHECKING:
    from mpcompile.report.model import CastRow, NodeRow, Report

_PARTS = re.compile(r"(\{\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\}|\*)")
_REASONS = 3


def module_paths(report: Report) -> list[str]:
    """Every module that holds a node, and those above it, in the order of the graph."""
    paths: dict[str, None] = {}
    for row in report.nodes:
        paths |= dict.fromkeys(accumulate(row.module.split("."), "{}.{}".format) if row.module else ())
    return list(paths)


def inside(pattern: str) -> Callable[[str], bool]:
    """Whether a path is that of the module, or of one in it; numbers may be a range, as reports write them.

    >>> within = inside("h.{0-2}.mlp")
    >>> [within(path) for path in ("h.1.mlp", "h.2.mlp.0", "h.3.mlp", "h.1.mlps")]
    [True, True, False, False]
    """
    parts = _PARTS.split(pattern)
    match = re.compile("".join(map(_part, parts)) + r"(?:\..*)?").fullmatch
    wanted = [_numbers(part) for part in parts if part.startswith("{") and _PARTS.fullmatch(part)]

    def within(path: str) -> bool:
        found = match(path)
        return found is not None and all(
            any(int(number) in one for one in ranges) for number, ranges in zip(found.groups(), wanted, strict=True)
        )

    return within


def _part(text: str) -> str:
    if text == "*":
        return ".*"
    return r"(\d+)" if _PARTS.fullmatch(text) else re.escape(text)


def _numbers(text: str) -> list[range]:
    """ "{0-3,7}" as ranges."""
    ends = [one.partition("-") for one in text[1:-1].split(",")]
    return [range(int(first), int(last or first) + 1) for first, _, last in ends]


def module_facts(report: Report, pattern: str) -> dict[str, Any]:
    """All that is known of a module, or of several that a pattern names.

    Returns:
      ``{"module", "modules": the paths, "nodes", "precisions": {precision: {"nodes", "bytes", "flops", "seconds"}},
      "why": [{"precision", "reason", "nodes"}], "hazards": nodes, "casts": {"in", "out", "inside", "weights"},
      "cost": {precision: seconds of the whole plan with the module's nodes in it, "plan": as it is}}``.
      Seconds are estimates. Empty where the pattern names no module.
    """
    within = inside(pattern)
    paths = [path for path in module_paths(report) if within(path)]
    pairs = [(row, taken) for row, taken in zip(report.nodes, node_seconds(report), strict=True) if within(row.module)]
    if not paths or not pairs:
        return {}
    rows = [row for row, _ in pairs]
    whys = [
        {"precision": precision, "reason": one.text, "nodes": one.nodes}
        for precision in ("fp32", *LOW)
        for one in main_reasons(pairs, precision)[:_REASONS]
    ]
    return {
        "module": pattern, "modules": [path for path in paths if not within(path.rpartition(".")[0])], "nodes": len(rows),
        "precisions": _sums(pairs), "why": whys,
        "hazards": [{"node": row.id, "reason": row.reason} for row in rows if row.decided_by == "hazard"],
        "casts": _border(report, {row.id for row in rows}), "cost": _choices(report, rows),
    }  # fmt: skip


def _sums(pairs: Iterable[tuple[NodeRow, float]]) -> dict[str, dict[str, float]]:
    sums: dict[str, dict[str, float]] = {}
    for row, taken in pairs:
        one = sums.setdefault(row.precision, {"nodes": 0, "bytes": 0, "flops": 0, "seconds": 0.0})
        for key, more in (("nodes", 1), ("bytes", row.bytes), ("flops", row.flops), ("seconds", taken)):
            one[key] += more
    return dict(sorted(sums.items(), key=lambda item: -item[1]["nodes"]))


def _border(report: Report, ids: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    """The casts of values that come in, go out, stay inside, and those of weights (which are made once per update)."""
    found: dict[str, list[dict[str, Any]]] = {"in": [], "out": [], "inside": [], "weights": []}
    for cast in report.casts:
        if where := _side(report, cast, ids):
            found[where].append(cast.to_dict())
    return found


def _side(report: Report, cast: CastRow, ids: Collection[str]) -> str:
    value = report.graph.values[cast.value]
    reads = sum(reader in ids for reader in cast.readers)
    if value.role == "parameter" and not value.producer:
        return "weights" if reads else ""
    if value.producer in ids:
        return "inside" if reads == len(cast.readers) else "out"
    return "in" if reads else ""


def _choices(report: Report, rows: Iterable[NodeRow]) -> dict[str, float]:
    estimate = Estimate.of(report)
    low = estimate.policy.low if estimate.policy.low in LOW else "bf16"
    movable = [row.id for row in rows if row.precision in (low, "fp32")]
    if not movable:
        return {}
    return {
        "plan": report.summary["cost"]["plan"],
        **{precision: estimate.with_nodes(movable, precision) for precision in (low, "fp32")},
    }
