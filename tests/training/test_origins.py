"""What may be rounded, in numbers: low products, and outputs and gradients about as far from FP32's as torch.autocast's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from lowness import assert_low_products
from torch import Tensor, nn
from torch.nn import functional as F

from mpcompile import mpcompile

EPS = {"bf16": 2.0**-8, "fp16": 2.0**-11}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Of(nn.Module):
    """A model out of its layers and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def _linears() -> dict[str, nn.Module]:
    return {"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}


def _euler(m: nn.Module, x: Tensor) -> Tensor:
    for _ in range(30):
        x = x + 0.002 * torch.tanh(m.a(x))
    return x


def _leaky(m: nn.Module, x: Tensor) -> Tensor:
    state = torch.zeros_like(x)
    for step in range(30):
        state = 0.99 * state + 0.01 * m.a(x + step)
    return m.b(state)


def _revin(m: nn.Module, x: Tensor) -> Tensor:
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    return m.b(F.relu(m.a((x - mean) / std))) * std + mean


def _warp(m: nn.Module, x: Tensor) -> Tensor:
    grid = torch.arange(64.0) * 10 + m.a(x)
    return m.b(torch.sin(grid / 64))


def _distances(m: nn.Module, x: Tensor) -> Tensor:
    d = x[:, None] - x[None]
    return m.b(torch.exp(-d.square().mean(-1) / 2)[:, :64])


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "layer norm of a raw input": (lambda: Of(lambda m, x: m.b(F.relu(m.a(m.n(x)))), n=nn.LayerNorm(64), **_linears()),
                                  lambda: torch.randn(256, 64) + 1000),
    "batch norm of a raw input": (lambda: Of(lambda m, x: m.b(F.relu(m.a(m.n(x)))), n=nn.BatchNorm1d(64), **_linears()),
                                  lambda: torch.randn(256, 64) + 1000),
    "standardised by hand": (lambda: Of(lambda m, x: m.b(F.relu(m.a((x - 1000.0) / 2.0))), **_linears()),
                             lambda: torch.randn(256, 64) + 1000),
    "reversible norm": (lambda: Of(_revin, **_linears()), lambda: torch.randn(256, 64) + 1000),
    "euler steps": (lambda: Of(lambda m, x: _euler(m, x) - x, a=nn.Linear(64, 64)), lambda: torch.rand(256, 64) + 1),
    "leaky integrator": (lambda: Of(_leaky, **_linears()), lambda: torch.rand(256, 64)),
    "coordinates and a flow": (lambda: Of(_warp, **_linears()), lambda: torch.randn(256, 64)),
    "restoration": (lambda: Of(lambda m, x: x + 0.01 * m.b(F.relu(m.a(x))), **_linears()), lambda: 1 + torch.rand(256, 64)),
    "distances by hand": (lambda: Of(_distances, **_linears()), lambda: 100 + torch.randn(256, 64)),
    "a box": (lambda: Of(lambda m, x: (500 * x + m.a(x)) * (400 * x + m.b(x)), **_linears()), lambda: torch.rand(256, 64)),
}  # fmt: skip


def distance(found: Tensor, wanted: Tensor) -> float:
    assert torch.isfinite(found).all() or not torch.isfinite(wanted).all(), "not finite, and FP32 is"
    return float((found.detach().float() - wanted.detach()).norm() / (wanted.detach().norm() + 1e-12))


@pytest.mark.parametrize("low", ["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_no_farther_than_autocast(name: str, low: str) -> None:
    torch.manual_seed(0)
    build, sample = CASES[name]
    model, x = build(), sample()
    wanted = _run(model, x)
    with torch.autocast("cpu", DTYPES[low]):
        peer = _run(copy.deepcopy(model), x)
    mp = mpcompile(copy.deepcopy(model), f"{low},device=free-low", backend="eager")
    ours = _run(mp, x)
    assert_low_products(mp)
    for found, other, want in zip(ours, peer, wanted, strict=True):
        assert distance(found, want) <= 1.5 * distance(other, want) + 2 * EPS[low]


def _run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, less what of it is the input, and every gradient."""
    out = model(x)
    loss = out.float().square().mean() / 2.0**20  # so that no gradient leaves FP16's range
    grads = torch.autograd.grad(
        loss if float(loss.detach()) > 1.0 else loss * 2.0**20, list(model.parameters()), allow_unused=True
    )
    moved = out - x if out.shape == x.shape and float(x.detach().mean()) > 0.9 else out
    return [moved, *(g if g is not None else torch.zeros(()) for g in grads)]


@pytest.mark.parametrize("low", ["bf16", "fp16"])
@pytest.mark.parametrize("how", ["drop-in", "step"])
def test_gradients_of_rows_add_up_in_fp32(low: str, how: str) -> None:
    """A table of 4 rows, looked up 20,000 times: in the low type the sum of a row's gradients stands still."""
    torch.manual_seed(0)
    model = Of(lambda m, i: m.a(m.w[i]).square().sum() / 100, w=nn.Parameter(torch.randn(4, 64)), a=nn.Linear(64, 64))
    i = torch.randint(0, 2, (20000,))
    (wanted,) = torch.autograd.grad(model(i), [model.w])  # type: ignore[list-item]
    twin = copy.deepcopy(model)
    mp = mpcompile(twin, f"{low},device=free-low", backend="eager")
    if how == "drop-in":
        mp(i).backward()
        found = twin.w.grad
        assert_low_products(mp)
    else:
        before = twin.w.detach().clone()  # type: ignore[operator]
        mp.train_step(torch.optim.SGD(twin.parameters(), 1.0), scale=1.0)(i)
        found = before - twin.w.detach()  # type: ignore[operator]
    assert distance(found, wanted) <= 4 * EPS[low]


class Broken(nn.Module):
    """A stream that starts from a product, with a graph break in it where wanted."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.broken = broken
        self.start, self.a, self.b, self.end = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        stream = self.start(x)
        stream = stream + F.gelu(self.a(stream))
        if self.broken:
            torch._dynamo.graph_break()
        stream = stream + F.gelu(self.b(stream))
        return self.end(stream)


def test_what_crosses_a_graph_break_is_an_input_and_has_its_digits() -> None:
    """The program between two graphs may do anything to it, so it crosses in FP32 and counts as full: never less exact."""
    sums, origins = {}, {}
    for broken in (False, True):
        torch.manual_seed(0)
        mp = mpcompile(Broken(broken), "low=bf16,device=free-low", backend="eager")
        mp(torch.randn(256, 64))
        assert len(mp.plans) == 1 + broken
        assert_low_products(mp)
        nodes = [(plan.graph, node) for plan in mp.plans for node in plan.graph if node.op == "aten.add.Tensor"]
        sums[broken] = [node.precision for _, node in nodes]
        origins[broken] = {plan.graph.values[name].origin for plan in mp.plans[1:] for name in plan.graph.inputs
                           if plan.graph.values[name].role == "input"}  # fmt: skip
        reasons = [node.reason for _, node in nodes]
    assert sums == {False: ["bf16", "bf16"], True: ["bf16", "fp32"]}
    assert origins[True] == {"full"}
    assert "because the graph's input" in reasons[1]
