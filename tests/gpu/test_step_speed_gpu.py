"""The training step is not slower than the drop-in: GPT-2 by hand, both regimes, rounds alternating in one process."""

from __future__ import annotations

import pytest

from mpcompile import Policy
from mpcompile.tools import bench_run
from mpcompile.tools.bench_loops import Job
from mpcompile.tools.bench_models import WORKLOADS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["gpt2-by-hand", "gpt2-by-hand-1x256"])
def test_the_step_is_not_slower(name: str) -> None:
    workload = WORKLOADS[name](True)
    job = Job(workload, "cuda", Policy.parse("bf16"), workload.rows, 1)
    plan = bench_run.BenchSettings(rounds=7, check=3, max_seconds=200.0)
    _, step = bench_run.measure(job, ["mpcompile", "mpcompile step"], plan, print)
    assert not step.error
    # What rounds of one candidate differ by.
    assert step.versus["mpcompile"] > 0.98
