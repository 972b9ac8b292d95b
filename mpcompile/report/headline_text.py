"""The headline of a report as lines for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpcompile.report.columns import node_seconds
from mpcompile.report.headline import Share, headline

if TYPE_CHECKING:
    from mpcompile.report.model import Report

_HAZARDS = 5


def headline_lines(report: Report) -> list[str]:
    """What runs in which precision, what is FP32 and why, hazards, operations without a rule."""
    head = headline(report, node_seconds(report))
    lines = [f"{share.name}: {_spread(share)}" for share in head.shares if share.name != "time" and share.total]
    lines += [f"FP32, {_nodes(one.nodes)}: {one.text or 'no reason given'}" for one in head.why]
    if head.more:
        lines.append(f"FP32, {_nodes(head.more)} more, for other reasons")
    if head.hazards:
        more = f" and {len(head.hazards) - _HAZARDS} more" if len(head.hazards) > _HAZARDS else ""
        lines.append(f"hazards: {', '.join(head.hazards[:_HAZARDS])}{more} (--hazards)")
    if head.unknown_ops:
        lines.append(f"no rule for: {', '.join(head.unknown_ops)}")
    return lines


def _spread(share: Share) -> str:
    return ", ".join(f"{share.fraction(name):.0%} {name}" for name in share.amounts)


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count != 1)}"
