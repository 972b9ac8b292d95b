"""Find a small set of nodes that must stay FP32 for the outputs to be right: sensitivity first, then bisection.

One run of the simulated model beside the FP32 one gives every node a sensitivity: how much more wrong its result is
than what it read.  The set is the smallest prefix of that order that is good enough (doubling, then bisection), thinned
by leaving out halves of it as long as the outputs stay good.  That is some tens of runs, whatever the number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mpcompile.formats import LOW
from mpcompile.graph import PrecisionGraph
from mpcompile.onnx.capture import OnnxCapture
from mpcompile.onnx.run.calibrate import Feeds, difference, values

Judge = Callable[[Sequence[str]], float]


def sensitivities(capture: OnnxCapture, graph: PrecisionGraph, simulated: ir.Model,
                  feeds: Sequence[Feeds]) -> list[str]:  # fmt: skip
    """Ids of the low nodes of the main graph, the most sensitive first.

    Args:
      graph: the plan.
      simulated: the plan written with FP32 operators and rounded results.
    """
    names = [name for node in capture.graph if not node.scope for name in node.outputs
             if capture.graph.values[name].dtype == "fp32" and capture.own(name)]  # fmt: skip
    want = next(values(capture, names, feeds[:1]))
    carriers = {name: _carriers(capture, graph, name) for name in names}
    got = next(values(capture, [key for keys in carriers.values() for key in keys], feeds[:1], simulated))
    off: dict[str, float] = {}
    for name, keys in carriers.items():
        key = next((key for key in keys if key in got), None)
        if key is not None:
            off[name] = _relative(got[key], want[name])
    scores: dict[str, float] = {}
    for node in capture.graph:
        if node.scope or graph.nodes[node.id].precision not in LOW:
            continue
        made = max((off.get(name, 0.0) for name in node.outputs), default=0.0)
        read = max((off.get(name, 0.0) for name in node.inputs), default=0.0)
        scores[node.id] = made - read
    return sorted(scores, key=lambda key: -scores[key])


def _carriers(capture: OnnxCapture, graph: PrecisionGraph, name: str) -> list[str]:
    """Names under which the simulation may hold `name`, rounded first."""
    dtype, own = graph.values[name].dtype, capture.own(name)
    return [f"{own}_{dtype}_rounded", own] if dtype in LOW else [own]


def _relative(got: Any, want: Any) -> float:
    error = difference("", got, want)
    return error.relative if np.isfinite(error.relative) else 1e30


def smallest(order: Sequence[str], judge: Judge, limit: float) -> list[str] | None:
    """A small set of `order` with ``judge(set) <= limit``; None when even all of them are not enough.

    >>> smallest(list("abcdef"), lambda kept: 0.0 if {"b", "c"} <= set(kept) else 1.0, 0.5)
    ['b', 'c']
    """
    if judge(()) <= limit:
        return []
    good = _prefix(order, judge, limit)
    return None if good is None else _thin(list(order[:good]), judge, limit)


def _prefix(order: Sequence[str], judge: Judge, limit: float) -> int | None:
    """Length of the shortest prefix that is good enough, found by doubling and bisection."""
    bad, good = 0, 1
    while judge(order[:good]) > limit:
        if good >= len(order):
            return None
        bad, good = good, min(2 * good, len(order))
    while good - bad > 1:
        middle = (good + bad) // 2
        bad, good = (bad, middle) if judge(order[:middle]) <= limit else (middle, good)
    return good


def _thin(kept: list[str], judge: Judge, limit: float) -> list[str]:
    """Leave out halves, quarters… of `kept` while the rest is good enough."""
    size = len(kept) // 2
    while size:
        start = 0
        while start < len(kept):
            rest = kept[:start] + kept[start + size :]
            if judge(rest) <= limit:
                kept = rest
            else:
                start += size
        size //= 2
    return kept
