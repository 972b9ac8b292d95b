"""What a forward finds by a name, and hooks before an update: replaced between steps, they are seen or refused."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpcompile import mpcompile
from mpcompile.errors import CaptureError, TrainingError

tools: Any = types.ModuleType("users_tools")
tools.bend = torch.tanh
activation: Callable[[Tensor], Tensor] = torch.tanh


class Config:
    """A configuration with a tensor."""

    def __init__(self) -> None:
        self.scale = torch.tensor(1.5)


class Net(nn.Module):
    """Finds what it computes with in every place that Python has."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.scale = nn.Linear(6, 6), torch.tensor(2.0)
        self.table, self.list, self.config = {"a": torch.tensor(0.5)}, [torch.tensor(1.25)], Config()
        self.apart = [nn.Linear(6, 6)]
        self.__dict__["hidden"] = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.0))
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def help(self, h: Tensor) -> Tensor:
        return activation(h)

    @staticmethod
    def shrink(h: Tensor) -> Tensor:
        return h * 0.5

    @property
    def factor(self) -> Tensor:
        return self.scale * self.table["a"] * self.list[0] * self.config.scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.apart[0](self.hidden(self.help(self.l(x))))
        return (self.shrink(self.conv(h.unsqueeze(1))) * self.factor).square().mean()


def fresh(seed: int, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3)


def layer(seed: int) -> nn.Linear:
    made = nn.Linear(6, 6)
    made.weight, made.bias = fresh(seed, 6, 6), fresh(seed, 6)
    return made


def patched_conv(model: Any) -> None:
    model.conv._conv_forward = types.MethodType(lambda self, i, w, b: F.conv1d(i, w * 1.5, b, padding=1), model.conv)


EVENTS: dict[str, Callable[[Any], object]] = {
    "a tensor that is no buffer": lambda m: setattr(m, "scale", torch.tensor(2.5)),
    "a tensor in a dict": lambda m: m.table.update(a=torch.tensor(0.6)),
    "a tensor in a list": lambda m: m.list.__setitem__(0, torch.tensor(1.1)),
    "a tensor in a configuration": lambda m: setattr(m.config, "scale", torch.tensor(1.3)),
    "a tensor written in place": lambda m: m.table["a"].fill_(0.4),
    "a module in a list": lambda m: m.apart.__setitem__(0, layer(1)),
    "a hidden module": lambda m: m.__dict__.__setitem__("hidden", nn.Sequential(layer(2))),
    "a hidden module's child": lambda m: m.hidden.__setitem__(0, layer(3)),
    "a hidden module's parameter": lambda m: setattr(m.hidden[0], "weight", fresh(4, 6, 6)),
    "a hidden module's edit": lambda m: m.hidden[0].weight.data.mul_(0.8),
    "a hidden module's new child": lambda m: m.hidden.append(nn.Tanh()),
    "a method of the instance": lambda m: setattr(m, "help", F.relu),
    "a method of torch's, of one instance": patched_conv,
}


class Race:
    """A step, and plain torch on a twin."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        torch.manual_seed(0)
        self.mine = model
        self.plain = copy.deepcopy(self.mine)
        self.optimizer, self.twin = (optim.SGD(m.parameters(), 0.01) for m in (self.mine, self.plain))
        self.step = mpcompile(self.mine, "fp32", backend="eager").train_step(self.optimizer, **options)

    def turn(self, between: Callable[[], object] = bool) -> None:
        x = torch.randn(4, 6)
        loss = self.step(x).loss
        between()
        self.twin.zero_grad()
        exact = self.plain(x)
        exact.backward()
        self.twin.step()
        torch.testing.assert_close(loss, exact.detach(), rtol=1e-4, atol=1e-5)
        for one, other in zip(self.mine.parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:MP533")
def test_what_a_forward_finds_by_a_name_may_be_replaced() -> None:
    """One step through all events: each must be seen beside all that came before."""
    race = Race(Net())
    race.turn()
    for name, event in EVENTS.items():
        event(race.mine)
        event(race.plain)
        try:
            race.turn()
        except AssertionError as error:
            raise AssertionError(f"not seen: {name}") from error


def test_functions_of_a_class_and_of_a_module_may_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(Net())
    race.turn()
    for owner, name, new in (
        (Net, "help", lambda self, h: activation(h) * 2),
        (Net, "shrink", staticmethod(lambda h: h * 0.25)),
        (Net, "__call__", lambda self, *args: nn.Module.__call__(self, *args) * 3),
    ):
        monkeypatch.setattr(owner, name, new)
        race.turn()
    monkeypatch.setitem(globals(), "activation", torch.relu)
    race.turn()


class Table:
    """Names in a class that is no module and has no instance."""

    gain = 0.5
    weight = torch.tensor(1.5)
    config = types.SimpleNamespace(shift=0.25)

    @staticmethod
    def bend(h: Tensor) -> Tensor:
        return torch.tanh(h)


class Derived(Table):
    """Inherits them."""


class ByClass(nn.Module):
    """Reads what it computes with of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = Table.bend(self.l(x) * Derived.gain) * Derived.weight + Table.config.shift
        return Derived.bend(h).square().mean()


