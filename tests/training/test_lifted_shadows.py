"""Large weights: the compiled backward gives their gradients in the low type, and autograd casts them one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mpcompile import mpcompile
from mpcompile.runtime import dynamo
from mpcompile.tools.measure import peak_bytes


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 64))


def trained(model: nn.Module, call: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = call(torch.randn(32, 64)).square().mean()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_lifted_or_not_the_training_is_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for large, together in ((1, 1 << 40), (1, 1), (1 << 40, 1)):
        monkeypatch.setattr(dynamo, "LARGE", large)
        monkeypatch.setattr(dynamo, "TOGETHER", {"cpu": together})
        model = net()
        mp = mpcompile(model, "bf16", low=["0", "2", "4"])
        results.append((trained(model, mp), model.state_dict()))
    (inside, weights) = results.pop()
    for lifted, others in results:
        assert lifted == inside
        torch.testing.assert_close(weights, others, rtol=0, atol=0)


def test_gradients_are_cast_in_few_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "TOGETHER", {"cpu": dynamo.TOGETHER["cuda"]})
    masters = [nn.Parameter(torch.empty(size)) for size in (1 << 19, 1 << 21, 1 << 21, 1 << 23, 1 << 19, 1 << 19)]
    masters[4].requires_grad_(False)
    assert dynamo._groups(masters, {0, 1, 2, 3, 4, 5}) == [[0, 1], [2], [3], [5]]
    assert dynamo._groups(masters, ()) == []


def test_frozen_weights_and_inference_need_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "LARGE", 1)
    model = net()
    model[2].requires_grad_(False)
    twin = copy.deepcopy(model)
    mp = mpcompile(model, "bf16", low=["0", "2", "4"])
    assert trained(model, mp) == pytest.approx(trained(twin, twin), rel=0.05)
    assert model[2].weight.grad is None
    with torch.no_grad():
        assert not mp(torch.randn(4, 64)).requires_grad
    with torch.inference_mode():
        mp(torch.randn(4, 64))
    model[2].requires_grad_(True)
    mp(torch.randn(32, 64)).sum().backward()
    assert model[2].weight.grad is not None


@pytest.mark.slow
def test_a_backward_holds_no_gradient_twice() -> None:
    """Six weights of 16 MB: their FP32 gradients, and one low one at a time beside them, not all."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(6)))
    mp = mpcompile(model, "bf16", low=["*"])
    x = torch.randn(64, 2048)

    def step() -> None:
        mp(x).sum().backward()
        model.zero_grad()

    step()
    single = 6 * (1 << 24)
    assert single < peak_bytes(step, "cpu") < single + 3 * (1 << 23) + (1 << 20)


class Detached(nn.Module):
    """A branch without a gradient beside one with."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.student(x) - self.teacher(x).detach()).square().mean()


def test_a_group_that_no_gradient_reaches_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "LARGE", 1)
    monkeypatch.setattr(dynamo, "TOGETHER", {"cpu": 1})
    model = Detached()
    mpcompile(model, "bf16", low=["*"])(torch.randn(2, 64)).backward()
    assert model.student.weight.grad is not None
    assert model.teacher.weight.grad is None
