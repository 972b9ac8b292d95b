"""`mp.compare` of a plan whose products read FP8: errors by hand, and FP32's lane against the model itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mpcompile import mpcompile
from mpcompile.report.comparison import Comparison
from mpcompile.runtime.quantise import quantise
from mpcompile.training.numerics.probe import Probe

WIDTH = 64


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).square().mean()


def wrapped(model: nn.Module, recipe: str = "tensorwise", **given: object) -> object:
    policy = f"low=bf16,products=fp8,fp8={recipe},device=free-low" if recipe != "tensorwise" else "fp8,device=free-low"
    return mpcompile(model, policy, fp8=["b"], low=["a", "b"], backend="eager", **given)  # type: ignore[call-overload]


def through_fp8(x: Tensor, *, rowwise: bool) -> Tensor:
    """What is left of a matrix after its FP8 copy."""
    copy, scale, _, _ = quantise(x, "float8_e4m3fn", True, False, rowwise)
    return copy.float() * scale


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_an_fp8_product_s_own_error_is_that_of_its_copies(recipe: str) -> None:
    model, low = Two(), torch.bfloat16
    x = torch.randn(32, WIDTH)
    mp = wrapped(model, recipe)
    assert {node.id: bool(node.fp8) for node in mp.plan(x).graph if node.op == "aten.linear.default"} == {
        "linear": False, "linear_1": True}  # fmt: skip
    found: Comparison = mp.compare(x, autocast=True)
    first = nn.functional.linear(x, model.a.weight, model.a.bias).detach()
    full = first @ model.b.weight.detach().T
    w = through_fp8(model.b.weight.detach().to(low), rowwise=recipe == "rowwise")
    fed = through_fp8(first.to(low), rowwise=recipe == "rowwise") @ w.T
    row = found.row("linear_1")
    assert row.own == pytest.approx(off(fed.to(low), full), rel=0.02)
    assert row.own > 5 * found.row("linear").own
    assert row.largest == pytest.approx(float(full.abs().max()), rel=1e-6)
    # autocast's plan has no FP8.
    assert found.autocast is not None
    assert found.autocast.row("linear_1").own < row.own / 5


def test_fp32_s_lane_is_the_model_s_own_run() -> None:
    model = Two()
    x = torch.randn(32, WIDTH)
    found: Comparison = wrapped(model).compare(x)
    loss = model(x)
    loss.backward()
    assert found.loss[1] == pytest.approx(loss.item(), rel=1e-6)
    rows = {row.id: row for row in found.parameters}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert rows[name].largest == pytest.approx(float(parameter.grad.abs().max()), rel=1e-5), name
    assert rows["b.weight"].own > 0.01
    # No row is a copy or a scale.
    assert not any("quantise" in row.op for row in found.rows)


def test_bisect_and_calibrate_take_an_fp8_plan() -> None:
    model, x = Two(), torch.randn(32, WIDTH)
    mp = wrapped(model)
    probe = Probe(model, (x,), {})
    measured = probe.measure(mp.settings)
    assert 0.01 < measured["gradient"] < 0.2
    assert "linear_1" in probe.candidates(mp.settings)["b"]
    assert mp.calibrate([(x,)]).values
