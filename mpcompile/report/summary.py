"""The one line after compilation."""

from __future__ import annotations

from collections import Counter

from mpcompile.graph import PrecisionGraph
from mpcompile.policy import Policy


def summary_line(graph: PrecisionGraph, policy: Policy, seconds: float) -> str:
    """How many nodes got which precision, how many casts, which ops are unknown, in how many seconds.

    >>> summary_line(PrecisionGraph(), Policy("bf16"), 0.01)
    'mpcompile: 0 nodes (none); 0 casts, 0 of them shadows; low=bf16,plan=global,output=fp32,grads=fp32; 0.010 s'
    """
    nodes = [node for node in graph if not node.is_cast]
    counts = Counter(node.precision or "undecided" for node in nodes)
    precisions = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
    casts = graph.casts()
    shadows = sum(cast.origin == "shadow" for cast in casts)
    unknown = sorted({node.op for node in nodes if node.decided_by == "unknown"})
    warning = f"; no rule for {', '.join(unknown)}" if unknown else ""
    return (
        f"mpcompile: {len(nodes)} nodes ({precisions}); {len(casts)} casts, {shadows} of them shadows{warning}; "
        f"{policy}; {seconds:.3f} s"
    )
