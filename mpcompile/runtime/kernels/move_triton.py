"""The second pass of the update, on the device: the optimizer's arithmetic; at once over where the step is skipped.

What is stored is FP32, and so is the arithmetic between a load and a store.  Betas, decay and step sizes come as FP32
pairs (a number and what its rounding left), products are fused with the sums they go into, so a moment is within one
unit in the last place of its larger term, and a master within one of its own beside four of what is added to it.  WIDE
computes in FP64, where every result is the exact one rounded once: conversions make it a sixth slower (H200).  Its
square root and quotient start from FP32 and take one Newton step: FP64's own cost too much.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpcompile.runtime.kernels.state_triton import read_state, write_state
from mpcompile.runtime.kernels.update_triton import (
    ALIGNED,
    COLUMNS,
    COUNT,
    FIRST,
    FIRST_SCALES,
    GRAD,
    LOW_GRAD,
    LOW_OTHER,
    LOWER,
    MASTER,
    NUMBERS,
    OTHER,
    SECOND,
    SECOND_SCALES,
    SHADOW,
    gradient,
    read,
    write,
)


@triton.jit
def _number(numbers, index, WIDE: tl.constexpr):
    """(a number, what its rounding left); (the FP64 number, 0) where WIDE."""
    near, rest = tl.load(numbers + 2 * index), tl.load(numbers + 2 * index + 1)
    if WIDE:
        value = near.to(tl.float64) + rest.to(tl.float64)
        left = rest.to(tl.float64) * 0.0
    else:
        value = near
        left = rest
    return value, left


@triton.jit
def _other(near, rest):
    """1 minus a number, as one."""
    value = 1.0 - near
    return value, ((1.0 - value) - near) - rest


@triton.jit
def _finite(lower):
    """A correction, or 0 beside an infinite value, which needs none."""
    return tl.where(tl.abs(lower) < float("inf"), lower, 0.0)


@triton.jit
def _blend(a, a_rest, x, b, b_rest, y, WIDE: tl.constexpr):
    """a * x + b * y, within one unit in the last place of the larger product."""
    if WIDE:
        value = a * x + b * y
    else:
        value = tl.fma(x, a, tl.fma(y, b, _finite(tl.fma(x, a_rest, y * b_rest))))
    return value


@triton.jit
def _plus(value, a, a_rest, x, WIDE: tl.constexpr):
    """value + a * x."""
    if WIDE:
        value = value + a * x
    else:
        value = tl.fma(x, a, value + _finite(x * a_rest))
    return value


@triton.jit
def _master(address, lower, start, offsets, left, SPLIT: tl.constexpr, FULL: tl.constexpr):
    """A master in FP32; where SPLIT, rows with a `lower` address hold it as BF16 and 16 lower bits."""
    if SPLIT:
        if lower != 0:
            high = read(address, start, offsets, left, tl.int16, FULL).to(tl.int32)
            bits = (high << 16) + read(lower, start, offsets, left, tl.int16, FULL).to(tl.int32)
            master = bits.to(tl.float32, bitcast=True)
        else:
            master = read(address, start, offsets, left, tl.float32, FULL)
    else:
        master = read(address, start, offsets, left, tl.float32, FULL)
    return master


@triton.jit
def _write_master(
    address, lower, shadow, start, offsets, left, master,
    SHADOWS: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Store a master, and its shadow where there is one."""
    if SPLIT:
        if lower != 0:
            bits = master.to(tl.int32, bitcast=True)
            high = (bits + 0x8000) >> 16
            write(address, start, offsets, left, high.to(tl.int16), tl.int16, FULL)
            write(lower, start, offsets, left, (bits - (high << 16)).to(tl.int16), tl.int16, FULL)
        else:
            write(address, start, offsets, left, master, tl.float32, FULL)
    else:
        write(address, start, offsets, left, master, tl.float32, FULL)
    if SHADOWS is not None:
        if shadow != 0:
            write(shadow, start, offsets, left, master.to(SHADOWS), SHADOWS, FULL)