def test_what_a_class_holds_may_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(ByClass())
    race.turn()
    for owner, name, new in (
        (Table, "bend", staticmethod(torch.sigmoid)),
        (Table, "gain", 0.75),
        (Table, "weight", torch.tensor(2.5)),
        (Table.config, "shift", 0.5),
        (Derived, "bend", staticmethod(lambda h: Table.bend(h) * 2)),
        (Table, "bend", staticmethod(lambda h: h * 0.3)),
    ):
        monkeypatch.setattr(owner, name, new, raising=False)
        race.turn()
    before = race.step.specializations.epoch
    race.turn()
    assert race.step.specializations.epoch == before


class Named(nn.Module):
    """Calls a function of another module by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return tools.bend(self.l(x)).square().mean()


def test_a_function_of_another_module_may_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(Named())
    race.turn()
    monkeypatch.setattr(tools, "bend", torch.relu)
    race.turn()


def test_lists_and_dicts_stay_the_objects_that_the_program_holds() -> None:
    model = Net()
    table, items = model.table, model.list
    race = Race(model)
    race.turn()
    assert model.table is table
    assert model.list is items


class Draws(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.l, self.draw = nn.Linear(6, 6), draw

    def forward(self, x: Tensor) -> Tensor:
        return (self.l(x) * self.draw()).square().mean()


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_numbers_drawn_on_the_host_would_stand_still_and_are_refused(draw: Callable[[], float]) -> None:
    model = Draws(draw)
    step = mpcompile(model, "fp32", backend="eager").train_step(optim.SGD(model.parameters(), 0.1))
    random.seed(1)
    np.random.seed(1)
    expected = draw()
    random.seed(1)
    np.random.seed(1)
    for _ in range(2):
        with pytest.raises(CaptureError, match="random numbers on the host"):
            step(torch.ones(2, 6))
    assert draw() == expected  # and nothing was drawn


def clipped(optimizer: Any, *_: Any) -> None:
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.01)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_hook_before_the_update_that_reads_gradients_is_refused(accumulate: int) -> None:
    race = Race(Draws(lambda: 1.0), accumulate=accumulate)
    race.optimizer.register_step_pre_hook(clipped)
    before = race.mine.l.weight.detach().clone()
    for _ in range(accumulate - 1):
        race.step(torch.ones(2, 6))
    with pytest.raises(TrainingError, match="MP523") as caught:
        race.step(torch.ones(2, 6))
    assert "test_what_python_names.py" in caught.value.where
    assert torch.equal(race.mine.l.weight, before)


def test_hooks_on_all_optimizers_run_as_torch_runs_them() -> None:
    race = Race(Draws(lambda: 1.0))
    race.turn()
    seen = list[Any]()

    def slower(optimizer: Any, *_: Any) -> None:
        seen.append(optimizer)
        optimizer.param_groups[0]["lr"] = 0.01

    handle = register_optimizer_step_pre_hook(slower)
    try:
        race.turn()
    finally:
        handle.remove()
    assert seen == [race.optimizer, race.twin]


@pytest.mark.parametrize("name", ["max_grad_norm", "accumulate", "optimizer", "loss_fn", "model"])
def test_an_option_cannot_be_set_on_a_step(name: str) -> None:
    race = Race(Draws(lambda: 1.0))
    with pytest.raises(TrainingError, match="MP541"):
        setattr(race.step, name, 1)
