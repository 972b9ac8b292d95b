"""FP16 and numbers beyond 65,504 that a model holds or is given: weights, buffers and additive masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lowness import assert_low_products
from torch import Tensor, nn
from torch.nn import functional as F

from mpcompile import mpcompile
from mpcompile.compiler import Plan
from mpcompile.errors import RuntimeFailure

BIG = [0.5, 70000.0, -1.0, 2.0]
ROW = "low=fp16,device=free-low"


class Holding(nn.Module):
    """A product whose result meets a tensor of the model's, a parameter or a buffer, with a number of 70,000."""

    def __init__(self, how: str, trained: bool) -> None:
        super().__init__()
        self.how, self.inner, self.outer = how, nn.Linear(16, 4), nn.Linear(4, 4)
        held = torch.tensor([[0.5, 0.25], [70000.0, 1.0]]).repeat(2, 2) if how == "product" else torch.tensor(BIG)
        if trained:
            self.held = nn.Parameter(held)
        else:
            self.register_buffer("held", held)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.inner(x))
        match self.how:
            case "add":
                return h + self.held
            case "view, then activation":
                return F.relu(F.relu(h + self.held.view(1, -1)) - 1.0)
            case "scale":
                return h * self.held[None] / 7.0
            case "norm":
                return self.outer(F.layer_norm(h + self.held, (4,)))
            case "product":
                return (h @ self.held.t()) * 1e-3
            case "masked":
                return torch.where(h > 0, h, self.held).amax(-1)
            case "rows":
                return F.embedding(x[:, 0].long().clamp(0, 3), self.held[:, None]) + h
        raise AssertionError(self.how)


HOWS = ["add", "view, then activation", "scale", "norm", "product", "masked", "rows"]


def _ranges(plan: Plan) -> list[str]:
    return [node.reason for node in plan.graph if node.reason.startswith("out-of-range")]


def _near(got: Tensor, wanted: Tensor) -> None:
    assert got.isfinite().all()
    assert (got - wanted).norm() <= 2e-3 * wanted.norm()


@pytest.mark.parametrize("trained", [True, False], ids=["parameter", "buffer"])
@pytest.mark.parametrize("how", HOWS)
def test_the_drop_in_keeps_fp32_what_reads_a_number_beyond_fp16(how: str, trained: bool) -> None:
    torch.manual_seed(0)
    model, x = Holding(how, trained), torch.randn(8, 16)
    mp = mpcompile(model, ROW, backend="eager", low=["inner"])
    got, wanted = mp(x), model(x)
    _near(got, wanted)
    assert_low_products(mp)
    assert any("7e+04" in reason for plan in mp.plans for reason in _ranges(plan))
    (grad,) = torch.autograd.grad(got.float().mean() * 1e-3, model.inner.weight)
    (plain,) = torch.autograd.grad(wanted.mean() * 1e-3, model.inner.weight)
    assert grad.isfinite().all()
    assert (grad - plain).norm() <= 1e-2 * plain.norm() + 1e-6


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().mean() * 1e-3


@pytest.mark.parametrize("trained", [True, False], ids=["parameter", "buffer"])
@pytest.mark.parametrize("how", HOWS)
def test_the_step_keeps_fp32_what_reads_a_number_beyond_fp16(how: str, trained: bool) -> None:
    torch.manual_seed(0)
    model, x = Holding(how, trained), torch.randn(8, 16)
    plain = copy.deepcopy(model)
    mp = mpcompile(model, ROW, backend="eager", low=["inner"])
    step = mp.train_step(torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=_loss, scale=1.0)
    result = step(x)
    wanted = _loss(plain, x)
    wanted.backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert bool(result.stepped)
    assert abs(float(result.loss) - wanted.item()) <= 2e-3 * abs(wanted.item())
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_report_before_the_first_call_knows_the_numbers() -> None:
    mp = mpcompile(Holding("add", True), ROW, backend="eager", low=["inner"])
    nodes = {node["op"]: node for node in mp.report(torch.randn(8, 16)).to_dict()["nodes"]}
    assert nodes["aten.linear.default"]["precision"] == "fp16"
    assert nodes["aten.add.Tensor"]["decided_by"] == "hazard"
    assert "parameter 'held' reaches 7e+04" in nodes["aten.add.Tensor"]["reason"]


