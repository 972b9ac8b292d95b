"""What a step stands on may be replaced between two calls: it equals plain torch then, or says why it does not.

Every event is done to a model that the step trains and to a twin that plain torch trains; with the policy fp32 the two
stay equal to 1e-5, or the step refuses by a code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from mpcompile.api import mpcompile
from mpcompile.errors import MPCompileError, TrainingError

Event = Callable[[Any, Any], object]


class Scale(nn.Module):
    """No parameter, no buffer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Net(nn.Module):
    """Containers in containers, buffers, a norm with running statistics, plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), Scale(1.5)), nn.BatchNorm1d(6))
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)})
        self.mixed = nn.ParameterList([nn.Parameter(torch.full((3,), 0.5)), nn.Parameter(torch.ones(()))])
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.register_buffer("shift", torch.full((3,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        image = self.conv(h.view(-1, 1, 2, 3)).mean((1, 2))
        return (self.heads["a"](h) + self.shift) * self.mixed[0] * self.mixed[1] + image


class Loss(nn.Module):
    """A loss that is a module with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.inner = Scale(2.0)

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.inner((model(x) * self.weight).square().mean())


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda params: torch.optim.Adam(params, 0.02, eps=1e-4),
    "adamw": lambda params: torch.optim.AdamW(params, 0.02, eps=1e-4, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, 0.05),
    "momentum": lambda params: torch.optim.SGD(params, 0.02, momentum=0.9),
    "dampened": lambda params: torch.optim.SGD(params, 0.02, momentum=0.9, dampening=0.5),
}


class Race:
    """A step and plain torch, side by side."""

    def __init__(self, kind: str = "adam", accumulate: int = 1, **options: Any) -> None:
        torch.manual_seed(0)
        self.mine, self.mine_loss = Net(), Loss()
        self.plain, self.plain_loss = copy.deepcopy((self.mine, self.mine_loss))
        self.accumulate = accumulate
        self.optimizer, self.twin = (
            MAKERS[kind](
                [
                    {"params": [*m.body.parameters(), *m.heads.parameters()]},
                    {"params": [*m.mixed.parameters(), *m.conv.parameters(), *loss.parameters()], "lr": 0.01},
                ]
            )
            for m, loss in ((self.mine, self.mine_loss), (self.plain, self.plain_loss))
        )
        self.step = mpcompile(self.mine, "fp32", backend=options.pop("backend", "eager")).train_step(
            self.optimizer, self.mine_loss, accumulate=accumulate, **options
        )

    def turn(self, count: int = 1, within: Event | None = None) -> None:
        """So many windows; `within` happens in each, before its last microbatch."""
        for _ in range(count):
            self.twin.zero_grad()
            for number in range(self.accumulate):
                if within is not None and number == self.accumulate - 1:
                    self.event(within)
                x = torch.randn(5, 6)
                result = self.step(x)
                loss = self.plain_loss(self.plain, x)
                (loss / self.accumulate).backward()
                torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-5, atol=1e-5)
            self.twin.step()
        self.same()

    def event(self, change: Event) -> None:
        for pair in (((self.mine, self.mine_loss), self.optimizer), ((self.plain, self.plain_loss), self.twin)):
            torch.manual_seed(7)
            change(*pair)

    def same(self) -> None:
        pairs = [(self.mine.state_dict(), self.plain.state_dict())]
        pairs += [(self.mine_loss.state_dict(), self.plain_loss.state_dict())]
        for mine, plain in pairs:
            assert mine.keys() == plain.keys()
            for name, value in plain.items():
                torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-5, msg=name)
        groups = zip(self.optimizer.param_groups, self.twin.param_groups, strict=True)
        params = [pair for mine, plain in groups for pair in zip(mine["params"], plain["params"], strict=True)]
        for mine, plain in params:
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)
            for name, tensor in self.twin.state.get(plain, {}).items():
                if isinstance(tensor, Tensor):
                    held = self.optimizer.state[mine][name]
                    torch.testing.assert_close(held, tensor, rtol=1e-5, atol=1e-5, msg=name)


def both(change: Callable[[Any], object]) -> Event:
    """An event on the model alone."""
    return lambda models, optimizer: change(models[0])


def fresh_layer(m: Net) -> None:
    m.heads["a"] = nn.Linear(6, 3)


def trained_layer(models: Any, optimizer: Any) -> None:
    models[0].heads["a"] = new = nn.Linear(6, 3)
    optimizer.add_param_group({"params": list(new.parameters()), "lr": 0.03})


def in_group(models: Any, optimizer: Any) -> None:
    """At equal count: the new parameter takes the place of the old one in model and group."""
    old = models[0].mixed[0]
    models[0].mixed[0] = new = nn.Parameter(torch.full((3,), 0.7))
    params = optimizer.param_groups[1]["params"]
    params[next(i for i, p in enumerate(params) if p is old)] = new


def swapped(models: Any, optimizer: Any) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = second[0], first[0]


def assigned(m: Net) -> None:
    m.load_state_dict({k: v.clone() * 1.1 for k, v in m.state_dict().items()}, assign=True)


