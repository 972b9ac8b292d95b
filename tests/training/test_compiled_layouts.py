"""What Inductor is told of layouts and of values that are written: found by the fuzzer, each a small model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpcompile import mpcompile


class Renormed(nn.Module):
    """Its forward writes to a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 6, max_norm=1.0), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.table(x)).flatten(0, 1), x.flatten())


class Spoken(nn.Module):
    """CTC's gradient lies otherwise than its operand."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(7, 6), nn.InstanceNorm1d(6, affine=True), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.table(x).transpose(1, 2)).transpose(1, 2)
        lengths = torch.full((len(x),), x.shape[1])
        return F.ctc_loss(self.head(h).transpose(0, 1).log_softmax(-1), x[:, :3].clamp(min=1), lengths, lengths - 2)


def trains_as_plain(model: nn.Module) -> None:
    plain = copy.deepcopy(model)
    optimizer, twin = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, plain))
    step = mpcompile(model, "fp32").train_step(optimizer)
    for _ in range(3):
        x = torch.randint(0, 7, (4, 5))
        loss = step(x).loss
        exact = plain(x)
        twin.zero_grad()
        exact.backward()
        twin.step()
        torch.testing.assert_close(loss, exact.detach(), rtol=1e-4, atol=1e-5)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_weight_that_the_forward_writes_is_trained_by_inductor() -> None:
    torch.manual_seed(0)
    trains_as_plain(Renormed())


def test_a_gradient_that_lies_otherwise_than_its_operand_is_trained_by_inductor() -> None:
    torch.manual_seed(0)
    trains_as_plain(Spoken())
