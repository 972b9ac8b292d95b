"""Autograd functions and custom operators with a backward of their own, in the step: theirs is the one that trains."""

from __future__ import annotations

import pytest
import torch
from beside import train_beside
from torch import nn
from torch.nn import functional as F

from mpcompile.api import mpcompile
from mpcompile.errors import TrainingError

BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


class Gelu(torch.autograd.Function):
    """Bloom's: the derivative of the approximation, as its author wrote it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
        return grad * (0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.by * grad, None


class Product(torch.autograd.Function):
    """Two results, one of integers; a weight among its operands; a backward that asks what is needed."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        out = x @ weight.t()
        best = out.argmax(-1)
        ctx.mark_non_differentiable(best)
        return out, best

    @staticmethod
    def backward(ctx, grad, _):
        x, weight = ctx.saved_tensors
        gx = grad @ weight if ctx.needs_input_grad[0] else None
        gw = 2 * grad.t() @ x if ctx.needs_input_grad[1] else None
        return gx, gw


class ByAddress(torch.autograd.Function):
    """A kernel that a trace cannot enter, forward and backward: it asks for addresses and values."""

    @staticmethod
    def forward(ctx, x):
        assert x.data_ptr() or not x.numel()
        ctx.scale = 1.0 if float(x.sum()) > 0 else 2.0
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy().copy()) * 1.0

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(grad.numpy() * ctx.scale) * x.cos()


class HalfTraced(torch.autograd.Function):
    """Only the backward cannot be traced."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos() if float(grad.abs().sum()) >= 0 else grad


class Net(nn.Module):
    def __init__(self, act, width=8):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.act = nn.Linear(width, width), nn.Linear(width, 4), act

    def forward(self, x, y):
        return F.cross_entropy(self.b(self.act(self, self.a(x))), y)


def product(net, h):
    out, best = Product.apply(h, net.a.weight)
    return out + best.unsqueeze(-1) * 0.01


KINDS = {
    "gelu": lambda net, h: Gelu.apply(h),
    "straight-through": lambda net, h: StraightThrough.apply(h),
    "reverse": lambda net, h: Reverse.apply(h, 0.3),
    "twice": lambda net, h: Gelu.apply(Reverse.apply(h, 0.3)) + Gelu.apply(h),
    "product": product,
    "address": lambda net, h: ByAddress.apply(h),
    "half": lambda net, h: HalfTraced.apply(h),
    "no grad": lambda net, h: h + _untrained(h),
    "checkpoint": lambda net, h: torch.utils.checkpoint.checkpoint(Gelu.apply, h, use_reentrant=False),
}


def _untrained(h):
    with torch.no_grad():
        return Gelu.apply(h)


def batches(sizes=(6, 6, 6)):
    torch.manual_seed(0)
    return [(torch.randn(n, 8), torch.randint(0, 4, (n,))) for n in sizes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_of_ones_own_is_the_one_that_trains(kind, backend):
    train_beside(Net(KINDS[kind]), batches(), backend=backend)


def test_compiled_too():
    """One that is traced, one that is not, in one graph that Inductor compiles."""
    act = lambda net, h: ByAddress.apply(Gelu.apply(h)) + product(net, h)  # noqa: E731
    train_beside(Net(act), batches(), backend="inductor")


@pytest.mark.parametrize("kind", ["gelu", "product", "half", "address"])
def test_it_holds_for_batches_of_other_sizes(kind):
    train_beside(Net(KINDS[kind]), batches((6, 5, 9, 3)))


@pytest.mark.parametrize("kind", ["gelu", "address"])
def test_it_holds_in_windows_and_in_the_emitted_graph(kind):
    model = Net(KINDS[kind])
    step = train_beside(model, batches())
    tensors = batches()[0]
    emitted = step.emitted()[0]
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        loss = step.graph(*emitted.arguments(tensors))[0]
    after = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    torch.testing.assert_close(loss, model(*tensors).detach())
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gelu", "product", "address"])
def test_around_it_products_run_low(kind, backend):
    model = Net(KINDS[kind])
    step = mpcompile(model, "bf16", backend=backend, low=["aten.linear"]).train_step(
        torch.optim.SGD(model.parameters(), 0.1)
    )
    x, y = batches()[0]
    wanted = model(x, y).item()
    loss = step(x, y).loss.item()
    assert loss == pytest.approx(wanted, rel=0.05)
    nodes = {n["id"]: n for n in step.report().to_dict()["nodes"]}
    assert any(n["kind"] == "matmul" and n["precision"] == "bf16" for n in nodes.values())


class Cast(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx, x):
        ctx.save_for_backward(x)
        Cast.seen.append(x.dtype)
        return x * 1.0

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        Cast.seen.append(grad.dtype)
        return grad


def test_the_casts_that_its_author_asks_for_are_made():
    model = Net(lambda net, h: Cast.apply(h))
    Cast.seen = []
    step = mpcompile(model, "bf16", backend="eager").train_step(torch.optim.SGD(model.parameters(), 0.1))
    step(*batches()[0])
    assert Cast.seen[-2:] == [torch.bfloat16, torch.bfloat16]
    Cast.seen = []
    step = mpcompile(model, "fp32", backend="eager").train_step(torch.optim.SGD(model.parameters(), 0.1))
    step(*batches()[0])
    assert set(Cast.seen) == {torch.float32}


def test_a_rule_for_it_is_followed():
    from mpcompile.rules import register, table

    model = Net(KINDS["gelu"])
    register("autograd::Gelu", "activation")
    try:
        plan = mpcompile(model, "bf16", backend="eager", strict=True, low=["aten.linear"]).train_step(
            torch.optim.SGD(model.parameters(), 0.1)
        )
        plan(*batches()[0])
        (node,) = [
            n for n in plan.specializations.__iter__().__next__().joint.forward.plan.graph if n.op == "autograd.Gelu"
        ]
        assert node.kind == "activation"
        assert node.precision == "bf16"
    finally:
        table.rules_for("aten")._rows.pop("autograd.Gelu")
        table.rules_for("aten")._found.clear()


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        raise ValueError("only on Tuesdays")

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(("function", "why"), [(Dirty, "writes to its inputs"), (Broken, "only on Tuesdays")])
def test_what_cannot_be_kept_is_refused_and_named(function, why):
    model = Net(lambda net, h: function.apply(h * 1.0))
    step = mpcompile(model, "fp32", backend="eager").train_step(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(TrainingError, match=f"MP534(.|\n)*{function.__name__}(.|\n)*{why}"):
        step(*batches()[0])


@torch.library.custom_op("mptest::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.detach().numpy() ** 3)


@cube.register_fake
def _(x):
    return torch.empty_like(x)


cube.register_autograd(
    lambda ctx, grad: grad * 2 * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@torch.library.custom_op("mptest::total", mutates_args=())
def total(xs: list[torch.Tensor], by: float) -> torch.Tensor:
    return sum(xs) * by


@total.register_fake
def _(xs, by):
    return torch.empty_like(xs[0])


total.register_autograd(lambda ctx, grad: ([grad * 3] * ctx.count, None),
                        setup_context=lambda ctx, inputs, output: setattr(ctx, "count", len(inputs[0])))  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_operators_with_a_registered_autograd_train_by_it(backend):
    train_beside(Net(lambda net, h: cube(h) + total([h, h * 2], 0.5)), batches((6, 6, 5, 4)), backend=backend)
