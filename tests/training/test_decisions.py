"""Branches of Python by what the batch holds: the step goes the way of plain torch, which is the judge, or refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from mpcompile import MPCompileError, mpcompile


class Asking(nn.Module):
    """`ask(x, y)` decides whether the second layer is used."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        super().__init__()
        self.ask, self.one, self.two = ask, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.one(x)
        if self.ask(x, y):
            h = self.two(torch.tanh(h))
        return h.square().mean()


def race(ask: Callable[..., Any], batches: list[tuple[Tensor, Tensor]], policy: str = "fp32") -> Any:
    """Train by the step and plainly; the step."""
    torch.manual_seed(0)
    mine = Asking(ask)
    plain = copy.deepcopy(mine)
    twin = optim.AdamW(plain.parameters(), 0.05)
    step = mpcompile(mine, policy, backend="eager").train_step(optim.AdamW(mine.parameters(), 0.05))
    tolerance = 1e-5 if policy == "fp32" else 0.03
    for x, y in batches:
        twin.zero_grad()
        exact = plain(x, y)
        exact.backward()
        twin.step()
        torch.testing.assert_close(step(x, y).loss, exact.detach(), rtol=tolerance, atol=tolerance)
    for one, other in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    return step


def batches(*highest: int, rows: int = 3) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(rows, 4, generator=g), torch.tensor([0, *[n] * (rows - 1)])) for n in highest]


ASKED = {
    "largest": lambda x, y: y.max() >= 3,
    "any": lambda x, y: (y > 2).any(),
    "all, negated": lambda x, y: not (y < 3).all(),
    "of a float": lambda x, y: (x.abs().sum() * 0 + y.float().mean()) > 1.5,
    "two questions": lambda x, y: y.max() > 2 and y.min() < 1,
    "through a view": lambda x, y: y.view(-1, 1).expand(-1, 2)[1:].max() > 2,
    "by a size": lambda x, y: y.sum() > x.shape[0] * 1,
}


@pytest.mark.parametrize("name", ASKED)
def test_the_way_that_a_batch_decides_is_taken_for_each_batch(name: str) -> None:
    step = race(ASKED[name], batches(1, 4, 1, 5, 1, 4))
    assert len(step.specializations) == 2


def test_ways_and_sizes_come_together() -> None:
    several = [*batches(1, 4), *batches(4, 1, rows=5), *batches(1, 4, rows=4), *batches(1, 4)]
    race(ASKED["largest"], several)


def test_low_products_go_the_right_way_too() -> None:
    step = race(ASKED["largest"], batches(1, 4, 1, 4), "bf16,device=free-low")
    lows = [n for n in step.report().to_dict()["nodes"] if n["kind"] == "matmul" and n["precision"] == "bf16"]
    assert lows


def test_a_batch_that_the_program_refuses_is_refused_and_the_next_one_trains() -> None:
    def checked(x: Tensor, y: Tensor) -> bool:
        if y.max() >= 9:
            raise ValueError("labels are out of range")
        return False

    step = race(checked, batches(1, 4))
    with pytest.raises(MPCompileError, match="out of range"):
        step(*batches(9)[0])
    assert bool(step(*batches(2)[0]).stepped)


def written(x: Tensor, y: Tensor) -> Tensor:
    z = y.clone()
    z.view(-1).clamp_(max=2)
    return z.max() > 2


REFUSED = {
    "what was written to": written,
    "weights": lambda x, y: MODELS[-1].one.weight.sum() > 0,
    "a draw": lambda x, y: torch.rand([]) < 0.5,
}
MODELS: list[Any] = []


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_batch_alone_does_not_decide_is_refused(name: str) -> None:
    model = Asking(REFUSED[name])
    MODELS.append(model)
    step = mpcompile(model, "fp32", backend="eager").train_step(optim.SGD(model.parameters(), 0.1))
    with pytest.raises(MPCompileError, match="MP101") as error:
        step(*batches(4)[0])
    if name == "a draw":
        assert "test_decisions.py" in str(error.value)
        assert "layerdrop" in str(error.value)


SETTLED = [
    (lambda x, y: torch.rand([]) < 0.0, False),
    (lambda x, y: torch.rand([]) < 1.0, True),
    (lambda x, y: torch.rand([]) >= 0, True),
    (lambda x, y: torch.rand([]) > 1, False),
]


@pytest.mark.parametrize(("ask", "goes"), SETTLED)
def test_a_draw_that_decides_nothing_is_no_question(ask: Callable[..., Any], goes: bool) -> None:
    step = race(ask, batches(1, 4, 2))
    names = {name for name, _ in next(iter(step.specializations)).layout}
    assert ("two.weight" in names) is goes
    assert len(step.specializations) == 1


class Chosen(nn.Module):
    """CTC over labels that a mask chooses; `use` says how the choice is made and passed on."""

    def __init__(self, use: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.use, self.l = use, nn.Linear(4, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logs = self.l(x).log_softmax(-1).transpose(0, 1)
        frames = torch.full((x.shape[0],), x.shape[1])
        return nn.functional.ctc_loss(logs, self.use(y), frames, (y >= 0).sum(-1), zero_infinity=True)


USES = {
    "masked_select": lambda y: y.masked_select(y >= 0),
    "function": lambda y: torch.masked_select(y, y >= 0),
    "index": lambda y: y[y >= 0],
    "of another type": lambda y: y[y >= 0].to(torch.int32).long(),
}


@pytest.mark.parametrize("name", USES)
def test_labels_that_a_mask_chooses_train_without_a_graph_for_each_count(name: str) -> None:
    torch.manual_seed(0)
    mine = Chosen(USES[name])
    plain = copy.deepcopy(mine)
    twin = optim.SGD(plain.parameters(), 0.1)
    step = mpcompile(mine, "fp32", backend="eager").train_step(optim.SGD(mine.parameters(), 0.1))
    for labels in ([[1, 2, -1], [3, -1, -1]], [[1, -1, -1], [2, -1, -1]], [[1, 2, 3], [4, 5, 1]]):
        x, y = torch.randn(2, 9, 4), torch.tensor(labels)
        twin.zero_grad()
        exact = plain(x, y)
        exact.backward()
        twin.step()
        torch.testing.assert_close(step(x, y).loss, exact.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.l.weight, plain.l.weight, rtol=1e-5, atol=1e-5)
    assert len(step.specializations) == 1
