"""Moments in fewer bytes: the codes' range and steps, unbiased rounding, and the way through FP32 and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpcompile.runtime.state_codes import BLOCK, flat, from_codes, phase, shaped, to_bf16, to_codes, top

ROUNDS = 512


def spread(count: int, signed: bool, decades: float = 4.0) -> Tensor:
    """Values over many orders of magnitude within every block."""
    torch.manual_seed(0)
    values = torch.randn(count) * torch.exp(decades * torch.randn(count))
    return values if signed else values.square()


def neighbours(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes below and above each magnitude, as FP64 values."""
    most = top(signed)
    scales = torch.stack([each.abs().max() for each in values.split(BLOCK)]).double()
    over = scales.repeat_interleave(BLOCK)[: len(values)]
    code = ((values.abs().double() / over) ** 0.25 * most).floor().clamp(max=most - 1)
    # One unit of FP32 beside a code is on it.
    code = torch.where((code + 1) ** 4 / most**4 * over <= values.abs().double() * (1 + 1e-6), code + 1, code)
    return (code / most) ** 4 * over, ((code + 1) / most) ** 4 * over


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 1000])
def test_a_value_becomes_one_of_its_two_neighbours(count: int, signed: bool) -> None:
    values = spread(count, signed)
    below, above = neighbours(values, signed)
    for steps in range(8):
        codes, scales = to_codes(values, signed, phase(torch.tensor(steps), signed))
        found = from_codes(codes, scales)
        assert codes.dtype == (torch.int8 if signed else torch.uint8)
        assert len(scales) == -(-count // BLOCK)
        size = found.abs().double()
        if not signed:
            assert (found > 0).all()  # never to 0, however small beside its block's greatest
            below = torch.where(below == 0, above, below)
        assert ((size >= below * (1 - 2e-6)) & (size <= above * (1 + 2e-6))).all()
        assert ((found == 0) | (found.sign() == values.sign())).all()
        # The greatest of a block is exact.
        assert all(a.abs().max() == b.abs().max() for a, b in zip(found.split(BLOCK), values.split(BLOCK), strict=True))


@pytest.mark.parametrize("kind", ["bf16", "signed codes", "codes"])
def test_rounding_is_unbiased_over_steps(kind: str) -> None:
    """The mean over n steps is within five of its deviations."""
    signed = kind != "codes"
    values = spread(1000, signed, 1.0)
    below, above = neighbours(values, signed)
    gap = values.abs().double() * 2.0**-7 if kind == "bf16" else above - below
    total, moved = torch.zeros(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.bool)
    for steps in range(ROUNDS):
        at = phase(torch.tensor(steps), signed)
        found = to_bf16(values, at).float() if kind == "bf16" else from_codes(*to_codes(values, signed, at))
        total += found.double()
        moved |= found != total.float() / (steps + 1)
    held = values.abs() > 1e-8 * values.abs().max()
    off = (total / ROUNDS - values.double()).abs()
    assert (off[held] <= gap[held] * 2.5 / ROUNDS**0.5 + 1e-6 * values[held].abs()).all()
    assert moved[held].float().mean() > 0.9


def test_a_second_moment_decays_though_a_step_is_less_than_a_code() -> None:
    """0.999 a step: rounded to the nearest, BF16 and most codes would stay where they are for ever."""
    start = spread(BLOCK, False, 1.0)
    start[0] = start.max() * 4  # keeps its size, so that the block's scale does
    exact, stuck = start.double(), start.to(torch.bfloat16)
    brain, (codes, scales) = start.to(torch.bfloat16), to_codes(start, False, None)
    factor = torch.full((BLOCK,), 0.999)
    factor[0] = 1.0
    for steps in range(2000):
        at = phase(torch.tensor(steps), False)
        exact = exact * factor
        stuck = (stuck.float() * factor).to(torch.bfloat16)
        brain = to_bf16(brain.float() * factor, at)
        codes, scales = to_codes(from_codes(codes, scales) * factor, False, at)
    assert (stuck.double() / exact).median() > 5
    assert abs((brain.double() / exact).mean() - 1) < 0.03
    inside = exact > 1e-6 * exact.max()
    ratio = from_codes(codes, scales).double() / exact
    assert abs(ratio[inside].mean() - 1) < 0.15


@pytest.mark.parametrize("signed", [True, False])
def test_codes_come_back_bit_for_bit(signed: bool) -> None:
    values = spread(5000, signed)
    codes, scales = to_codes(values, signed, phase(torch.tensor(7), signed))
    again, same = to_codes(from_codes(codes, scales), signed, None)
    assert torch.equal(codes, again)
    assert torch.equal(scales, same)
    low = to_bf16(values, phase(torch.tensor(7), signed))
    assert torch.equal(to_bf16(low.float(), None), low)


def test_quotients_stay_small() -> None:
    """|m| / sqrt(v) of moments that belong together, at the lowest codes too."""
    torch.manual_seed(1)
    first = torch.randn(1 << 14) * torch.exp(5 * torch.randn(1 << 14))
    second = first.square() * torch.exp(torch.rand(1 << 14))
    for steps in range(4):
        m = from_codes(*to_codes(first, True, phase(torch.tensor(steps), True)))
        v = from_codes(*to_codes(second, False, phase(torch.tensor(steps), False)))
        quotient, exact = m.abs() / v.sqrt(), first.abs() / second.sqrt()
        assert (quotient <= 8.0 * exact + 0.02).all()
        usual = second > 1e-3 * second.view(-1, BLOCK).amax(1, keepdim=True).expand(-1, BLOCK).reshape(-1)
        assert (quotient[usual] <= 1.25 * exact[usual]).all()


@pytest.mark.parametrize("value", [0.0, float("inf"), 3.4e38, 1e-45])
def test_the_ends_of_fp32(value: float) -> None:
    values = torch.zeros(300)
    values[3] = value
    for signed in (True, False):
        found = from_codes(*to_codes(values, signed, phase(torch.tensor(1), signed)))
        assert torch.isfinite(found).all()
        assert (found[256:] == 0).all()
        assert found[3] == min(value, torch.finfo(torch.float32).max) or value == 1e-45


def test_elements_are_taken_as_they_lie() -> None:
    tensor = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert flat(tensor).data_ptr() == tensor.data_ptr()
    assert torch.equal(shaped(flat(tensor), tensor), tensor)
    assert flat(torch.zeros(())).shape == (1,)
    assert shaped(torch.ones(1), torch.zeros(())).shape == ()
