"""The training step in Accelerate's loop: windows, clipping, schedules, skips and files are what Accelerate's own are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lowness import assert_low_products
from torch import Tensor, nn

from mpcompile import LossScale, MPCompileError, mpcompile

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from mpcompile.integrations.accelerate import train_step

LOW = "bf16,device=free-low"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Accelerate keeps its state in the process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()  # type: ignore[no-any-return]


class Run:
    """Model, optimizer, loader and schedule, prepared in the order that `turn` says; seven batches, windows of two."""

    def __init__(self, policy: str = "", turn: int = 0, **options: Any) -> None:
        self.alone()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        data = [(torch.randn(8), torch.randn(1)) for _ in range(28)]
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        given: list[Any] = [mpcompile(net, policy, backend="eager") if policy else net]
        given.append(torch.optim.AdamW(net.parameters(), 1e-2))
        given.append(torch.utils.data.DataLoader(data, batch_size=4))
        given.append(torch.optim.lr_scheduler.LambdaLR(given[1], lambda count: 0.9**count))
        order = [(turn + i) % 4 for i in range(4)]
        prepared = dict(zip(order, self.accelerator.prepare(*(given[i] for i in order)), strict=True))
        self.model, self.optimizer, self.loader, self.schedule = (prepared[i] for i in range(4))
        self.net, self.losses, self.skips = net, list[float](), list[bool]()
        self.step = train_step(self.accelerator, self.model, self.optimizer, loss_of, **options) if policy else None

    @staticmethod
    def alone() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    def epoch(self, spoilt: int = -1) -> Run:
        for turn, (x, y) in enumerate(self.loader):
            with self.accelerator.accumulate(self.model):
                self.losses.append(self._ours(x / (turn != spoilt), y) if self.step else self._plain(x, y))
                # A loop that keeps these two loses nothing.
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.schedule.step()
                self.skips.append(self.accelerator.optimizer_step_was_skipped)
        return self

    def _ours(self, x: Tensor, y: Tensor) -> float:
        assert self.step is not None
        return self.step(x, y).loss.item()  # type: ignore[no-any-return]

    def _plain(self, x: Tensor, y: Tensor) -> float:
        loss = loss_of(self.model, x, y)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
        return loss.item()

    def same(self, other: Run, **bound: float) -> None:
        assert self.losses == pytest.approx(other.losses, abs=bound.get("atol"))
        assert self.schedule.get_last_lr() == other.schedule.get_last_lr()
        for p, q in zip(self.net.parameters(), other.net.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=bound.get("atol"))


@pytest.mark.parametrize("turn", range(4))
def test_it_trains_as_accelerate_s_own_loop_prepared_in_any_order(turn: int) -> None:
    """Seven batches in windows of two: the last window of each epoch has one."""
    plain = Run().epoch().epoch()
    Run("fp32", turn, max_grad_norm=0.5).epoch().epoch().same(plain, atol=1e-5)


def test_it_trains_low() -> None:
    plain, ours = Run().epoch().epoch(), Run(LOW, max_grad_norm=0.5, scale=64.0).epoch().epoch()
    report = {node.precision for node in ours.step.step.report().nodes if node.kind == "matmul"}  # type: ignore[union-attr]
    assert "bf16" in report
    ours.same(plain, atol=0.03)
    ours.model(torch.randn(4, 8))
    assert_low_products(ours.accelerator.unwrap_model(ours.model))


def test_a_skipped_window_is_said_and_the_schedule_waits() -> None:
    run = Run("fp16,device=free-low", scale=LossScale.dynamic(8.0)).epoch(spoilt=2)
    assert run.skips == [False, False, False, True, True, False, False]
    assert run.schedule.get_last_lr() == [pytest.approx(1e-2 * 0.9**3)]
    assert run.step is not None
    assert run.step.step.state.scale.item() == 4.0


def test_save_and_load_state_have_the_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_grad_norm": 0.5, "scale": LossScale.dynamic(8.0, interval=3)}
    first = Run("fp16,device=free-low", **options).epoch(spoilt=1)
    first.accelerator.save_state(str(tmp_path))
    first.epoch()
    second = Run("fp16,device=free-low", **options)
    second.accelerator.load_state(str(tmp_path))
    second.epoch()
    assert second.losses == first.losses[7:]
    assert second.step is not None
    assert first.step is not None
    assert second.step.state_dict()["scale"] == first.step.state_dict()["scale"]


def test_gradients_of_one_s_own_are_applied() -> None:
    run = Run("fp32")
    before = [p.detach().clone() for p in run.net.parameters()]
    run.accelerator.backward(loss_of(run.model, torch.randn(4, 8), torch.randn(4, 1)))
    run.optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(run.net.parameters(), before, strict=True))


def test_what_cannot_be_is_refused() -> None:
    run = Run()
    with pytest.raises(MPCompileError, match="MP551: the model is a Sequential"):
        train_step(run.accelerator, run.model, run.optimizer, loss_of)
    ours = Run("fp32")
    with pytest.raises(MPCompileError, match=r"MP551.*\n.*gradient_accumulation_steps"):
        train_step(ours.accelerator, ours.model, ours.optimizer, loss_of, accumulate=4)


@pytest.mark.parametrize("steps", [4, 1])
def test_a_window_that_was_changed_is_refused_before_anything_is(steps: int) -> None:
    ours = Run("fp32").epoch()
    assert ours.step is not None
    before = [p.detach().clone() for p in ours.net.parameters()]
    count = int(ours.step.step.state.steps)
    ours.accelerator.gradient_accumulation_steps = steps
    with pytest.raises(MPCompileError, match="MP551: the step updates after 2 microbatches"):
        ours.epoch()
    assert all(torch.equal(p, q) for p, q in zip(ours.net.parameters(), before, strict=True))
    assert ours.step.step.pending == 0
    assert int(ours.step.step.state.steps) == count
