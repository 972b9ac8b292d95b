"""Optimizers as hosts hand them over: wrapped, several, patched, shared between steps, with parameters of their own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils._pytree import tree_leaves

from mpcompile.api import mpcompile
from mpcompile.errors import TrainingError
from mpcompile.training.loss_scale.scale import LossScale
from mpcompile.training.optimizer.hosts import unwrap


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def square(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


def stepped(model: nn.Module, optimizer: Any, loss: Any = square, **options: Any) -> Any:
    return mpcompile(model, "fp32", backend="eager").train_step(optimizer, loss, **options)


def race(step: Any, mine: nn.Module, plain: nn.Module, twins: list[Any], count: int = 3, loss: Any = square) -> None:
    for _ in range(count):
        x = torch.randn(5, 4)
        step(x)
        for twin in twins:
            twin.zero_grad()
        loss(plain, x).backward()
        for twin in twins:
            twin.step()
    for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def made(module: str, name: str, base: type, attribute: str) -> Callable[[Any], Any]:
    """A host's wrapper: a class made on the fly whose `step` steps an inner optimizer."""

    def wrap(inner: Any) -> Any:
        host = type(name, (), {"__module__": module, "step": lambda self, *args: getattr(self, attribute).step(*args)})
        mixed = type(f"{name}{type(inner).__name__}", (host, base), {})
        wrapper = object.__new__(mixed)
        wrapper.__dict__.update({k: v for k, v in inner.__dict__.items() if k != "step"})
        wrapper.__dict__[attribute] = inner
        return wrapper

    return wrap


WRAPPERS = {
    "fabric": made("lightning.fabric.wrappers", "_FabricOptimizer", optim.SGD, "_optimizer"),
    "lightning": made("lightning.pytorch.core.optimizer", "LightningOptimizer", optim.SGD, "_optimizer"),
    "old lightning": made("pytorch_lightning.core.optimizer", "LightningOptimizer", optim.SGD, "_optimizer"),
}


@pytest.mark.parametrize("host", [*WRAPPERS, "fabric in lightning"])
def test_a_host_s_wrapper_is_taken_off(host: str) -> None:
    mine, plain = net(), net()
    inner = optim.SGD(mine.parameters(), 0.1, momentum=0.9)
    wrapped = inner
    for name in reversed(host.split(" in ")):
        wrapped = WRAPPERS[name](wrapped)
    schedule = LambdaLR(inner, lambda epoch: 0.5**epoch)
    twin = optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    other = LambdaLR(twin, lambda epoch: 0.5**epoch)
    step = stepped(mine, wrapped)
    for _ in range(2):
        race(step, mine, plain, [twin], 2)
        schedule.step()
        other.step()


def test_accelerate_s_own_wrapper_is_taken_off() -> None:
    accelerate = pytest.importorskip("accelerate")
    mine, plain = net(), net()
    inner = optim.AdamW(mine.parameters(), 0.05)
    wrapped = accelerate.Accelerator(cpu=True).prepare(inner)
    assert type(wrapped) is not optim.AdamW
    assert unwrap(wrapped) is inner
    race(stepped(mine, wrapped), mine, plain, [optim.AdamW(plain.parameters(), 0.05)])


class Steps(optim.SGD):
    """Its `step` steps another optimizer."""

    def __init__(self, inner: Any) -> None:
        self.__dict__.update(inner.__dict__)
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Clips(optim.AdamW):
    """Its `step` does more, then calls the one that works."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Sam(optim.Optimizer):
    """A class of one's own around another optimizer, as SAM and Lookahead are written."""

    def __init__(self, params: Any) -> None:
        super().__init__(list(params), {"rho": 0.05})
        self.base_optimizer = optim.SGD(self.param_groups, 0.1)

    def step(self, closure: Any = None) -> Any:
        return self.base_optimizer.step(closure)


class Plain(optim.SGD):
    """Nothing of its own: what a library calls by its own name."""


