"""Checkpoints: everything comes back, damage is an error, and a kill leaves the last good file."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpcompile.errors import TrainingError
from mpcompile.training.state import load_checkpoint, save_checkpoint

dtypes = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]
)
arrays = st.builds(
    lambda d, s: (torch.arange(s[0] * s[1]).reshape(s) % 3).to(d), dtypes, st.tuples(*[st.integers(0, 3)] * 2)
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
trees = st.recursive(
    plain | arrays,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@given(trees)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_any_plain_tree_round_trips(tmp_path, tree):
    save_checkpoint(tmp_path / "a", extra=tree)
    assert same(load_checkpoint(tmp_path / "a", rng=False), tree)


def test_infinities_and_views_and_ties_survive(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    save_checkpoint(tmp_path / "a", extra={"i": math.inf, "t": base.t(), "row": base[1], "again": base, "base": base})
    extra = load_checkpoint(tmp_path / "a")
    assert extra["i"] == math.inf
    assert torch.equal(extra["t"], base.t())
    assert torch.equal(extra["row"], base[1])
    assert extra["again"] is extra["base"]


def test_random_generators_go_on_where_they_were(tmp_path):
    save_checkpoint(tmp_path / "a")
    drawn = torch.rand(3).tolist(), random.random(), np.random.rand()
    load_checkpoint(tmp_path / "a")
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == drawn


def test_model_and_optimizer_come_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9))
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "a", model=model, optimizer=optimizer, extra={"epoch": 3})
    twin = torch.nn.Linear(3, 2)
    other = torch.optim.AdamW(twin.parameters())
    assert load_checkpoint(tmp_path / "a", model=twin, optimizer=other) == {"epoch": 3}
    assert same(dict(model.state_dict()), dict(twin.state_dict()))
    assert same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "missing", "lacks"])
def test_a_damaged_file_is_a_clear_error_and_touches_nothing(tmp_path, damage):
    path, model = tmp_path / "a", torch.nn.Linear(3, 2)
    save_checkpoint(path, model=model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-5])
    elif damage == "flip":
        content[-1] ^= 255
        path.write_bytes(content)
    elif damage == "foreign":
        path.write_bytes(b"PK\x03\x04 not ours")
    elif damage == "missing":
        path.unlink()
    wanted = {"optimizer": torch.optim.SGD(model.parameters(), 0.1)} if damage == "lacks" else {"model": model}
    with pytest.raises(TrainingError, match="MP511"):
        load_checkpoint(path, **wanted)
    assert same(before, dict(model.state_dict()))


def test_what_is_not_plain_is_refused_by_name(tmp_path):
    with pytest.raises(TrainingError, match=r"extra\.a\.1 is a Linear"):
        save_checkpoint(tmp_path / "a", extra={"a": [1, torch.nn.Linear(1, 1)]})
    with pytest.raises(TrainingError, match="MP512"):
        save_checkpoint(tmp_path / "a", extra={(1, 2): 3})
    assert not list(tmp_path.iterdir())


WRITER = """
import sys, torch
from mpcompile.training.state import save_checkpoint
number = 0
while True:
    save_checkpoint(sys.argv[1], extra={"number": number, "body": torch.full((200_000,), number)})
    print(number, flush=True)
    number += 1
"""


def test_kill_at_any_moment_leaves_the_last_good_one(tmp_path):
    path, draw = tmp_path / "a", random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "0\n"
        time.sleep(draw.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        printed = process.communicate()[0].split()
        extra = load_checkpoint(path)
        # What was reported written is on the disk; one more may have been renamed before the kill.
        assert extra["number"] in (last := int(printed[-1]) if printed else 0, last + 1)
        assert extra["body"].eq(extra["number"]).all()
