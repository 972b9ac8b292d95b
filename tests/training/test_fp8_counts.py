"""What FP8 loses in a batch is counted by layer and operand, and what overflows in it is named."""

from __future__ import annotations

import pytest
import torch

from mpcompile import mpcompile
from tests.training.test_fp8 import made
from tests.training.test_fp8_weights import step_of


def test_what_becomes_zero_is_counted_where_it_does() -> None:
    model, (x, y) = made(blocks=1)
    with torch.no_grad():
        # The first 16 rows of one weight are far below its largest: 2**-20 of it is nothing in E4M3 (2**-18 at least).
        weight = model.blocks[0].a.weight
        weight[:16], weight[16:] = weight[16:].abs().max() * 2.0**-20, weight[16:].sign() * 0.1
    step = step_of(model)
    before = [p.detach().clone() for p in model.parameters()]
    counts = step.fp8_counts(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    operands = [one.operand for one in counts]
    assert sorted(operands) == ["gradient"] * 3 + ["input"] * 2 + ["weight"] * 3
    weights = {one.module: one for one in counts if one.operand == "weight"}
    assert weights["blocks.0.a"].underflowed == 16 * 64
    assert weights["blocks.0.a"].saturated == 48 * 64
    assert weights["blocks.0.b"].underflowed < 16
    assert all(one.elements == 64 * 64 and one.saturated >= 1 and one.nonfinite == 0 for one in counts)
    assert {one.format for one in counts if one.operand == "gradient"} == {"float8_e5m2"}


def test_a_step_without_fp8_counts_nothing() -> None:
    model, batch = made(blocks=1)
    step = mpcompile(model, "bf16", backend="eager").train_step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert step.fp8_counts(*batch) == []


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_of_a_scale_is_named(bad: float) -> None:
    model, (x, y) = made(blocks=1)
    step = step_of(model)
    step(x, y)
    with torch.no_grad():
        model.blocks[0].out.weight[3, 5] = bad
    found = step.explain_overflow(x, y)
    assert found is not None
    assert found.op == "input"
    assert "blocks.0.out.weight" in found.node, found
    assert not step(x, y).stepped.item()
    spoilt = [one for one in step.fp8_counts(x, y) if one.nonfinite]
    assert ("blocks.0.out", "weight") in {(one.module, one.operand) for one in spoilt}


def test_an_overflow_of_a_product_is_its_layer_s() -> None:
    """Both operands and both scales are numbers; what their product is multiplied by is not."""
    model, (x, y) = made(blocks=1)
    model.blocks[0].norm.register_forward_hook(lambda module, given, out: out * 1e30)
    with torch.no_grad():
        model.blocks[0].b.weight.mul_(1e15)
    step = step_of(model)
    found = step.explain_overflow(x, y)
    assert found is not None
    assert found.op.startswith("mpcompile.scaled_product")
    assert found.module == "blocks.0.b"
    assert any("float8_e4m3fn" in dtype for _, dtype, *_ in found.inputs)
    assert not step(x, y).stepped.item()