class Lion(optim.Optimizer):
    """A class of one's own in torch.optim's form."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.9})

    def _init_group(self, group: Any, params: Any, grads: Any, moments: Any) -> None:
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                if not self.state[p]:
                    self.state[p]["moment"] = torch.zeros_like(p)
                moments.append(self.state[p]["moment"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            moments: list[Tensor] = []
            self._init_group(group, params, grads, moments)
            for p, g, m in zip(params, grads, moments, strict=True):
                m.mul_(group["beta"]).add_(g, alpha=1 - group["beta"])
                p.add_(torch.sign(m), alpha=-group["lr"])


class Idle(optim.Optimizer):
    """In torch.optim's form, and writes to no parameter."""

    _init_group = Lion._init_group

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"beta": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["moment"].mul_(group["beta"])


def patched(params: Any) -> Any:
    optimizer = optim.SGD(params, 0.1)
    before = optimizer.step
    optimizer.step = lambda closure=None: before(closure)  # type: ignore[method-assign]
    return optimizer


def patched_over_a_scheduler(params: Any) -> Any:
    import functools

    optimizer = optim.SGD(params, 0.1)
    LambdaLR(optimizer, lambda epoch: 1.0)
    before = optimizer.step
    optimizer.step = functools.wraps(before)(lambda closure=None: before(closure))  # type: ignore[method-assign]
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda params: Steps(optim.SGD(params, 0.1)),
        lambda params: Clips(params, 0.1),
        Sam,
        patched,
        patched_over_a_scheduler,
    ],
    ids=["steps another", "clips first", "sam", "patched", "patched over a scheduler"],
)
def test_a_step_that_is_not_the_one_traced_is_refused(make: Any) -> None:
    model = net()
    with pytest.raises(TrainingError, match="MP525"):
        stepped(model, make(list(model.parameters())))


def test_a_step_that_writes_to_no_parameter_is_refused() -> None:
    model = net()
    step = stepped(model, Idle(list(model.parameters())))
    with pytest.raises(TrainingError, match="MP525"):
        step(torch.randn(5, 4))


@pytest.mark.parametrize("make", [Plain, Lion])
def test_a_class_of_one_s_own_in_torch_s_form_is_traced(make: Any) -> None:
    mine, plain = net(), net()
    race(stepped(mine, make(mine.parameters(), lr=0.01)), mine, plain, [make(plain.parameters(), lr=0.01)])


@pytest.mark.parametrize("given", [None, "adam", nn.Linear(2, 2), [], [None], 3])
def test_what_is_no_optimizer_is_refused(given: Any) -> None:
    with pytest.raises(TrainingError, match="MP541"):
        stepped(net(), given)


# --------------------------------------------------------------------------------------------------- several of them


