"""Parameters that the forward itself writes, and states that a step makes: what the fuzzer found, each as its kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F

from mpcompile import LossScale, mpcompile

LOW = "bf16,device=free-low"


class Tied(nn.Module):
    """A head tied to an embedding whose rows are shortened where they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.head = nn.Embedding(11, 8, max_norm=0.5), nn.Linear(8, 11)
        self.head.weight = self.e.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.e(x)), x)


class Scaled(nn.Module):
    """A weight that is written by hand, between two products that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.l(F.one_hot(x, 8).float())
        with torch.no_grad():
            self.l.weight.mul_(0.25)
        return F.linear(h.detach(), self.l.weight).square().mean()


def by_step(model: nn.Module, x: torch.Tensor, policy: str) -> list[torch.Tensor]:
    step = mpcompile(model, policy, backend="eager").train_step(optim.SGD(model.parameters(), 0.1))
    return [step(x).loss for _ in range(3)]


def by_hand(model: nn.Module, x: torch.Tensor, policy: str) -> list[torch.Tensor]:
    mp = mpcompile(model, policy, backend="eager") if policy else model
    optimizer = optim.SGD(model.parameters(), 0.1)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = mp(x)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


@pytest.mark.parametrize("way", [by_step, by_hand])
@pytest.mark.parametrize("kind", [Tied, Scaled])
def test_a_low_reader_of_a_weight_that_the_forward_writes_reads_it_as_it_is(
    way: Callable[..., Any], kind: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    mine = kind()
    plain, x = copy.deepcopy(mine), torch.randint(0, 8, (6,))
    low, exact = way(mine, x, LOW), by_hand(plain, x, "")
    # The rows of before the write are four times as large: a shadow of them would be off by far more than roundings.
    torch.testing.assert_close(torch.stack(low), torch.stack(exact), rtol=0.02, atol=1e-3)
    for one, other in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=2e-3)


class WithEmpty(nn.Module):
    """An empty parameter, and one whose gradient is zero throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.empty, self.idle = nn.Linear(4, 4), nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.l(x) + self.empty.sum() + 0.0 * self.idle).square().mean()


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_state_of_what_shows_no_step_is_there_with_the_others(dampening: float, accumulate: int) -> None:
    torch.manual_seed(0)
    mine = WithEmpty()
    plain = copy.deepcopy(mine)
    one, twin = (optim.SGD(m.parameters(), 0.1, 0.9, dampening) for m in (mine, plain))
    step = mpcompile(mine, "fp32", backend="eager").train_step(one, accumulate=accumulate, scale=LossScale.dynamic(8.0))
    for size in (3, 5, 3):  # another size is another graph, and another look at the state
        x = torch.randn(size, 4)
        for _ in range(accumulate):
            step(x)
        twin.zero_grad()
        plain(x).backward()
        twin.step()
    mine_state, plain_state = (o.state_dict()["state"] for o in (one, twin))
    assert mine_state.keys() == plain_state.keys() == {0, 1, 2, 3}
    for key, state in plain_state.items():
        torch.testing.assert_close(mine_state[key]["momentum_buffer"], state["momentum_buffer"], rtol=1e-5, atol=1e-6)


def test_a_fused_optimizer_goes_on_where_a_weight_lies_otherwise_than_its_state() -> None:
    """Torch's fused kernels go by address and would mix the elements: plain torch without them is what is right."""
    torch.manual_seed(0)
    mine = nn.Linear(8, 6)
    plain = copy.deepcopy(mine)
    one = optim.SGD(mine.parameters(), 0.1, momentum=0.9, fused=True)
    twin = optim.SGD(plain.parameters(), 0.1, momentum=0.9, fused=False)
    step = mpcompile(mine, "fp32", backend="eager").train_step(one, lambda m, x: m(x).square().mean())
    for turn in range(4):
        if turn == 2:
            for model in (mine, plain):
                model.weight.data = model.weight.data.t().contiguous().t()
        x = torch.randn(5, 8)
        step(x)
        twin.zero_grad()
        plain(x).square().mean().backward()
        twin.step()
    torch.testing.assert_close(mine.weight, plain.weight, rtol=1e-5, atol=1e-6)


class Normed(nn.Module):
    """Running statistics behind a product that overflows FP16."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.l, self.n = nn.Linear(8, 4), norm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.l(x)
        return self.n(h if isinstance(self.n, nn.BatchNorm1d) else h.unsqueeze(-1).expand(-1, -1, 3)).square().mean()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("policy", ["fp16,device=free-low", "bf16,device=free-low"])
def test_running_statistics_stay_finite_in_the_drop_in(policy: str, backend: str) -> None:
    torch.manual_seed(0)
    mine = Normed(nn.BatchNorm1d)
    plain = copy.deepcopy(mine)
    mp = mpcompile(mine, policy, backend=backend)
    good, bad = torch.randn(6, 8), torch.full((6, 8), float("inf"))
    mp(good).backward()
    plain(good).backward()
    torch.testing.assert_close(mine.n.running_mean, plain.n.running_mean, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(mine.n.running_var, plain.n.running_var, rtol=0.01, atol=1e-3)
    kept = [mine.n.running_mean.clone(), mine.n.running_var.clone()]
    mp(bad).backward()
    if policy.startswith("fp16"):
        assert torch.equal(mine.n.running_mean, kept[0])
        assert torch.equal(mine.n.running_var, kept[1])
    mp(good).backward()
    assert mine.n.running_mean.isfinite().all() == policy.startswith("fp16")
