"""An optimizer's state in fewer bytes: BF16, or 8 bits with a scale for every 256 elements.

**8 bits.** A code c of n (127 with a sign for first moments, 255 for second ones, which have none) means
(c / n)^4 times the greatest magnitude of its block of 256 elements, as they lie in memory.  The fourth power makes
the steps fine where values are small: of a second moment's root they span 1 to 65,025, a first moment's finest step is
finer than that, and a second moment above 0 never becomes 0. So a quotient of the two grows by a quarter at most where the
second moment is a thousandth of its block's greatest or more, and nowhere past eight times itself and 0.02.

**Rounding.** To the nearest, a second moment could not decay: at beta2 = 0.999 a step changes it by less than half of
BF16's last place.  So the update rounds up as often as the value lies near the upper neighbour, by a threshold that is
a hash of the step and of the element: the same on every device and in every run, without bias.  (An even walk through
[0, 1) in its place has less noise and underestimates what decays, by 3 to 28 %.)
Decoded values are encoded, to the nearest, to the codes and scales that they came from, bit for bit: a checkpoint holds FP32
and loses nothing.

`mpcompile.runtime.kernels.state_triton` is the same on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
# Thresholds are of 24 bits: what an element and an update (for first and for second moments) add before the hash, and
# what this multiplies by.
BITS = 24
BY_ELEMENT, BY_STEP = 10368889, (12664747, 9560335)
BEGIN = (0, 1 << (BITS - 1))
MIX = (0xD6E8FD, 0xA5A6B5)
_MASK = (1 << BITS) - 1
# Scales of which FP32 holds the inverse.
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def top(signed: bool) -> int:
    """The greatest code."""
    return 127 if signed else 255


def phase(steps: Tensor, signed: bool) -> Tensor:
    """What a step's thresholds are made of, 0-dim int64 below 2**24; `steps`: int64, the updates that were taken."""
    return (steps * BY_STEP[not signed] + BEGIN[not signed]) & _MASK


def blocks(count: int) -> int:
    """How many scales a tensor of `count` elements has."""
    return -(-count // BLOCK)


def flat(tensor: Tensor) -> Tensor:
    """The elements in the order in which they lie in memory: a view where they fill it."""
    return tensor.permute(_order(tensor)).reshape(-1)


def shaped(flat_: Tensor, like: Tensor) -> Tensor:
    """`flat`'s elements in the shape of the tensor that they were taken of."""
    order = _order(like)
    back = sorted(range(len(order)), key=order.__getitem__)
    return flat_.reshape([like.shape[i] for i in order]).permute(back)


def _order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _thresholds(count: int, at: Tensor) -> Tensor:
    """Integers below 2**24, one an element."""
    number = (torch.arange(count, device=at.device) * BY_ELEMENT + at) & _MASK
    number = ((number ^ (number >> 13)) * MIX[0]) & _MASK
    number = ((number ^ (number >> 11)) * MIX[1]) & _MASK
    return number ^ (number >> 13)


def to_bf16(values: Tensor, at: Tensor | None) -> Tensor:
    """FP32 values of one dimension in BF16; `at`: the step's `phase`, None rounds to the nearest."""
    if at is None:
        return values.to(torch.bfloat16)
    up = (_thresholds(values.numel(), at) >> (BITS - 16)).to(torch.int32)
    return ((values.view(torch.int32) + up) >> 16).to(torch.int16).view(torch.bfloat16)


def to_codes(values: Tensor, signed: bool, at: Tensor | None) -> tuple[Tensor, Tensor]:
    """FP32 values of one dimension as (codes, scales): int8 (signed) or uint8, and FP32, one a block.

    Args:
      signed: else nothing below 0 is held.
      at: the step's `phase`; None rounds to the nearest.
    """
    count, most = values.numel(), float(top(signed))
    sizes = (values.abs() if signed else values.clamp(min=0.0)).clamp(max=_LARGEST)
    sizes = torch.nn.functional.pad(sizes, (0, blocks(count) * BLOCK - count)).view(-1, BLOCK)
    scales = sizes.amax(1) if count else sizes.new_empty(0)
    scales = torch.where(scales > 0.0, scales.clamp(min=_SMALLEST), scales)
    ratio = sizes * torch.where(scales > 0.0, 1.0 / scales, 0.0).unsqueeze(1)
    root = ratio.sqrt().sqrt() * most
    if at is None:
        codes = root.round()
    else:
        below = root.floor().clamp(max=most - 1.0)
        floor, ceiling = _fourth(below), _fourth(below + 1.0)
        limits = _thresholds(blocks(count) * BLOCK, at).view(-1, BLOCK).to(torch.float32) * 2.0**-BITS
        codes = below + (ratio * most**4 - floor > limits * (ceiling - floor)).to(torch.float32)
    if not signed:
        codes = torch.where(sizes > 0.0, codes.clamp(min=1.0), codes)
    codes = codes.reshape(-1)[:count]
    if signed:
        return torch.where(values < 0.0, -codes, codes).to(torch.int8), scales
    return codes.to(torch.uint8), scales


def from_codes(codes: Tensor, scales: Tensor) -> Tensor:
    """The FP32 values of codes of one dimension."""
    signed = codes.dtype == torch.int8
    near = codes.to(torch.float32)
    size, most = near.abs(), float(top(signed))
    each = scales.unsqueeze(1).expand(-1, BLOCK).reshape(-1)[: codes.numel()]
    value = torch.where(size == most, each, _fourth(size * (1.0 / most)) * each)
    return torch.where(near < 0.0, -value, value)


def _fourth(value: Tensor) -> Tensor:
    square = value * value
    return square * square