def test_numbers_that_fit_decide_nothing() -> None:
    """A learned tensor has no range that lasts: its numbers of today are no reason for a plan."""
    model = Holding("scale", True)
    with torch.no_grad():
        model.held.copy_(torch.tensor([65504.0, -65504.0, 1e-9, 0.0]))
    plan = mpcompile(model, ROW, backend="eager").plan(torch.randn(8, 16))
    assert all(value.range is None for value in plan.graph.values.values() if value.role == "parameter")


def test_bfloat16_holds_them() -> None:
    plan = mpcompile(Holding("add", True), "low=bf16,device=free-low", backend="eager").plan(torch.randn(8, 16))
    assert not _ranges(plan)


def test_an_infinity_of_a_mask_is_none_beyond() -> None:
    model = Holding("add", False)
    model.held.copy_(torch.tensor([0.0, -torch.inf, 1.0, 2.0]))
    plan = mpcompile(model, ROW, backend="eager").plan(torch.randn(8, 16))
    assert not _ranges(plan)


class Attention(nn.Module):
    """Attention with an additive mask that is an argument of the call."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.inner, self.whole = nn.Linear(16, 48), whole

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.inner(x).view(2, 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mask = mask[:, None].expand(2, 2, 8, 8)
        if self.whole:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (q @ k.transpose(-1, -2) * 8**-0.5 + mask).softmax(-1) @ v


@pytest.mark.parametrize("low", ["fp16", "bf16"])
@pytest.mark.parametrize("whole", [True, False], ids=["attention", "by hand"])
@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_a_row_masked_all_over_has_numbers(low: str, whole: bool, fill: float) -> None:
    """In the low type -1e9 is its lowest number: with minus infinity, a row of nothing else is NaN, or zero."""
    torch.manual_seed(0)
    model, x, mask = Attention(whole), torch.randn(2, 8, 16), torch.zeros(2, 8, 8)
    mask[:, :, 5:] = fill
    if fill != -torch.inf:
        mask[:, 3] = fill
    mp = mpcompile(model, f"low={low},device=free-low", backend="eager", low=["inner"])
    got, wanted = mp(x, mask), model(x, mask)
    assert_low_products(mp)
    assert got.isfinite().all()
    rows = [row for row in range(8) if row != 3]
    torch.testing.assert_close(got[:, :, rows], wanted[:, :, rows], rtol=2e-2, atol=2e-2)
    if fill != -torch.inf:
        # All values take part, as in FP32.
        assert got[:, :, 3].norm() > 0.5 * wanted[:, :, 3].norm()
    gradients: list[Any] = [
        torch.autograd.grad(y.float().square().mean(), model.inner.weight)[0] for y in (got, wanted)
    ]
    assert gradients[0].isfinite().all()


def test_what_both_overrides_name_is_refused() -> None:
    from mpcompile.errors import RuleError

    with pytest.raises(RuleError, match="MP203"):
        mpcompile(Holding("add", True), "fp16", keep_fp32=["inner"], low=["inner"])
    mpcompile(Holding("add", True), "fp16", keep_fp32=["inner"], low=["*"])


class Scaled(nn.Module):
    """Small activations times a tensor of the model's."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.a, self.b, held = nn.Linear(8, 8), nn.Linear(8, 8), torch.ones(8)
        if trained:
            self.held = nn.Parameter(held)
        else:
            self.register_buffer("held", held)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * 1e-5 * self.held)


@pytest.mark.parametrize("trained", [True, False], ids=["parameter", "buffer"])
@pytest.mark.parametrize("way", ["drop-in", "step"])
def test_a_checkpoint_that_is_loaded_may_hold_a_number_beyond_fp16(way: str, trained: bool) -> None:
    """A buffer is read as it is now; a parameter that fitted when the graph was compiled is refused, with its number."""
    model, x = Scaled(trained), torch.randn(4, 8)
    mp = mpcompile(model, "fp16,device=free-low", backend="eager")
    step = mp.train_step(torch.optim.SGD(model.parameters(), 0.0), lambda net, v: net(v).square().mean(), scale=1.0)
    call = step if way == "step" else mp
    call(x)
    model.load_state_dict({**model.state_dict(), "held": torch.full((8,), 70_000.0)})
    if trained:
        with pytest.raises(RuntimeFailure, match=r"MP721.*holds 70000") as failure:
            call(x)
        assert "65,504" in str(failure.value)
        return
    made = call(x)
    assert bool(made.finite) if way == "step" else bool(made.isfinite().all())