@triton.jit
def _quotient(first, second, inverse, inverse_rest, eps, WIDE: tl.constexpr):
    """first / (sqrt(second) * inverse + eps)."""
    root = tl.sqrt_rn(second.to(tl.float32))
    if WIDE:
        usual = (root > 0.0) & (root < float("inf"))
        rest = (second - root.to(tl.float64) * root.to(tl.float64)).to(tl.float32)
        correction = tl.where(usual, rest * (0.5 / tl.where(usual, root, 1.0)), 0.0)
        below = (root.to(tl.float64) + correction.to(tl.float64)) * inverse + eps
        single = below.to(tl.float32)
        guess = (1.0 / single).to(tl.float64)
        value = first * guess
        usual = (single > 0.0) & (single < float("inf"))
        value = tl.where(usual, value + (first - value * below) * guess, value)
    else:
        below = tl.fma(root, inverse, _finite(root * inverse_rest) + eps)
        value = tl.div_rn(first, below)
    return value


@triton.jit
def _square(beta, beta_rest, second, grad, WIDE: tl.constexpr):
    """The next second moment."""
    fresh, fresh_rest = _other(beta, beta_rest)
    square = grad * grad
    if WIDE:
        value = beta * second + fresh * square
    else:
        # What the square's rounding left comes in by the smaller parts.
        lower = tl.fma(second, beta_rest, tl.fma(square, fresh_rest, tl.fma(grad, grad, -square) * fresh))
        value = tl.fma(second, beta, tl.fma(square, fresh, _finite(lower)))
    return value