def reseated(models: Any, optimizer: Any) -> None:
    """What FSDP, quantisation and `assign=True` leave to be done: the optimizer follows the new parameters."""
    old = dict(models[0].named_parameters())
    assigned(models[0])
    new = {id(p): q for p, q in zip(old.values(), models[0].parameters(), strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(p), p) for p in group["params"]]


def to_data(layout: Callable[[Tensor], Tensor]) -> Event:
    def change(models: Any, optimizer: Any) -> None:
        weight = models[0].body[0].weight
        weight.data = layout(weight.data)

    return change


def forward_of_instance(m: Net) -> None:
    m.heads["a"].forward = lambda x: nn.functional.linear(x, m.heads["a"].weight) * 2.0


def removed_hook(models: Any, optimizer: Any) -> None:
    models[0].heads["a"].register_forward_hook(lambda module, args, out: out * 3).remove()


def one_moment(models: Any, optimizer: Any) -> None:
    for p in optimizer.param_groups[0]["params"][:1]:
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.dim():
                optimizer.state[p][key] = torch.full_like(value, 0.01)


def in_place(models: Any, optimizer: Any) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.mul_(0.5) if value.dim() else value.add_(3)


def one_counter(models: Any, optimizer: Any) -> None:
    state = next(iter(optimizer.state.values()), {})
    if isinstance(state.get("step"), Tensor):
        state["step"].fill_(1.0)


def flags(**values: Any) -> Event:
    return lambda models, optimizer: [
        g.update({k: v for k, v in values.items() if k in g}) for g in optimizer.param_groups
    ]


def loaded(models: Any, optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def emptied_one(models: Any, optimizer: Any) -> None:
    for p in list(optimizer.state)[:1]:
        optimizer.state[p] = {}


def betas_as_a_list(models: Any, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = [0.5, 0.9]


def edited(m: Net) -> None:
    with torch.no_grad():
        m.heads["a"].weight.mul_(0.5)
        m.shift.add_(0.1)


EVENTS: dict[str, Event] = {
    "layer replaced": both(fresh_layer),
    "layer replaced and trained": trained_layer,
    "layer replaced in a nested container": both(lambda m: m.body[1].__setitem__(0, nn.ReLU())),
    "module without parameters replaced": both(lambda m: m.body[1].__setitem__(1, Scale(0.5))),
    "module added": both(lambda m: m.body.append(nn.Tanh())),
    "module removed": both(lambda m: m.body[1].__delitem__(1)),
    "modules swapped": both(lambda m: m.heads.update({"a": m.heads["b"], "b": m.heads["a"]})),
    "module of the loss replaced": lambda models, optimizer: setattr(models[1], "inner", Scale(3.0)),
    "parameter of the loss replaced": lambda models, optimizer: setattr(
        models[1], "weight", nn.Parameter(torch.full((3,), 2.0))
    ),
    "parameter replaced": both(lambda m: setattr(m.heads["a"], "weight", nn.Parameter(torch.ones(3, 6)))),
    "one-element parameter replaced by an equal one": both(
        lambda m: m.mixed.__setitem__(1, nn.Parameter(m.mixed[1].detach().clone()))
    ),
    "parameter replaced in its group": in_group,
    "parameters swapped between groups": swapped,
    "parameter removed from its group": lambda models, optimizer: optimizer.param_groups[1]["params"].pop(0),
    "group removed": lambda models, optimizer: optimizer.param_groups.pop(),
    "group replaced": lambda models, optimizer: optimizer.param_groups.__setitem__(1, dict(optimizer.param_groups[1])),
    "state dict assigned": both(assigned),
    "state dict assigned, and the optimizer follows": reseated,
    "state dict loaded": both(lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()})),
    "buffer replaced": both(lambda m: setattr(m, "shift", torch.full((3,), -1.0))),
    "running statistics replaced": both(lambda m: setattr(m.body[2], "running_mean", torch.ones(6))),
    "running statistics removed": both(
        lambda m: [setattr(m.body[2], name, None) for name in ("running_mean", "running_var")]
    ),
    "bias removed": both(lambda m: setattr(m.heads["a"], "bias", None)),
    "channels last": both(lambda m: m.to(memory_format=torch.channels_last)),
    "data with new addresses": to_data(lambda t: t.clone()),
    "data of another layout": to_data(lambda t: t.t().contiguous().t()),
    "data transposed where it lies": to_data(lambda t: t.t()),
    "data of a narrower storage": to_data(lambda t: torch.cat([t, t], 1)[:, :6]),
    "frozen": both(lambda m: m.heads["a"].requires_grad_(False)),
    "evaluation": both(lambda m: m.eval()),
    "one module in evaluation": both(lambda m: m.body[2].eval()),
    "pruned": both(lambda m: prune.l1_unstructured(m.heads["a"], "weight", 0.5)),
    "parametrized": both(lambda m: parametrize.register_parametrization(m.heads["a"], "weight", Scale(0.5))),
    "weight norm": both(lambda m: parametrizations.weight_norm(m.heads["a"])),
    "forward hook": both(lambda m: m.heads["a"].register_forward_hook(lambda module, args, out: out * 3)),
    "forward pre hook": both(lambda m: m.heads["a"].register_forward_pre_hook(lambda module, args: (args[0] * 2,))),
    "hook in a nested module": both(lambda m: m.body[1][0].register_forward_hook(lambda module, args, out: -out)),
    "hook that comes and goes": removed_hook,
    "forward of an instance": both(forward_of_instance),
    "gradient hook": both(lambda m: m.heads["a"].weight.register_hook(lambda g: g * 0.5)),
    "masters edited": both(edited),
    "moments replaced": one_moment,
    "state edited in place": in_place,
    "one counter edited in place": one_counter,
    "one state emptied": emptied_one,
    "state cleared": lambda models, optimizer: optimizer.state.clear(),
    "state loaded": loaded,
    "maximize": flags(maximize=True),
    "nesterov": flags(nesterov=True, momentum=0.9, dampening=0),
    "momentum that begins": flags(momentum=0.8),
    "momentum that ends": flags(momentum=0),
    "weight decay that begins": flags(weight_decay=0.1),
    "decoupled weight decay": flags(decoupled_weight_decay=True, weight_decay=0.2),
    "foreach": flags(foreach=True),
    "learning rate": flags(lr=0.1),
    "learning rate as a tensor": flags(lr=torch.tensor(0.1)),
    "betas": flags(betas=(0.5, 0.9)),
    "betas as a list": betas_as_a_list,
}


