"""`step.log_to`: what is written, when it is read, and who may be the writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from mpcompile.api import mpcompile
from mpcompile.errors import MPCompileError
from mpcompile.tools.main import app
from mpcompile.training.step_log import writer_of


class Kept:
    def __init__(self) -> None:
        self.scalars, self.texts = list[tuple[str, float, int]](), list[tuple[str, str, int]]()

    def scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag.removeprefix("mpcompile/"), value, step))

    def text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))


def made(policy: str = "low=fp16,device=free-low", **options: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    mp = mpcompile(model, policy, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return mp.train_step(optimizer, lambda m, x: m(x).square().mean(), **options), model


def test_every_n_updates_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    step, _ = made()
    kept, results, reads = Kept(), [], []
    log = step.log_to(kept, every=3)
    whole = Tensor.tolist
    for number in range(7):
        results.append(step(torch.full((4, 8), float(number))))
        if number == 0:  # compiling reads what it likes
            monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(1) or whole(self))
        assert len(reads) == (number + 1) // 3
    log.read()
    assert [step for tag, _, step in kept.scalars if tag == "loss"] == [3, 6, 7]
    loss = [value for tag, value, _ in kept.scalars if tag == "loss"]
    assert loss[0] == pytest.approx(sum(float(one.loss) for one in results[:3]) / 3)
    assert loss[2] == pytest.approx(float(results[6].loss))
    norms = [value for tag, value, _ in kept.scalars if tag == "grad_norm"]
    assert norms[1] == pytest.approx(sum(float(one.grad_norm) for one in results[3:6]) / 3, rel=1e-5)
    assert {value for tag, value, _ in kept.scalars if tag == "skipped"} == {0.0}
    assert all(value > 0 for tag, value, _ in kept.scalars if tag == "step_seconds")
    assert kept.texts == []


def test_a_skipped_update_is_counted_and_explained() -> None:
    step, _ = made()
    kept = Kept()
    step.log_to(kept, every=2)
    step(torch.ones(4, 8))
    step(torch.full((4, 8), 1e30))
    assert [value for tag, value, _ in kept.scalars if tag == "skipped"] == [1.0]
    assert [value for tag, value, _ in kept.scalars if tag == "loss_scale"] == [32768.0]
    ((tag, text, number),) = kept.texts
    assert (tag, number) == ("mpcompile/overflow", 2)
    assert 'keep_fp32=["0"]' in text
    assert step.log_to(None) is None
    step(torch.ones(4, 8))
    step(torch.ones(4, 8))
    assert len(kept.scalars) == 5


def test_windows_count_as_one() -> None:
    step, _ = made(accumulate=3)
    kept = Kept()
    step.log_to(kept, every=1)
    for _ in range(6):
        step(torch.ones(4, 8))
    assert [number for tag, _, number in kept.scalars if tag == "loss"] == [1, 2]


def test_a_window_that_is_ended_early_counts() -> None:
    step, _ = made(accumulate=3)
    kept = Kept()
    step.log_to(kept, every=1)
    step(torch.full((4, 8), 1e30))
    step.end_window()
    assert [(value, number) for tag, value, number in kept.scalars if tag == "skipped"] == [(1.0, 1)]
    step.end_window()
    assert len(kept.scalars) == 5


def test_writers_of_others() -> None:
    got = list[Any]()

    class Board:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            got.append((tag, value, step))

        def add_text(self, tag: str, text: str, step: int) -> None:
            got.append((tag, text, step))

    class Flow:
        def log_metric(self, key: str, value: float, step: int | None = None) -> None:
            got.append((key, value, step))

        def set_tag(self, key: str, value: str) -> None:
            got.append((key, value))

    class Bias:
        def log(self, data: dict[str, Any], step: int | None = None) -> None:
            got.append((data, step))

    for kind in (Board, Flow, Bias):
        writer = writer_of(kind())
        writer.scalar("a", 1.5, 7)
        writer.text("b", "t", 7)
    assert got == [("a", 1.5, 7), ("b", "t", 7), ("a", 1.5, 7), ("b.7", "t"), ({"a": 1.5}, 7), ({"b": "t"}, 7)]
    with pytest.raises(MPCompileError, match="MP563"):
        writer_of(3)
    step, _ = made()
    with pytest.raises(MPCompileError, match="MP563"):
        step.log_to(Kept(), every=0)


def test_a_file_and_the_verb_that_shows_it(tmp_path: Path) -> None:
    step, _ = made()
    path = tmp_path / "run.jsonl"
    log = step.log_to(path, every=1)
    step(torch.ones(4, 8))
    step(torch.full((4, 8), 1e30))
    assert log is not None
    done = CliRunner().invoke(app, ["watch", str(path), "--json"])
    found = json.loads(done.stdout)
    assert (found["updates"], found["skipped"]) == (2, 1)
    assert found["last"]["loss_scale"] == 32768.0
    with path.open("a") as file:
        file.write('{"tag": "mpcompile/lo')  # another line is being written
    text = CliRunner().invoke(app, ["watch", str(path)]).stdout
    assert text.startswith("update 2, 1 skipped")
    assert "loss_scale" in text
    assert "update 2: " in text
    path.write_text("[1]\n")
    refused = CliRunner().invoke(app, ["watch", str(path)])
    assert refused.exit_code == 2
    assert "MP814" in refused.stderr
    assert CliRunner().invoke(app, ["watch", str(tmp_path / "absent")]).exit_code == 2


def test_a_file_of_other_bytes_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_bytes(b"\x00\xff\xfe\n")
    refused = CliRunner().invoke(app, ["watch", str(tmp_path / "run.jsonl"), "--once"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("MP814")
