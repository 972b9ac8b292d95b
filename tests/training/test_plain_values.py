"""Python values that the model or the loss reads change between two steps: plain torch sees it, and so does the step."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mpcompile.api import mpcompile

HERE = sys.modules[__name__]
SHARPNESS = 1.5
LOSS_WEIGHT = 0.5
SETTINGS = SimpleNamespace(by=2.0, more={"deep": [1.0, 3.0]})


@dataclass
class Config:
    gain: float = 1.0
    flags: dict[str, Any] = field(default_factory=lambda: {"square": False})
    powers: list[int] = field(default_factory=lambda: [1, 2])


def helper(x):
    return x * SHARPNESS


class Net(nn.Module):
    classwide = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inp, self.norm, self.drop = nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.0)
        self.alpha, self.on, self.mode, self.pair, self.config = 0.5, True, "tanh", (1.0, 2.0), Config()
        self.act = nn.functional.gelu
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        h = self.act(self.drop(self.norm(self.inp(x)))) * self.alpha
        h = torch.tanh(h) if self.mode == "tanh" else h
        h = h * self.pair[1] * self.classwide * self.config.gain
        h = h.square() if self.config.flags["square"] else h
        h = sum(h**p for p in self.config.powers)
        h = helper(h) + getattr(self, "late", 0.0)
        return self.out(h) if self.on else self.out(h) * 2.0


class Loss:
    """A callable object, with what its `__call__` reads."""

    def __init__(self) -> None:
        self.weight, self.calls = 1.0, 0

    def __call__(self, model, x):
        return self.inner(model(x))

    def inner(self, y):
        return y.square().mean() * self.weight * LOSS_WEIGHT * SETTINGS.by * sum(SETTINGS.more["deep"])


def weighed(model, x, by, *, power=2.0):
    return (model(x).abs() ** power).mean() * by


def race(change, loss=None, twin_loss=None, model=None, turns=2):
    """Train beside plain torch, `change(model, loss)` in between; the graphs that were made."""
    mine = model or Net()
    plain, loss = copy.deepcopy(mine), loss or Loss()
    twin_loss = twin_loss or loss
    first, second = (torch.optim.Adam(m.parameters(), 0.02, eps=1e-4) for m in (mine, plain))
    step = mpcompile(mine, "fp32", backend="eager").train_step(first, loss)
    torch.manual_seed(0)
    for turn in range(2 * turns):
        if turn == turns:
            change(mine, loss)
            change(plain, twin_loss) if twin_loss is not loss else change(plain, SimpleNamespace())
        x = torch.randn(4, 6)
        second.zero_grad()
        expected = twin_loss(plain, x)
        expected.backward()
        second.step()
        torch.testing.assert_close(step(x).loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    return step


CHANGES = {
    "eps of a norm": lambda m, loss: setattr(m.norm, "eps", 0.5),
    "all is dropped": lambda m, loss: setattr(m.drop, "p", 1.0),
    "number": lambda m, loss: setattr(m, "alpha", 0.9),
    "sign of a zero": lambda m, loss: setattr(m, "alpha", -0.0),
    "flag": lambda m, loss: setattr(m, "on", False),
    "word": lambda m, loss: setattr(m, "mode", "none"),
    "tuple": lambda m, loss: setattr(m, "pair", (1.0, 3.0)),
    "field": lambda m, loss: setattr(m.config, "gain", 3.0),
    "entry of a dict in a field": lambda m, loss: m.config.flags.update(square=True),
    "element of a list in a field": lambda m, loss: m.config.powers.append(3),
    "configuration replaced": lambda m, loss: setattr(m, "config", Config(gain=2.0)),
    "function": lambda m, loss: setattr(m, "act", nn.functional.relu),
    "partial": lambda m, loss: setattr(m, "act", functools.partial(nn.functional.gelu, approximate="tanh")),
    "attribute that comes late": lambda m, loss: setattr(m, "late", 0.25),
    "attribute in the place of the class's": lambda m, loss: setattr(m, "classwide", 2.0),
    "object's weight": lambda m, loss: setattr(loss, "weight", 2.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_value_that_changes_makes_a_graph_of_its_own(name):
    assert len(race(CHANGES[name]).specializations) == 2


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (HERE, "SHARPNESS", 0.5),
        (HERE, "LOSS_WEIGHT", 2.0),
        (SETTINGS, "by", 3.0),
        (SETTINGS, "more", {"deep": [1.0]}),
        (Net, "classwide", 3.0),
    ],
)
def test_values_outside_of_the_model(monkeypatch, owner, name, value):
    assert len(race(lambda m, loss: monkeypatch.setattr(owner, name, value)).specializations) == 2


def closed_over():
    weight, more = 1.0, {"a": 1.0}

    def loss(model, x):
        return model(x).square().mean() * weight * more["a"]

    def change(kind):
        nonlocal weight
        if kind == "cell":
            weight = 3.0
        else:
            more["a"] = 2.0

    return loss, change


@pytest.mark.parametrize("kind", ["cell", "dict"])
def test_what_a_loss_closes_over(kind):
    loss, change = closed_over()
    assert len(race(lambda m, _: change(kind), loss).specializations) == 2


def test_defaults_partials_and_methods():
    def loss(model, x, by=1.0):
        return weighed(model, x, by)

    assert len(race(lambda m, _: setattr(loss, "__defaults__", (3.0,)), loss).specializations) == 2
    before = weighed.__kwdefaults__
    try:
        half = functools.partial(functools.partial(weighed), by=0.5)
        race(lambda m, _: setattr(weighed, "__kwdefaults__", {"power": 1.5}), half)
        assert len(race(lambda m, _: half.keywords.update(by=2.0), half).specializations) == 2
    finally:
        weighed.__kwdefaults__ = before
    held = Loss()
    assert len(race(lambda m, _: setattr(held, "weight", 2.0), lambda model, x: held(model, x)).specializations) == 2
    assert len(race(lambda m, _: setattr(held, "weight", 3.0), held.__call__).specializations) == 2


def test_what_is_not_read_makes_no_graph_and_old_values_find_theirs():
    model, loss = Net(), Loss()
    model.global_step = 0
    step = mpcompile(model, "fp32", backend="eager").train_step(torch.optim.SGD(model.parameters(), 0.1), loss)
    x = torch.randn(4, 6)
    for turn in range(12):
        model.global_step, loss.calls = turn, turn
        model.alpha = float(str(0.5 + turn % 2))
        model.train(turn % 4 < 2)
        step(x)
    assert len(step.specializations) == 4


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.calls, self.alpha, self.cache = nn.Linear(6, 3), 0, 1.0, None

    def forward(self, x):
        self.calls += 1
        self.cache = self.cache or "made"
        return self.lin(x).square().mean() * self.alpha


def test_a_counter_is_said_and_makes_no_graph_after_graph():
    model = Counts()
    step = mpcompile(model, "fp32", backend="eager").train_step(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.warns(UserWarning, match=r"(?s)MP539.*Counts.calls"):
        step(torch.randn(4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for turn in range(6):
            model.alpha = 1.0 + (turn % 2 if turn > 1 else 0)
            step(torch.randn(4, 6))
    assert len(step.specializations) == 2


def test_a_value_that_moves_at_each_call_is_said():
    model = Net()
    step = mpcompile(model, "fp32", backend="eager").train_step(torch.optim.SGD(model.parameters(), 0.1), Loss())
    for turn in range(7):
        model.alpha = 1.0 + turn
        step(torch.randn(4, 6))
    model.alpha = 0.0
    with pytest.warns(UserWarning, match=r"(?s)MP533.*alpha"):
        step(torch.randn(4, 6))
