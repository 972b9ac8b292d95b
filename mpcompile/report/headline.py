"""The few numbers that a report opens with: what runs in which precision, what is FP32 and why, what needs a look."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpcompile.formats import LOW

if TYPE_CHECKING:
    from mpcompile.report.model import NodeRow, Report

# Names and sizes differ between reasons that say the same.
_VARIES = re.compile(r"[`']\S+[`']|\b(?!fp\d|bf16)[a-z]\w*\d\b|\b\d[\d,.]*\d|\b\d")
_REASONS = 3


@dataclass(frozen=True)
class Share:
    """How one quantity is spread over the precisions: {precision: amount}, largest first."""

    name: str
    amounts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.amounts.values())

    def fraction(self, precision: str) -> float:
        return self.amounts.get(precision, 0.0) / self.total if self.total else 0.0


@dataclass(frozen=True)
class Why:
    """Nodes that have their precision for one reason: the reasons' texts (which differ in names and sizes), nodes, seconds."""

    text: str
    reasons: tuple[str, ...]
    nodes: int
    seconds: float


@dataclass(frozen=True)
class Headline:
    """What a report opens with.

    Fields:
      shares: of nodes, FLOPs, bytes and seconds.
      why: the main reasons for FP32, by seconds, then by nodes; `more` nodes are FP32 for others.
      hazards: names of the nodes that a hazard decided.
    """

    shares: tuple[Share, ...]
    why: tuple[Why, ...]
    more: int
    hazards: tuple[str, ...]
    unknown_ops: tuple[str, ...]

    @property
    def low(self) -> tuple[str, float]:
        """(precision, its fraction of the FLOPs, or of the nodes where there are none) of what is low."""
        share = next((s for s in self.shares if s.name == "FLOPs" and s.total), self.shares[0])
        found = {name: share.fraction(name) for name in share.amounts if name in LOW}
        return max(found.items(), key=lambda item: item[1], default=("fp32", share.fraction("fp32")))


def headline(report: Report, seconds: Sequence[float]) -> Headline:
    """The headline of `report`, whose rows take `seconds`."""
    rows = report.nodes
    why = main_reasons(zip(rows, seconds, strict=True))
    return Headline(
        shares=(
            _share("nodes", rows, [1.0] * len(rows)),
            _share("FLOPs", rows, [float(row.flops) for row in rows]),
            _share("bytes", rows, [float(row.bytes) for row in rows]),
            _share("time", rows, seconds),
        ),
        why=tuple(why[:_REASONS]),
        more=sum(one.nodes for one in why[_REASONS:]),
        hazards=tuple(row.id for row in rows if row.decided_by == "hazard"),
        unknown_ops=tuple(report.summary["unknown_ops"]),
    )


def _share(name: str, rows: Sequence[NodeRow], amounts: Sequence[float]) -> Share:
    sums: dict[str, float] = {}
    for row, amount in zip(rows, amounts, strict=True):
        sums[row.precision] = sums.get(row.precision, 0.0) + amount
    return Share(name, {key: sums[key] for key in sorted(sums, key=lambda key: (-sums[key], key)) if sums[key]})


def main_reasons(rows: Iterable[tuple[NodeRow, float]], precision: str = "fp32") -> list[Why]:
    """The reasons of the rows of one precision (each with its seconds), by seconds, then by nodes."""
    return sorted(_reasons(rows, precision), key=lambda one: (-one.seconds, -one.nodes, one.text))


def _reasons(rows: Iterable[tuple[NodeRow, float]], precision: str) -> Iterable[Why]:
    """Those that differ in names and sizes alone as one."""
    groups: dict[str, list[tuple[NodeRow, float]]] = {}
    for row, taken in rows:
        if row.precision == precision:
            groups.setdefault(_VARIES.sub("…", row.reason), []).append((row, taken))
    for text, members in groups.items():
        reasons = tuple(dict.fromkeys(row.reason for row, _ in members))
        yield Why(reasons[0] if len(reasons) == 1 else text, reasons, len(members), sum(taken for _, taken in members))
