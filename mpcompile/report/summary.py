"""The one line after compilation."""

from __future__ import annotations

from collections import Counter

from mpcompile.devices import device
from mpcompile.fp8 import LINEAR
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
    fast = _fp8(graph, policy)
    return (
        f"mpcompile: {len(nodes)} nodes ({precisions}){fast}; {len(casts)} casts, {shadows} of them shadows{warning}; "
        f"{policy}; {seconds:.3f} s"
    )


def _fp8(graph: PrecisionGraph, policy: Policy) -> str:
    """How many linear layers read FP8, and in how many of their products; why none does, where it is the device."""
    layers = [node for node in graph if node.op == LINEAR]
    reading = [len(node.fp8) for node in layers if node.fp8]
    if reading:
        return f"; FP8 in {sum(reading)} products of {len(reading)} of {len(layers)} linear layers"
    if policy.products != "fp8":
        return ""
    name = graph.header.get("device", "")
    if name and not device(name).fp8.get(policy.fp8):
        return f"; no FP8: the device {name} has no FP8 products, they stay BF16"
    return "; no FP8: nowhere worth its copies"
