"""What a step runs as it is: CTC by lengths, draws from a generator. Plain torch is the judge."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from mpcompile import mpcompile


class Speech(nn.Module):
    """CTC over frames (batch, time, 6), with lengths as tensors."""

    def __init__(self, reduction: str, zero_infinity: bool) -> None:
        super().__init__()
        self.l, self.loss = nn.Linear(6, 5), nn.CTCLoss(reduction=reduction, zero_infinity=zero_infinity)

    def forward(self, x: Tensor, labels: Tensor, frames: Tensor, letters: Tensor) -> Tensor:
        logs = self.l(x).log_softmax(-1).transpose(0, 1)
        return self.loss(logs, labels, frames, letters).sum()


def race(mine: nn.Module, batches: list[Any], policy: str = "fp32", **options: Any) -> tuple[list[Tensor], nn.Module]:
    """Train `mine` by the step and a twin plainly; the step's losses and the twin."""
    plain = copy.deepcopy(mine)
    twin = optim.SGD(plain.parameters(), 0.05)
    step = mpcompile(mine, policy, backend="eager").train_step(optim.SGD(mine.parameters(), 0.05), **options)
    losses = []
    for batch in batches:
        twin.zero_grad()
        exact = plain(*batch)
        exact.backward()
        twin.step()
        losses.append(step(*batch).loss)
        if policy == "fp32":
            torch.testing.assert_close(losses[-1], exact.detach(), rtol=1e-5, atol=1e-5)
    for one, other in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 if policy == "fp32" else 0.02)
    return losses, plain


@pytest.mark.parametrize("policy", ["fp32", "bf16,device=free-low"])
@pytest.mark.parametrize(("reduction", "zero_infinity"), [("mean", True), ("none", False)])
def test_a_ctc_loss_with_lengths_in_tensors_trains(reduction: str, zero_infinity: bool, policy: str) -> None:
    torch.manual_seed(0)

    def batch(frames: list[int], letters: list[int], time: int = 9) -> tuple[Tensor, ...]:
        return torch.randn(2, time, 6), torch.randint(1, 5, (2, 4)), torch.tensor(frames), torch.tensor(letters)

    # The second batch has other lengths at the same sizes: nothing of the first may stand in the graph.
    race(
        Speech(reduction, zero_infinity),
        [batch([9, 7], [4, 2]), batch([5, 9], [2, 3]), batch([6, 4], [1, 2], 7)],
        policy,
    )


class Noisy(nn.Module):
    """Draws from a generator of its own, in every way: made, of a tensor, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.generator = nn.Linear(4, 4), torch.Generator().manual_seed(7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x + torch.randn(x.shape, generator=self.generator))
        keep = torch.bernoulli(torch.full_like(h, 0.5), generator=self.generator)
        noise = torch.empty_like(h).uniform_(-0.1, 0.1, generator=self.generator)
        order = torch.randperm(x.shape[0], generator=self.generator)
        return (h * keep + noise)[order].square().sum(1).dot(torch.arange(x.shape[0]).float())


def test_a_generator_of_the_programs_own_is_drawn_from_at_each_step() -> None:
    torch.manual_seed(0)
    mine = Noisy()
    kept = mine.generator.get_state()
    x = torch.randn(3, 4)
    before = torch.get_rng_state()
    twin = copy.deepcopy(mine)
    twin.generator = torch.Generator()
    twin.generator.set_state(kept)
    step = mpcompile(mine, "fp32", backend="eager").train_step(optim.SGD(mine.parameters(), 0.01))
    optimizer = optim.SGD(twin.parameters(), 0.01)
    losses = []
    for turn in range(4):
        if turn == 3:
            for model in (mine, twin):
                model.generator.manual_seed(11)
        optimizer.zero_grad()
        exact = twin(x)
        exact.backward()
        optimizer.step()
        losses.append(step(x).loss)
        torch.testing.assert_close(losses[-1], exact.detach(), rtol=1e-5, atol=1e-5)
    assert len({float(loss) for loss in losses}) == 4
    torch.testing.assert_close(mine.l.weight, twin.l.weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(before, torch.get_rng_state())


def test_a_ctc_loss_outside_of_a_step_is_torchs() -> None:
    assert F.ctc_loss.__module__ == "torch.nn.functional"