def parts(model: nn.Sequential) -> list[optim.Optimizer]:
    return [
        optim.AdamW(model[0].parameters(), 0.05),
        optim.SGD(model[2].parameters(), 0.1, momentum=0.9, dampening=0.3, nesterov=False),
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_optimizers_have_one_norm_one_clip_and_one_skip(accumulate: int) -> None:
    mine, plain = net(), net()
    both, twins = parts(mine), parts(plain)
    schedule, other = (OneCycleLR(one[1], 0.2, total_steps=20) for one in (both, twins))
    step = stepped(mine, both, max_grad_norm=0.1, scale=LossScale.dynamic(8.0), accumulate=accumulate)
    for turn in range(6):
        bad = turn == 3
        for _ in range(accumulate):
            x = torch.randn(5, 4)
            result = step(x * float("inf") if bad else x)
            (square(plain, x) / accumulate).backward()
        if not bad:
            norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            torch.testing.assert_close(result.grad_norm, norm, rtol=1e-5, atol=1e-6)
            for twin in twins:
                twin.step()
        assert bool(result.stepped) is not bad
        plain.zero_grad()
        schedule.step()
        other.step()
        for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    for one, twin in zip(both, twins, strict=True):
        states = one.state_dict()["state"], twin.state_dict()["state"]
        for a, b in zip(*map(tree_leaves, states), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_parameter_in_two_optimizers_is_refused() -> None:
    model = net()
    with pytest.raises(TrainingError, match="MP522"):
        stepped(model, [optim.SGD(model.parameters(), 0.1), optim.AdamW(model[0].parameters())])


def test_two_steps_share_one_optimizer() -> None:
    mine, plain = net(), net()
    one, twin = (optim.Adam(m.parameters(), 0.05, eps=1e-4) for m in (mine, plain))
    losses = [square, lambda m, x: (m(x) - 1).abs().mean(), lambda m, x: m[0](x).square().mean()]
    steps = [stepped(mine, one, loss) for loss in losses]
    for turn in range(12):
        race(steps[turn % 3], mine, plain, [twin], 1, losses[turn % 3])
    counts = [[s["step"].item() for s in o.state.values()] for o in (one, twin)]
    assert counts[0] == counts[1]


def test_steps_of_the_optimizer_s_own_between_those_of_two_steps() -> None:
    mine, plain = net(), net()
    one, twin = (optim.SGD(m.parameters(), 0.05, momentum=0.9, dampening=0.5) for m in (mine, plain))
    first, second = stepped(mine, one), stepped(mine, one, lambda m, x: m(x).abs().mean())
    for _ in range(2):
        race(first, mine, plain, [twin], 1)
        x = torch.randn(5, 4)
        for model, optimizer in ((mine, one), (plain, twin)):
            optimizer.zero_grad()
            square(model, x).backward()
            optimizer.step()
        one.zero_grad()
        race(second, mine, plain, [twin], 1, lambda m, x: m(x).abs().mean())


# ------------------------------------------------------------------------------------- parameters outside of the model


@pytest.mark.parametrize("kind", ["temperature", "vector", "second model"])
def test_what_the_optimizer_holds_and_the_model_does_not_is_trained(kind: str) -> None:
    def run(with_step: bool) -> list[Tensor]:
        model = net()
        extra = {
            "temperature": lambda: nn.ParameterList([nn.Parameter(torch.zeros(()))]),
            "vector": lambda: nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))]),
            "second model": lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)),
        }[kind]()
        optimizer = optim.SGD([{"params": [*model.parameters()]}, {"params": [*extra.parameters()], "lr": 0.2}], 0.1)
        reads: dict[str, Callable[[Tensor], Tensor]] = {
            "temperature": lambda out: out * extra[0].exp(),
            "vector": lambda out: out * extra[0] + extra[1],
            "second model": lambda out: extra(out),
        }
        loss = lambda m, x: (reads[kind](m(x)) - 1).square().mean()  # noqa: E731
        step = stepped(model, optimizer, loss) if with_step else None
        torch.manual_seed(3)
        for turn in range(5):
            x = torch.randn(6, 4)
            if turn == 3:
                with torch.no_grad():
                    next(extra.parameters()).add_(0.1)
            if step is not None:
                step(x)
            else:
                optimizer.zero_grad()
                loss(model, x).backward()
                optimizer.step()
        return [*model.parameters(), *extra.parameters()]

    for mine, plain in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


def test_a_batch_that_asks_for_a_gradient_is_refused() -> None:
    model = net()
    step = stepped(model, optim.SGD(model.parameters(), 0.1))
    before = nn.Linear(4, 4)
    with pytest.raises(TrainingError, match="MP536"):
        step(before(torch.randn(5, 4)))


# ---------------------------------------------------------------------------------------------- skipped from the start


