"""The example of several GPUs runs under torchrun, saves, and goes on alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--batch", "2", "--length", "32", "--width", "64", "--layers", "1", "--backend", "eager", "--accumulate", "2"]


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "update"])
def test_two_ranks_save_and_one_goes_on(shard: str, tmp_path: Path) -> None:
    script, saved = [str(ROOT / "examples" / "train_gpt.py"), str(ROOT / "README.md"), *SMALL], str(tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    first = run(*torchrun, *script, "--reduce", "low", "--shard", shard, "--steps", "12", "--save", saved)
    second = run(sys.executable, *script, "--steps", "24", "--resume", saved)
    told = [re.search(r"(\d+) ranks, ([\d,]+) tokens/s, .*loss ([\d.]+)$", text.strip()) for text in (first, second)]
    assert all(told)
    assert [one[1] for one in told if one] == ["2", "1"]
    losses = [float(one[3]) for one in told if one]
    assert 5.6 > losses[0] > losses[1]
