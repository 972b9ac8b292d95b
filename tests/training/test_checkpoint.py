"""Checkpoints: everything comes back, damage is an error, and a kill leaves the last good file."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mpcompile import mpcompile
from mpcompile.errors import TrainingError
from mpcompile.training import checkpoint_file
from mpcompile.training.checkpoint_file import load_checkpoint, save_checkpoint

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


def test_any_flipped_bit_is_seen(tmp_path):
    path, draw = tmp_path / "a", random.Random(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(path, model=model, optimizer=optimizer, extra={"epoch": 3})
    content = path.read_bytes()
    body = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(8), *draw.sample(range(8, body), 300), *range(body, len(content), 7)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(TrainingError, match="MP511"):
            load_checkpoint(path, model=model, optimizer=optimizer)


def test_what_does_not_fit_touches_nothing(tmp_path):
    model, path = torch.nn.Linear(3, 2), tmp_path / "a"
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    save_checkpoint(path, model=model, optimizer=optimizer)
    twin = torch.nn.Linear(3, 2)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    with pytest.raises(TrainingError, match=r"MP514(.|\n)*parameter group"):
        load_checkpoint(path, model=twin, optimizer=torch.optim.SGD([twin.weight], 0.2))
    assert same(before, dict(twin.state_dict()))
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    third = torch.optim.SGD(other[0].parameters(), 0.5)
    with pytest.raises(TrainingError, match=r"MP514(.|\n)*0\.bias"):
        load_checkpoint(path, model=other, optimizer=third)
    assert third.param_groups[0]["lr"] == 0.5


def test_a_full_disk_is_a_clear_error_and_the_last_file_stays(tmp_path):
    resource = pytest.importorskip("resource")
    save_checkpoint(tmp_path / "a", extra=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(TrainingError, match="MP513"):
            save_checkpoint(tmp_path / "a", extra=torch.zeros(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(tmp_path / "a") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(TrainingError, match="MP513"):
        save_checkpoint(tmp_path / "none" / "a", extra=1)


def test_several_writers_of_one_path_leave_a_whole_file(tmp_path):
    path = tmp_path / "a"

    def write(number):
        for _ in range(10):
            save_checkpoint(path, extra={"number": number, "body": torch.full((50_000,), number)})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    extra = load_checkpoint(path)
    assert extra["body"].eq(extra["number"]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("make", [dict, lambda: torch.optim.SGD([torch.ones(2, requires_grad=True)], 0.1)])
def test_schedulers_and_numpy_numbers_are_plain(tmp_path, make):
    made = make()
    states = {"best": np.float32(0.5), "step": np.int64(3)}
    if made:
        one = torch.optim.lr_scheduler
        first = one.SequentialLR(made, [one.LinearLR(made), one.CosineAnnealingLR(made, 5)], [2])
        states |= {type(s).__name__: s.state_dict() for s in (first, one.OneCycleLR(made, 0.1, total_steps=9),
                   one.ReduceLROnPlateau(made), one.LambdaLR(made, lambda e: 0.9**e))}  # fmt: skip
    save_checkpoint(tmp_path / "a", extra=states)
    loaded = load_checkpoint(tmp_path / "a")
    assert same(loaded, {**states, "best": 0.5, "step": 3})


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_dense_data_are_refused(tmp_path, tensor):
    with pytest.raises(TrainingError, match=r"MP512(.|\n)*extra\.x"):
        save_checkpoint(tmp_path / "a", extra={"x": tensor})


def test_what_is_not_plain_is_refused_by_name(tmp_path):
    with pytest.raises(TrainingError, match=r"extra\.a\.1 is a Linear"):
        save_checkpoint(tmp_path / "a", extra={"a": [1, torch.nn.Linear(1, 1)]})
    with pytest.raises(TrainingError, match="MP512"):
        save_checkpoint(tmp_path / "a", extra={(1, 2): 3})
    assert not list(tmp_path.iterdir())


def test_paths_that_read_alike_hold_their_own_tensors(tmp_path):
    tree = {
        "a.b": torch.zeros(2), "a": {"b": torch.ones(2), "1": torch.full((2,), 2.0), 1: torch.full((2,), 3.0)},
        "a.b#2": torch.full((2,), 4.0), "c": [torch.full((2,), 5.0)], "c.0": torch.full((2,), 6.0), None: torch.full((2,), 7.0),
        "None": torch.full((2,), 8.0),
    }  # fmt: skip
    save_checkpoint(tmp_path / "a", extra=tree)
    assert same(load_checkpoint(tmp_path / "a"), tree)


def test_conjugates_and_negatives_are_their_own(tmp_path):
    """They share their storage with another, and what is made of them to be written goes at once."""
    base = torch.complex(torch.arange(6.0), torch.arange(6.0) + 1).reshape(2, 3)
    tree = {
        "t": base.t(),
        "conj": base.t().conj(),
        "imag": base.conj().imag,
        "rest": [base[:, i].conj() for i in range(3)],
    }
    save_checkpoint(tmp_path / "a", extra=tree)
    loaded = load_checkpoint(tmp_path / "a")
    for name in ("t", "conj", "imag"):
        assert torch.equal(loaded[name], tree[name].resolve_conj().resolve_neg()), name
    assert all(torch.equal(a, b.resolve_conj()) for a, b in zip(loaded["rest"], tree["rest"], strict=True))


def test_tensors_of_a_type_that_the_file_does_not_know_are_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"MP512(.|\n)*extra\.x"):
        save_checkpoint(tmp_path / "a", extra={"x": torch.zeros(2, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


def rewritten(path, change):
    """The file with another table of contents, whose digest is right."""
    with safe_open(path, framework="pt") as file:
        words, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    words = change(dict(words), tensors) or words
    facts = {key: checkpoint_file._facts(tensor) for key, tensor in tensors.items()}
    words.setdefault("tensors", json.dumps(facts))
    save_file(tensors, path, {**words, "digest": checkpoint_file._digest(words)})


def with_tree(change):
    def changed(words, _):
        tree = json.loads(words["tree"])
        return {**words, "tree": json.dumps(change(dict(tree["dict"])))}

    return changed


def entry(name, value):
    return with_tree(lambda parts: {"dict": [[k, value if k == name else v] for k, v in parts.items()]})


def rng_entry(name, value):
    return with_tree(lambda parts: {"dict": [
        [k, v if k != "rng" else {"dict": [[n, value if n == name else w] for n, w in v["dict"]]}] for k, v in parts.items()
    ]})  # fmt: skip


FORGED = {
    "no tree": lambda w, _: {k: v for k, v in w.items() if k != "tree"},
    "no facts": lambda w, _: {**w, "tensors": ""},
    "facts are a list": lambda w, _: {**w, "tensors": "[]"},
    "facts are a number": lambda w, _: {**w, "tensors": "3"},
    "facts know less": lambda w, _: {**w, "tensors": "{}"},
    "facts know more": lambda w, _: {**w, "tensors": json.dumps({**json.loads(w["tensors"]), "x": ["a", [1], 2]})},
    "tree is no JSON": lambda w, _: {**w, "tree": "{"},
    "tree is a number": lambda w, _: {**w, "tree": "7"},
    "tree is null": lambda w, _: {**w, "tree": "null"},
    "tree is a list": lambda w, _: {**w, "tree": '{"list": []}'},
    "tree is empty": lambda w, _: {**w, "tree": "{}"},
    "two kinds": lambda w, _: {**w, "tree": '{"dict": [], "list": []}'},
    "an unknown kind": lambda w, _: {**w, "tree": '{"set": [1]}'},
    "a tensor that is not there": entry("extra", {"tensor": "nowhere"}),
    "a tensor of a list": entry("extra", {"tensor": [1]}),
    "a dict of numbers": entry("extra", {"dict": [1, 2]}),
    "a dict of null": entry("extra", {"dict": None}),
    "a key that cannot be one": entry("extra", {"dict": [[[1], 2]]}),
    "a list of null": entry("extra", {"list": None}),
    "deep": lambda w, _: {**w, "tree": '{"list": [' * 100_000 + "]}" * 100_000},
    "a large number": lambda w, _: {**w, "tree": "9" * 100_000},
    "no extra": with_tree(lambda parts: {"dict": [[k, v] for k, v in parts.items() if k != "extra"]}),
    "no rng": with_tree(lambda parts: {"dict": [[k, v] for k, v in parts.items() if k != "rng"]}),
    "rng is null": entry("rng", None),
    "rng lacks numpy": rng_entry("numpy", None),
    "rng of python is short": rng_entry("python", {"tuple": [3, {"tuple": [1, 2]}, None]}),
    "rng of torch is a word": rng_entry("torch", "x"),
    "rng of torch is another tensor": rng_entry("torch", {"tensor": "model.weight"}),
    "model is a number": entry("model", 3),
    "model is a list": entry("model", {"list": []}),
    "model holds numbers": entry("model", {"dict": [["weight", 1], ["bias", 2]]}),
    "model has keys of numbers": entry("model", {"dict": [[1, 1]]}),
    "optimizer is null": entry("optimizer", None),
    "optimizer has no groups": entry("optimizer", {"dict": [["state", {"dict": []}]]}),
    "optimizer's groups are numbers": entry("optimizer", {"dict": [["state", 1], ["param_groups", {"list": [1]}]]}),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_table_of_contents_is_a_coded_error_and_touches_nothing(tmp_path, forgery):
    path, model = tmp_path / "a", torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(path, model=model, optimizer=optimizer, extra={"epoch": 3})
    rewritten(path, FORGED[forgery])
    with torch.no_grad():
        model.weight.add_(1.0)
    optimizer.param_groups[0]["lr"] = 0.5
    before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))
    drawn = torch.get_rng_state(), random.getstate()
    with pytest.raises(TrainingError, match=r"MP51[14]"):
        load_checkpoint(path, model=model, optimizer=optimizer)
    assert same(before, (dict(model.state_dict()), optimizer.state_dict()))
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert drawn[1] == random.getstate()


def test_a_model_whose_own_loading_fails_half_way_is_put_back(tmp_path):
    class Picky(torch.nn.Linear):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)
            if self.weight.sum() > 0:
                raise ArithmeticError("positive")

    model = Picky(3, 2)
    torch.nn.init.ones_(model.weight)
    save_checkpoint(tmp_path / "a", model=model)
    torch.nn.init.constant_(model.weight, -1.0)
    with pytest.raises(TrainingError, match=r"MP514(.|\n)*ArithmeticError: positive"):
        load_checkpoint(tmp_path / "a", model=model)
    assert model.weight.eq(-1.0).all()


WRITER = """
import sys, torch
from mpcompile.training.checkpoint_file import save_checkpoint
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
    save_checkpoint(path, extra=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("window", [{"count": 1, "sums": {}}, {"count": 2, "sums": {"weight": torch.ones(2, 2)}},
                                    {"count": 1, "sums": {"other": torch.ones(2, 2)}}])  # fmt: skip
def test_an_open_window_that_does_not_fit_is_refused(window):
    """As torch.distributed.checkpoint leaves it, in a step that never ran: a count without sums."""
    model = torch.nn.Linear(2, 2)
    step = mpcompile(model, "bf16", backend="eager").train_step(torch.optim.SGD(model.parameters(), 0.1), accumulate=2)
    before = step.state_dict()
    with pytest.raises(TrainingError, match="MP514"):
        step.load_state_dict({**before, "window": window})
    assert str(step.state_dict()) == str(before)