@pytest.mark.parametrize(
    "make", [optim.AdamW, lambda p: optim.SGD(p, 0.1, momentum=0.9), lambda p: optim.SGD(p, 0.1, 0.9, 0.5), optim.RAdam]
)
def test_a_step_that_is_skipped_from_the_start_leaves_no_state(make: Any) -> None:
    mine, plain = net(), net()
    one, twin = make(mine.parameters()), make(plain.parameters())
    step = stepped(mine, one, scale=LossScale.dynamic(8.0))
    assert not step(torch.full((5, 4), float("nan"))).stepped
    assert one.state_dict()["state"] == {}
    assert not step(torch.full((5, 4), float("inf"))).stepped
    race(step, mine, plain, [twin])
    for a, b in zip(*(tree_leaves(o.state_dict()["state"]) for o in (one, twin)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "option",
    [
        {"max_grad_norm": -1.0},
        {"max_grad_norm": 0},
        {"max_grad_norm": float("nan")},
        {"max_grad_norm": "1"},
        {"max_grad_norm": True},
        {"max_grad_norm": torch.ones(2)},
        {"accumulate": 2.5},
        {"accumulate": 0},
        {"accumulate": -1},
        {"accumulate": True},
        {"accumulate": "2"},
        {"accumulate": None},
        {"masters": "half"},
        {"masters": None},
        {"backend": "nvfuser"},
        {"backend": 1},
        {"cuda_graph": 1},
        {"cuda_graph": "always"},
        {"recompute": None},
        {"chunk_loss": "no"},
        {"chunk_loss": 1},
        {"loss": 3},
        {"max_norm": 1.0},
        {"acumulate": 2},
    ],
    ids=repr,
)
def test_an_option_that_cannot_be_is_refused(option: dict[str, Any]) -> None:
    model = net()
    with pytest.raises(TrainingError, match="MP541"):
        stepped(model, optim.SGD(model.parameters(), 0.1), **option)


@pytest.mark.parametrize("scale", [float("nan"), 0, -2.0, float("inf"), True, "automatic", None, 1e-45, 1e300, [1.0]])
def test_a_scale_that_cannot_be_is_refused(scale: Any) -> None:
    model = net()
    with pytest.raises(TrainingError, match="MP501"):
        stepped(model, optim.SGD(model.parameters(), 0.1), scale=scale)


@pytest.mark.parametrize(
    "field",
    [
        {"init": float("nan")},
        {"init": "1"},
        {"growth": float("inf")},
        {"growth": 1},
        {"backoff": 1.0},
        {"backoff": float("nan")},
        {"interval": 2.5},
        {"interval": True},
        {"hysteresis": 0},
        {"floor": -1.0},
        {"cap": 1.0},
        {"refill": "never"},
        {"at_floor": None},
    ],
    ids=repr,
)
def test_a_rule_of_the_scale_that_cannot_be_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="MP501"):
        LossScale.dynamic(**field)


def test_numbers_of_numpy_are_numbers() -> None:
    model = net()
    step = stepped(
        model,
        optim.SGD(model.parameters(), 0.1),
        accumulate=np.int64(2),
        max_grad_norm=np.float32(1),
        scale=np.float64(2),
    )
    assert [bool(step(torch.randn(5, 4)).stepped) for _ in range(2)] == [False, True]


# -------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("several", [False, True])
def test_a_copy_of_a_step_trains_on_and_leaves_the_first_alone(how: str, several: bool) -> None:
    model = net()
    step = stepped(model, parts(model) if several else optim.AdamW(model.parameters(), 0.05), accumulate=2, scale=4.0)
    data = [torch.randn(5, 4) for _ in range(6)]
    for x in data[:3]:
        step(x)  # one window, and a half
    other = copy.deepcopy(step) if how == "deepcopy" else pickle.loads(pickle.dumps(step))
    assert other.model is not model
    for x in data[3:]:
        torch.testing.assert_close(other(x).loss, step(x).loss, rtol=0, atol=0)
    for p, q in zip(other.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    other(data[0])
    other(data[0])
    assert not torch.equal(next(other.model.parameters()), next(model.parameters()))


def test_only_parameters_without_elements() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(0, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w.t()).sum()

    model = Empty()
    result = mpcompile(model, "fp32", backend="eager").train_step(optim.AdamW(model.parameters()))(torch.randn(5, 4))
    assert (result.loss.item(), bool(result.stepped), result.grad_norm.item()) == (0.0, True, 0.0)