@triton.jit
def _adam_chunk(
    numbers, factor, phase, second_phase, at, lower, shadow, at_first, at_second, first_scales, second_scales, grad, low,
    other, low_other, start, offsets, left,
    LOW: tl.constexpr, MIXED: tl.constexpr, TWO: tl.constexpr, SHADOWS: tl.constexpr, SPLIT: tl.constexpr,
    WIDE: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    KIND: tl.constexpr = tl.float64 if WIDE else tl.float32
    # Every load is on its way before the first result is waited for.
    master = _master(at, lower, start, offsets, left, SPLIT, FULL)
    first = read_state(at_first, first_scales, start, offsets, left, STATES, True, CHUNK, FULL)
    second = read_state(at_second, second_scales, start, offsets, left, STATES, False, CHUNK, FULL)
    grad = gradient(grad, low, other, low_other, start, offsets, left, LOW, MIXED, TWO, FULL)
    size, size_rest = _number(numbers, 0, WIDE)
    inverse, inverse_rest = _number(numbers, 1, WIDE)
    beta1, beta1_rest = _number(numbers, 2, WIDE)
    beta2, beta2_rest = _number(numbers, 3, WIDE)
    eps, _ = _number(numbers, 4, WIDE)
    decay, decay_rest = _number(numbers, 5, WIDE)
    coupled, coupled_rest = _number(numbers, 6, WIDE)
    grad = grad.to(KIND) * (factor * tl.load(numbers + 14)).to(KIND)
    master = master.to(KIND)
    if coupled != 0.0:
        grad = _plus(grad, coupled, coupled_rest, master, WIDE)
    fresh, fresh_rest = _other(beta1, beta1_rest)
    first = _blend(beta1, beta1_rest, first.to(KIND), fresh, fresh_rest, grad, WIDE)
    second = _square(beta2, beta2_rest, second.to(KIND), grad, WIDE)
    change = _quotient(first, second, inverse, inverse_rest, eps, WIDE)
    master = _blend(decay, decay_rest, master, size, size_rest, change, WIDE)
    write_state(at_first, first_scales, start, offsets, left, first.to(tl.float32), phase,
                STATES, True, CHUNK, FULL)  # fmt: skip
    write_state(at_second, second_scales, start, offsets, left, second.to(tl.float32), second_phase,
                STATES, False, CHUNK, FULL)  # fmt: skip
    _write_master(at, lower, shadow, start, offsets, left, master.to(tl.float32), SHADOWS, SPLIT, FULL)


@triton.jit
def _sgd_chunk(
    numbers, factor, phase, at, lower, shadow, at_first, first_scales, grad, low, other, low_other, start, offsets, left,
    LOW: tl.constexpr, MIXED: tl.constexpr, TWO: tl.constexpr, SHADOWS: tl.constexpr, SPLIT: tl.constexpr,
    MOMENTUM: tl.constexpr, WIDE: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    KIND: tl.constexpr = tl.float64 if WIDE else tl.float32
    master = _master(at, lower, start, offsets, left, SPLIT, FULL)
    if MOMENTUM:
        buffer = read_state(at_first, first_scales, start, offsets, left, STATES, True, CHUNK, FULL)
    grad = gradient(grad, low, other, low_other, start, offsets, left, LOW, MIXED, TWO, FULL)
    size, size_rest = _number(numbers, 0, WIDE)
    decay, decay_rest = _number(numbers, 4, WIDE)
    grad = grad.to(KIND) * (factor * tl.load(numbers + 10)).to(KIND)
    master = master.to(KIND)
    if decay != 0.0:
        grad = _plus(grad, decay, decay_rest, master, WIDE)
    if MOMENTUM:
        momentum, momentum_rest = _number(numbers, 1, WIDE)
        fresh, fresh_rest = _number(numbers, 2, WIDE)
        moved = _blend(momentum, momentum_rest, buffer.to(KIND), fresh, fresh_rest, grad, WIDE)
        write_state(at_first, first_scales, start, offsets, left, moved.to(tl.float32), phase,
                    STATES, True, CHUNK, FULL)  # fmt: skip
        grad = tl.where(tl.load(numbers + 6) != 0.0, _plus(grad, momentum, momentum_rest, moved, WIDE), moved)
    master = _plus(master, size, size_rest, grad, WIDE)
    _write_master(at, lower, shadow, start, offsets, left, master.to(tl.float32), SHADOWS, SPLIT, FULL)


@triton.jit
def move(
    table, chunk_row, chunk_number, numbers, factors,
    LOW: tl.constexpr, MIXED: tl.constexpr, TWO: tl.constexpr, SHADOWS: tl.constexpr, SPLIT: tl.constexpr,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, WIDE: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The optimizer's arithmetic on one chunk of a parameter: Adam and AdamW, or SGD."""
    factor, skipped = tl.load(factors), tl.load(factors + 1)
    phase, second_phase = tl.load(factors + 2), tl.load(factors + 3)
    which = tl.load(chunk_row + tl.program_id(0))
    start = tl.load(chunk_number + tl.program_id(0)).to(tl.int64) * CHUNK
    # All of the row before the first branch: one wait for them together.
    row = table + which.to(tl.int64) * COLUMNS
    numbers += which * 2 * NUMBERS
    left, aligned = tl.load(row + COUNT) - start, tl.load(row + ALIGNED)
    at, lower, shadow = tl.load(row + MASTER), tl.load(row + LOWER), tl.load(row + SHADOW)
    first, second, grad, low = tl.load(row + FIRST), tl.load(row + SECOND), tl.load(row + GRAD), tl.load(row + LOW_GRAD)
    other, low_other = tl.load(row + OTHER), tl.load(row + LOW_OTHER)
    first_scales, second_scales = tl.load(row + FIRST_SCALES), tl.load(row + SECOND_SCALES)
    if skipped != 0.0:
        return
    offsets = tl.arange(0, CHUNK)
    if ADAM:
        if (left >= CHUNK) & (aligned != 0):
            _adam_chunk(numbers, factor, phase, second_phase, at, lower, shadow, first, second, first_scales, second_scales,
                        grad, low, other, low_other, start, offsets, left, LOW, MIXED, TWO, SHADOWS, SPLIT, WIDE, STATES,
                        CHUNK, True)  # fmt: skip
        else:
            _adam_chunk(numbers, factor, phase, second_phase, at, lower, shadow, first, second, first_scales, second_scales,
                        grad, low, other, low_other, start, offsets, left, LOW, MIXED, TWO, SHADOWS, SPLIT, WIDE, STATES,
                        CHUNK, False)  # fmt: skip
    elif (left >= CHUNK) & (aligned != 0):
        _sgd_chunk(numbers, factor, phase, at, lower, shadow, first, first_scales, grad, low, other, low_other, start,
                   offsets, left, LOW, MIXED, TWO, SHADOWS, SPLIT, MOMENTUM, WIDE, STATES, CHUNK, True)  # fmt: skip
    else:
        _sgd_chunk(numbers, factor, phase, at, lower, shadow, first, first_scales, grad, low, other, low_other, start,
                   offsets, left, LOW, MIXED, TWO, SHADOWS, SPLIT, MOMENTUM, WIDE, STATES, CHUNK, False)  # fmt: skip