@pytest.mark.parametrize("kind", ["adam", "dampened"])
@pytest.mark.parametrize("name", EVENTS)
def test_an_event_between_steps_is_followed(name: str, kind: str) -> None:
    race = Race(kind)
    race.turn(2)
    race.event(EVENTS[name])
    race.turn(3)


# What a window has summed already of a parameter that leaves, changes its name or comes.
IN_WINDOW = ("parameter replaced", "weight norm", "modules swapped", "parameter replaced in its group", "frozen")


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")  # plain torch's
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in IN_WINDOW else pytest.mark.slow) for n in EVENTS])
def test_an_event_in_an_open_window_is_followed(name: str) -> None:
    race = Race("momentum", accumulate=2)
    race.turn()
    race.turn(within=EVENTS[name])
    race.turn(2)


# What plain torch does not do either (an error of its own), or what a compiled backward cannot do.
REFUSED: dict[str, tuple[str, Event]] = {
    "gradient hook that prints": ("MP523", both(lambda m: m.heads["a"].weight.register_hook(lambda g: print(g)))),
    "hook after accumulation": (
        "MP523",
        both(lambda m: m.heads["a"].weight.register_post_accumulate_grad_hook(lambda p: None)),
    ),
    "backward hook": ("MP523", both(lambda m: m.heads["a"].register_full_backward_hook(lambda module, i, o: None))),
    "another dtype": ("MP522", both(lambda m: m.bfloat16())),
    "another device": ("MP522", both(lambda m: m.to("meta"))),
    "amsgrad that came later": ("MP521", flags(amsgrad=True)),
    "a step of its own": ("MP525", lambda models, optimizer: setattr(optimizer, "step", lambda closure=None: None)),
    "all replaced, and the optimizer holds the old": (
        "MP522",
        lambda models, optimizer: [assigned(models[0]), setattr(models[1], "weight", nn.Parameter(torch.ones(3)))],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_event_that_cannot_be_followed_is_refused_by_code(name: str) -> None:
    race = Race()
    race.turn(2)
    code, change = REFUSED[name]
    change((race.mine, race.mine_loss), race.optimizer)
    before = [p.detach().clone() for p in race.mine.parameters() if not p.is_meta]
    for _ in range(2):
        with pytest.raises(TrainingError) as caught:
            race.step(torch.randn(5, 6))
        assert caught.value.code == code
    assert all(torch.equal(p, q) for p, q in zip(race.mine.parameters(), before, strict=False))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    names=st.lists(st.sampled_from(sorted(EVENTS)), min_size=2, max_size=5),
    kind=st.sampled_from(sorted(MAKERS)),
    accumulate=st.sampled_from([1, 2]),
)
def test_events_in_any_order(names: list[str], kind: str, accumulate: int) -> None:
    race = Race(kind, accumulate)
    race.turn()
    for name in names:
        try:
            race.event(EVENTS[name])
        except Exception:
            return  # the events do not go together: torch itself refused the second one
        try:
            race.turn(2)
        except MPCompileError:
            return


def test_a_window_that_ends_after_a_replacement_shows_no_graph_of_what_is_gone() -> None:
    race = Race("sgd", accumulate=2)
    race.turn()
    assert race.step.graph is not None
    race.step(torch.randn(5, 6))
    race.mine.heads["a"] = nn.Linear(6, 3)
    assert race.step.end_window().stepped
    with pytest.raises(TrainingError, match="MP542"):
        race.step.emitted()
