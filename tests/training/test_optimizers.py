"""Every dense optimizer of torch.optim, emitted: the same weights and the same state as torch's own loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from mpcompile import laws
from mpcompile.api import mpcompile
from mpcompile.errors import TrainingError
from mpcompile.training.emitted.weave import precision_graph
from mpcompile.training.optimizer.build import rounds_itself

CASES = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "foreach": True}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    (optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "maximize": True}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    (optim.Adam, {}),
    (optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "fused": True}),
    (optim.AdamW, {"maximize": True, "betas": (0.8, 0.95)}),
    (optim.AdamW, {"lr": torch.tensor(1e-3), "foreach": False}),
    (optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.RAdam, {}),
    (optim.Adamax, {"weight_decay": 0.1}),
    (optim.Adadelta, {}),
    (optim.Adagrad, {"lr_decay": 0.1}),
    (optim.RMSprop, {"centered": True, "momentum": 0.9}),
    (optim.ASGD, {"lr": 0.1, "t0": 2}),
    (optim.Rprop, {"etas": (0.3, 1.3)}),
    (optim.Adafactor, {"weight_decay": 0.1}),
    (optim.Muon, {}),
]


class Net(nn.Module):
    """Two linears, a parameter with no dimension, and one that no loss reads."""

    def __init__(self, matrices_alone: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=not matrices_alone), nn.Linear(8, 3, bias=False)
        if not matrices_alone:
            self.gain, self.unused = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(3))

    def forward(self, x, y):
        h = torch.tanh(self.first(x)) * getattr(self, "gain", 1.0)
        return nn.functional.mse_loss(self.second(h), y)


def batches(count):
    return [(torch.randn(5, 6), torch.randn(5, 3)) for _ in range(count)]


def largest_difference(mine, theirs):
    assert set(mine) == set(theirs)
    pairs = [(mine[k][n], v) for k in theirs for n, v in theirs[k].items() if isinstance(v, torch.Tensor)]
    assert all(set(mine[k]) == set(theirs[k]) for k in theirs)
    return max((float((a - b).abs().max() / (1 + b.abs().max())) for a, b in pairs), default=0.0)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda c: getattr(c, "__name__", None))
def test_equals_torchs_own_loop(kind, options):
    torch.manual_seed(0)
    model = Net(matrices_alone=kind is optim.Muon)
    twin = copy.deepcopy(model)
    mine, theirs = (kind(m.parameters(), **copy.deepcopy(options)) for m in (model, twin))
    schedules = [optim.lr_scheduler.StepLR(o, 3, 0.5) for o in (mine, theirs)]
    step = mpcompile(model, "fp32", backend="eager").train_step(mine)
    for x, y in batches(8):
        result = step(x, y)
        loss = twin(x, y)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        for schedule in schedules:
            schedule.step()
        torch.testing.assert_close(result.loss, loss.detach())
    for name, p in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=2e-6, atol=2e-6)
    assert largest_difference(mine.state_dict()["state"], theirs.state_dict()["state"]) < 2e-6
    # And the state goes on in plain training.
    theirs.load_state_dict(mine.state_dict())
    theirs.step()
    assert len(step.specializations) == 1


@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda c: getattr(c, "__name__", None))
def test_a_skipped_step_leaves_every_bit(kind, options):
    torch.manual_seed(0)
    model = Net(matrices_alone=kind is optim.Muon)
    optimizer = kind(model.parameters(), **copy.deepcopy(options))
    step = mpcompile(model, "fp32", backend="eager").train_step(optimizer)
    ((x, y),) = batches(1)
    step(x, y)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    result = step(x, y * float("inf"))
    assert not result.stepped
    assert not result.finite
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in weights.items())
    assert largest_difference(optimizer.state_dict()["state"], state) == 0
    assert step(x, y).stepped
    assert step.state_dict()["skipped"] == 1


def test_groups_frozen_parameters_and_a_new_group():
    torch.manual_seed(0)
    model = Net()
    model.second.weight.requires_grad_(False)
    twin = copy.deepcopy(model)

    def make(m):
        groups = [{"params": [m.first.weight], "lr": 0.1}, {"params": [m.first.bias], "weight_decay": 0.5, "lr": 0.05}]
        return optim.AdamW(groups)

    mine, theirs = make(model), make(twin)
    step = mpcompile(model, "fp32", backend="eager").train_step(mine)
    for turn, (x, y) in enumerate(batches(6)):
        if turn == 3:
            for o, m in ((mine, model), (theirs, twin)):
                o.add_param_group({"params": [m.gain], "lr": 0.3})
                o.param_groups[1]["weight_decay"] = 0.0
        step(x, y)
        theirs.zero_grad()
        twin(x, y).backward()
        theirs.step()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=2e-6, atol=2e-6)


def test_one_cycle_moves_lr_and_betas_without_a_new_trace():
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    mine, theirs = (optim.AdamW(m.parameters(), foreach=False) for m in (model, twin))
    schedules = [optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12) for o in (mine, theirs)]
    step = mpcompile(model, "fp32", backend="eager").train_step(mine)
    made = set()
    for x, y in batches(10):
        step(x, y)
        made |= {id(u) for u in step.updates}
        theirs.zero_grad()
        twin(x, y).backward()
        theirs.step()
        for schedule in schedules:
            schedule.step()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=2e-6, atol=2e-6)
    assert len(made) == 1


def test_optimizer_state_that_is_loaded_is_the_state_that_is_used():
    torch.manual_seed(0)
    model = Net()
    optimizer = optim.AdamW(model.parameters())
    step = mpcompile(model, "fp32", backend="eager").train_step(optimizer)
    data = batches(6)
    for batch in data[:3]:
        step(*batch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for batch in data[3:]:
        step(*batch)
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for batch in data[3:]:
        step(*batch)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in after.items())


@pytest.mark.parametrize("kind", [optim.LBFGS, lambda p: optim.SparseAdam(list(p)), "own"])
def test_what_cannot_be_emitted_names_the_drop_in_way(kind):
    class Own(optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

    model = Net()
    optimizer = Own(model.parameters()) if kind == "own" else kind(model.parameters())
    step = mpcompile(model, "fp32", backend="eager").train_step(optimizer)
    with pytest.raises(TrainingError, match=r"MP521(.|\n)*drop-in"):
        step(*batches(1)[0])


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(TrainingError, match="MP522"):
        mpcompile(Net(), "fp32", backend="eager").train_step(optim.SGD(Net().parameters(), 0.1))


class NoSync(TorchDispatchMode):
    """Fails on what would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "_to_cpu")), str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "options"), [c for c in CASES if not torch.is_tensor(c[1].get("lr"))],
                         ids=lambda c: getattr(c, "__name__", None))  # fmt: skip
