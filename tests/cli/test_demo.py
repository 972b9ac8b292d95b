"""The demo's parts, and (slow) the demo."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mpcompile import hardware, mpcompile
from mpcompile.tools import demo
from mpcompile.tools.corpus import batches, stdlib_bytes
from mpcompile.tools.gpt import ByteGPT
from mpcompile.tools.main import app
from mpcompile.tools.measure import Clock, peak_bytes, saved_for_backward

OUTCOME = demo.Outcome(
    policy="low=bf16", steps=8, loss_fp32=2.0, loss_mp=2.01, distance=0.01, noise=0.02, agree=True, seconds_fp32=0.2,
    seconds_mp=0.1, speedup=2.0, saved_fp32=200_000_000, saved_mp=100_000_000, casts=3, shadows=33, compile_seconds=9.0,
    picture="/somewhere/losses.png",
)  # fmt: skip


def test_corpus_is_the_standard_library() -> None:
    text = stdlib_bytes(50_000)
    assert text.dtype == torch.uint8
    assert len(text) == 50_000
    assert b"import" in bytes(text.tolist())


def test_batches_follow_their_seed() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    first, again, other = (next(batches(text, 4, 17, seed)) for seed in (1, 1, 2))
    assert first.shape == (4, 17)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[:, 1:] - first[:, :-1], torch.ones(4, 16, dtype=torch.int64))


def test_the_model_starts_from_ignorance_and_learns_in_bf16() -> None:
    torch.manual_seed(0)
    model = ByteGPT(width=32, layers=1, heads=2, context=16)
    mp = mpcompile(model, "bf16", backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.arange(256).repeat(4)[:17].repeat(8, 1)
    losses = []
    for _ in range(10):
        loss = mp(text)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(256), rel=0.02)
    assert losses[-1] < 0.8 * losses[0]


def test_distance_of_curves() -> None:
    curve = [5.0 - i / 50 for i in range(100)]
    assert demo._distance(curve, curve) == 0
    assert demo._distance(curve, [x + 0.25 for x in curve]) == pytest.approx(0.25)
    # What differs at the start alone does not count.
    assert demo._distance(curve, [9.0] * 20 + curve[20:]) == 0


@pytest.mark.parametrize(("agree", "code"), [(True, 0), (False, 1)])
def test_exit_code_and_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, agree: bool, code: int) -> None:
    monkeypatch.setattr(demo, "_run", lambda *_: replace(OUTCOME, agree=agree))
    said = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)], env={"COLUMNS": "100"})
    assert said.exit_code == code
    assert ("DISAGREE" in said.stdout) is not agree
    for part in ("2.00 times", "200.0", "100.0", "0.50", "/somewhere/losses.png"):
        assert part in said.stdout
    as_json = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--json"])
    assert json.loads(as_json.stdout)["agree"] is agree


@pytest.mark.parametrize(
    ("native", "policy", "low", "slow"),
    [
        (True, "auto", "auto", False),
        (False, "auto", "bf16", True),
        (False, "plan=strict", "bf16", True),
        (False, "fp16", "fp16", True),
        (False, "fp32", "fp32", True),
    ],
)
def test_where_auto_stays_fp32_the_demo_shows_bf16(
    monkeypatch: pytest.MonkeyPatch, native: bool, policy: str, low: str, slow: bool
) -> None:
    monkeypatch.setenv("MPCOMPILE_DEVICES", "")
    monkeypatch.setattr(hardware, "has_native_bf16", lambda _: native)
    shown, found = demo._shown(policy, "cpu")
    assert (shown.low, found) == (low, slow)
    assert shown.plan == ("strict" if "strict" in policy else "global")


def test_where_low_products_are_slow_no_speed_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "_run", lambda *_: replace(OUTCOME, slow=True))
    said = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)], env={"COLUMNS": "100"})
    assert "the speed is not shown" in said.stdout
    assert "2.00 times" not in said.stdout
    assert "200.0" in said.stdout


def test_saved_for_backward_counts_storages_once_and_not_what_lives_on() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)

    def forward() -> torch.Tensor:
        hidden = layer(x)  # keeps x and the weight, both alive afterwards
        return (torch.tanh(hidden) * torch.tanh(hidden)).sum()  # two results, each kept once though read by two

    found = saved_for_backward(forward)
    assert (found.total, found.fp32) == (2 * 4 * 8 * 4, 2 * 4 * 8 * 4)


def test_saved_for_backward_tells_fp32_from_low() -> None:
    x = torch.randn(16, requires_grad=True)
    found = saved_for_backward(lambda: torch.tanh(x.bfloat16()).sum().float())
    assert (found.total, found.fp32) == (32, 0)


def test_peak_bytes_sees_what_comes_and_goes() -> None:
    def step() -> None:
        first = torch.ones(1 << 20)
        del first
        second = torch.ones(1 << 19)
        del second

    assert peak_bytes(step, "cpu") == pytest.approx(4 << 20, rel=0.01)


def test_clock_measures() -> None:
    assert Clock("cpu").seconds(lambda: sum(range(200_000))) > Clock("cpu").seconds(lambda: None) >= 0


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["demo", "--steps", "24", "--out", str(tmp_path), "--json"])
    found = json.loads(said.stdout)
    assert said.exit_code == 0
    assert found["agree"]
    assert found["saved_mp"] < 0.6 * found["saved_fp32"]
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "losses.json").read_text())["mpcompile"]) == 24
