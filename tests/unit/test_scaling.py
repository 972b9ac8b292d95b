"""The pipeline is linear in the graph: 10,000 nodes in about a second, 100,000 in about ten (the slow test)."""

from __future__ import annotations

import time

import pytest
from synthetic import layered

from mpcompile.passes.assign import Assign
from mpcompile.pipeline import run
from mpcompile.policy import Policy
from mpcompile.recipes import fx_passes


def seconds(nodes: int) -> tuple[float, float]:
    """CPU seconds of the whole pipeline, and of `assign` in it (wall: the same on a quiet machine)."""
    graph = layered(nodes)
    start = time.process_time()
    plan, records = run(graph, fx_passes(Policy("bf16")))
    spent = time.process_time() - start
    assert len(plan.casts()) > nodes // 50
    return spent, next(record.seconds for record in records if record.name == Assign.name)


def test_ten_thousand_nodes_take_about_a_second() -> None:
    # CPU time, the better of two: what is asked is 1 s on a quiet machine; the rest is room for a busy one.
    assert min(seconds(10_000)[0] for _ in range(2)) < 2.5


def test_twice_the_graph_takes_about_twice_the_time() -> None:
    seconds(1_000)
    small = min(seconds(2_000)[0] for _ in range(3))
    large = min(seconds(8_000)[0] for _ in range(2))
    # 4 when linear, 16 when quadratic.
    assert large / small < 9


@pytest.mark.slow
def test_a_hundred_thousand_nodes_take_ten_seconds() -> None:
    whole, _ = seconds(100_000)
    assert whole < 15