def test_the_steady_state_asks_nothing(kind, options):
    """A learning rate that is a tensor is read where it lies: on the host, or at the price of a wait."""
    model = Net(matrices_alone=kind is optim.Muon)
    optimizer = kind(model.parameters(), **copy.deepcopy(options))
    schedule = optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
    step = mpcompile(model, "fp32", backend="eager").train_step(optimizer, max_grad_norm=1.0)
    data = batches(4)
    step(*data[0])
    with NoSync():
        for batch in data[1:]:
            step(*batch)
            schedule.step()


@pytest.mark.parametrize(("kind", "rounds"), [(optim.Muon, True), (optim.AdamW, False)])
def test_an_update_that_rounds_itself_is_told_apart(kind, rounds):
    """Muon orthogonalises in BF16: Inductor must keep those roundings (and then it equals torch's loop)."""
    model = Net(matrices_alone=True)
    step = mpcompile(model, "bf16", backend="eager", low=["first"]).train_step(kind(model.parameters()))
    step(*batches(1)[0])
    (updater,) = step.updates
    assert rounds_itself(updater.make().module) == rounds
    assert list(laws.breaches(precision_graph(*step.emitted()))) == []
    rows = [n for n in step.report().to_dict()["nodes"] if n["phase"] == "optimizer" and n["precision"] == "bf16"]
    assert {(n["decided_by"], n["verdict"]) for n in rows if n["kind"] != "cast"} == (
        {("user-cast", "low")} if rounds else set()
    )


@pytest.mark.slow
def test_the_compiled_muon_equals_torchs_own_loop():
    torch.manual_seed(0)
    model = Net(matrices_alone=True)
    twin = copy.deepcopy(model)
    mine, theirs = optim.Muon(model.parameters(), lr=0.01), optim.Muon(twin.parameters(), lr=0.01)
    step = mpcompile(model, "fp32").train_step(mine)
    for x, y in batches(4):
        step(x, y)
        theirs.zero_grad()
        twin(x, y).backward()
        theirs.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
