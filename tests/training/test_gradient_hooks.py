"""Hooks on tensors, parameters and modules: those that are functions of the gradient are part of the step."""

from __future__ import annotations

import copy

import pytest
import torch
from beside import train_beside
from torch import nn, optim
from torch.nn import functional as F

from mpcompile.api import mpcompile
from mpcompile.errors import TrainingError

BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


class Net(nn.Module):
    def __init__(self, hook):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c, self.hook = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3), hook

    def forward(self, x, y):
        h = self.a(x).tanh()
        h = self.hook(h)
        return F.cross_entropy(self.b(h), y) + F.cross_entropy(self.c(h), y)


def reverse(h):
    if h.requires_grad:
        h.register_hook(lambda g: -g)
    return h


def one_branch(h):
    r = h * 1.0
    r.register_hook(lambda g: -0.3 * g)
    return h + r.relu()


def in_order(h):
    """The first that was set is the first to see the gradient; readers before the hook count too."""
    before = h.sin()
    h.register_hook(lambda g: g.clamp(-0.01, 0.01))
    h.register_hook(lambda g: g * 3 + 0.001)
    return h + before


def written_later(h):
    h = h * 1.0
    h.register_hook(lambda g: 2 * g + 0.01)
    h.mul_(0.5)
    h.register_hook(lambda g: g.clamp(-0.02, 0.02))
    return h


def seen_through_a_view(h):
    view = h.view(-1)
    h.register_hook(lambda g: g / (g.norm() + 1))
    return view.view(h.shape) + h


def removed(h):
    h.register_hook(lambda g: 0 * g).remove()
    return h


def on_the_weight(h):
    return h


HOOKS = [reverse, one_branch, in_order, written_later, seen_through_a_view, removed]


def batches(sizes=(5, 5, 5)):
    torch.manual_seed(0)
    return [(torch.randn(n, 6), torch.randint(0, 3, (n,))) for n in sizes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_on_a_tensor_of_the_forward_acts(hook, backend):
    train_beside(Net(hook), batches((5, 5, 7, 4)), backend=backend)


def test_a_hook_that_acts_changes_the_training():
    """The comparison above can fail."""
    model = Net(reverse)
    with pytest.raises(AssertionError):
        train_beside(model, batches(), copied=copy.deepcopy(Net(removed)))


@pytest.mark.parametrize("low", [(), ("aten.linear", "aten.tanh")])
def test_it_sees_the_whole_gradient_where_its_tensor_is_low(low):
    model = Net(reverse)
    plain = copy.deepcopy(model)
    own, other = (optim.SGD(m.parameters(), 0.1) for m in (model, plain))
    step = mpcompile(model, "bf16", backend="eager", low=list(low)).train_step(own)
    for batch in batches():
        step(*batch)
        other.zero_grad()
        plain(*batch).backward()
        other.step()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.005)
    nodes = step.report().to_dict()["nodes"]
    assert any(n["kind"] == "matmul" and n["precision"] == "bf16" for n in nodes)


def hooked(model):
    model.a.weight.register_hook(lambda g: g.clamp(-0.002, 0.002))
    model.a.weight.register_hook(lambda g: g * 5)
    model.b.bias.register_hook(lambda g: torch.zeros_like(g))
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hook_on_a_parameter_acts(backend):
    train_beside(hooked(Net(on_the_weight)), batches((5, 5, 7, 4)), backend=backend, copied=hooked(Net(on_the_weight)))


def test_a_hook_on_a_parameter_sees_the_gradient_that_autograd_gives_it():
    """In a window each microbatch's, as in a loop of `loss.backward()`; and in FP32 where the products are low."""
    model, plain = hooked(Net(on_the_weight)), hooked(Net(on_the_weight))
    own, other = (optim.SGD(m.parameters(), 0.5) for m in (model, plain))
    step = mpcompile(model, "fp32", backend="eager").train_step(own, accumulate=2)
    for first, second in (batches((5, 5)), batches((4, 4))):
        step(*first)
        step(*second)
        other.zero_grad()
        (plain(*first) / 2).backward()
        (plain(*second) / 2).backward()
        other.step()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)
    model = hooked(Net(on_the_weight))
    step = mpcompile(model, "bf16", backend="eager", low=["aten.linear"]).train_step(optim.SGD(model.parameters(), 1.0))
    before = model.a.weight.detach().clone()
    step(*batches()[0])
    assert (model.a.weight - before).abs().max() <= 0.01 + 1e-6
    assert (model.a.weight - before).abs().max() > 0.009


def module_hooked(model):
    model.b.register_full_backward_hook(lambda module, gin, gout: (gin[0] * 0.5 + gout[0].mean(),))
    model.c.register_full_backward_pre_hook(lambda module, gout: (gout[0] * 3,))
    model.a.register_full_backward_pre_hook(lambda module, gout: (-gout[0],))
    return model


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hook_on_a_module_acts(backend):
    make = lambda: module_hooked(Net(on_the_weight))  # noqa: E731
    train_beside(make(), batches((5, 5, 7, 4)), backend=backend, copied=make())


SEEN = []


class Keeper:
    def __init__(self):
        self.last = None

    def keep(self, grad):
        self.last = grad
        return grad


REFUSED = {
    "keeps": lambda h: h.register_hook(lambda g: SEEN.append(g)),
    "gives nothing": lambda h: h.register_hook(lambda g: None),
    "writes an attribute": lambda h: h.register_hook(Keeper().keep),
    "asks for values": lambda h: h.register_hook(lambda g: g * 2 if g.norm() > 1 else g),
    "hooks several": lambda h: torch.autograd.graph.register_multi_grad_hook([h], lambda gs: None),
    "saved tensors": lambda h: torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t).__enter__(),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_hook_that_is_no_function_of_the_gradient_is_refused(kind):
    def hook(h):
        REFUSED[kind](h)
        return h

    model = Net(hook)
    before = copy.deepcopy(model.state_dict())
    step = mpcompile(model, "fp32", backend="eager").train_step(optim.SGD(model.parameters(), 0.1))
    with pytest.raises(TrainingError, match="MP523"):
        step(*batches()[0])
    assert not SEEN
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_hooks_on_parameters_and_modules_that_only_look_are_refused():
    for register, name in (
        (lambda m: m.a.weight.register_hook(lambda g: SEEN.append(g)), "a.weight"),
        (lambda m: m.a.weight.register_post_accumulate_grad_hook(lambda p: None), "a.weight"),
        (lambda m: m.b.register_full_backward_hook(lambda *_: None), "Linear"),
        (lambda m: m.b.register_backward_hook(lambda *_: None), "b"),
    ):
        model = Net(on_the_weight)
        register(model)
        step = mpcompile(model, "fp32", backend="eager").train_step(optim.SGD(model.parameters(), 0.1))
        with pytest.raises(TrainingError, match=rf"MP523(.|\n)*{name}"):
            step(*batches()[0])


def test_saving_on_the_cpu_is_left_to_the_compiler():
    def hook(h):
        with torch.autograd.graph.save_on_cpu():
            return h.sin()

    train_beside(Net(hook), batches())
