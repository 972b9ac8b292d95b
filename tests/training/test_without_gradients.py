"""What is read under `torch.no_grad` first and with gradients afterwards: the cast in between keeps the gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from lowness import assert_low_products
from torch import Tensor, nn

from mpcompile import mpcompile

POLICY = "bf16,device=free-low"


class Watched(nn.Module):
    """A product whose result somebody looks at without gradients before it goes on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a = how, nn.Linear(16, 32)
        self.register_buffer("seen", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "storage":
            y = y.clone()
            y[:, 0] = y[:, 1] * 2
        if self.how == "items":
            left, right = y.split(16, 1)
            with torch.no_grad():
                seen = torch.exp(left).mean()
            return torch.exp(left).sum(1) + torch.log1p(right.square()).sum(1) + seen
        with torch.no_grad():
            self.seen.mul_(0.9).add_(self.read(y).mean(0), alpha=0.1)
        return torch.exp(y - self.seen).sum(1)

    def read(self, y: Tensor) -> Tensor:
        return {
            "float": lambda: y.float(),
            "to": lambda: y.to(torch.float32),
            "type": lambda: y.type(torch.float32),
            "type_as": lambda: y.type_as(self.seen),
            "plain": lambda: torch.exp(y),
            "storage": lambda: torch.exp(y),
        }[self.how]()


@pytest.mark.parametrize(
    ("how", "way", "nested"),
    [(how, "step", False) for how in ("float", "to", "type", "type_as", "plain", "storage", "items")]
    + [("float", "drop-in", True), ("storage", "drop-in", False)],
)
def test_a_reader_without_gradients_takes_none_from_others(how: str, way: str, nested: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = Watched(how)
    twin, x = copy.deepcopy(model), torch.randn(8, 16)
    wanted = twin(x)
    wanted.mean().backward()
    mp = mpcompile(nn.Sequential(model) if nested else model, POLICY, backend="eager")
    if way == "drop-in":
        found = mp(x)
        found.mean().backward()
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
        assert_low_products(mp)
        gradient = model.a.weight.grad  # type: ignore[union-attr]
    else:
        before = model.a.weight.detach().clone()  # type: ignore[union-attr, operator]
        mp.train_step(torch.optim.SGD(model.parameters(), 1.0), lambda net, v: net(v).mean())(x)
        gradient = before - model.a.weight.detach()  # type: ignore[union-attr, operator]
    error = (gradient - twin.a.weight.grad).norm() / twin.a.weight.grad.norm()  # type: ignore[union-attr]
    assert float(error) < 0.05
