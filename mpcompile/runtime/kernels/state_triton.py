"""Moments in fewer bytes, on the device: what `mpcompile.runtime.state_codes` says, for one chunk of a parameter.

A chunk is whole blocks of 256 elements, so the greatest magnitude of each is found in the chunk that stores it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpcompile.runtime.kernels.update_triton import read, write

BLOCK = tl.constexpr(256)
BY_ELEMENT = tl.constexpr(10368889)
MASK = tl.constexpr(0xFFFFFF)
SMALLEST = tl.constexpr(1.1754943508222875e-38)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _thresholds(start, offsets, phase):
    """Whole numbers below 2**24, one an element: a hash of its number and of the step's phase."""
    number = (start & MASK).to(tl.uint32) + offsets.to(tl.uint32)
    number = (number * BY_ELEMENT + phase.to(tl.int32).to(tl.uint32)) & MASK
    number = ((number ^ (number >> 13)) * 0xD6E8FD) & MASK
    number = ((number ^ (number >> 11)) * 0xA5A6B5) & MASK
    return number ^ (number >> 13)


@triton.jit
def _fourth(value):
    square = value * value
    return square * square


@triton.jit
def _scales(address, start, left, CHUNK: tl.constexpr):
    """(where the chunk's scales are, which of them are there)."""
    numbers = tl.arange(0, CHUNK // BLOCK)
    first = start // BLOCK
    pointers = address.to(tl.pointer_type(tl.float32)) + first + numbers
    return pointers, numbers * BLOCK < left


@triton.jit
def _spread(scales, CHUNK: tl.constexpr):
    """A scale a block, at every element."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(scales, 1), [CHUNK // BLOCK, BLOCK]), [CHUNK])


@triton.jit
def read_state(
    address, scales, start, offsets, left,
    STATES: tl.constexpr, SIGNED: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A moment in FP32."""
    if STATES == 0:
        value = read(address, start, offsets, left, tl.float32, FULL)
    elif STATES == 1:
        value = read(address, start, offsets, left, tl.bfloat16, FULL).to(tl.float32)
    else:
        MOST: tl.constexpr = 127.0 if SIGNED else 255.0
        KIND: tl.constexpr = tl.int8 if SIGNED else tl.uint8
        near = read(address, start, offsets, left, KIND, FULL).to(tl.float32)
        pointers, there = _scales(scales, start, left, CHUNK)
        each = _spread(tl.load(pointers, mask=there, other=0.0), CHUNK)
        size = tl.abs(near)
        value = tl.where(size == MOST, each, _fourth(size * (1.0 / MOST)) * each)
        value = tl.where(near < 0.0, -value, value)
    return value


@triton.jit
def write_state(
    address, scales, start, offsets, left, value, phase,
    STATES: tl.constexpr, SIGNED: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Store an FP32 moment, rounded up as often as it lies near the upper neighbour."""
    if STATES == 0:
        write(address, start, offsets, left, value, tl.float32, FULL)
    elif STATES == 1:
        bits = value.to(tl.uint32, bitcast=True) + (_thresholds(start, offsets, phase) >> 8)
        near = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        write(address, start, offsets, left, near, tl.bfloat16, FULL)
    else:
        MOST: tl.constexpr = 127.0 if SIGNED else 255.0
        KIND: tl.constexpr = tl.int8 if SIGNED else tl.uint8
        size = tl.abs(value) if SIGNED else tl.where(value > 0.0, value, 0.0)
        size = tl.where(size > LARGEST, LARGEST, size)
        greatest = tl.max(tl.reshape(size, [CHUNK // BLOCK, BLOCK]), 1)
        greatest = tl.where((greatest > 0.0) & (greatest < SMALLEST), SMALLEST, greatest)
        pointers, there = _scales(scales, start, left, CHUNK)
        tl.store(pointers, greatest, mask=there)
        one = tl.full([CHUNK // BLOCK], 1.0, tl.float32)
        inverse = tl.where(greatest > 0.0, tl.div_rn(one, tl.where(greatest > 0.0, greatest, one)), 0.0)
        ratio = size * _spread(inverse, CHUNK)
        # An approximate root finds the code, or the one beside it where the value stands on a code: no division either.
        below = tl.floor(tl.sqrt(tl.sqrt(ratio)) * MOST)
        below = tl.where(below > MOST - 1.0, MOST - 1.0, below)
        floor = _fourth(below)
        limits = _thresholds(start, offsets, phase).to(tl.float32) * (1.0 / 16777216.0)
        beyond = ratio * (MOST * MOST * MOST * MOST) - floor
        code = below + tl.where(beyond > limits * (_fourth(below + 1.0) - floor), 1.0, 0.0)
        if SIGNED:
            code = tl.where(value < 0.0, -code, code)
        else:
            code = tl.where((size > 0.0) & (code < 1.0), 1.0, code)
        write(address, start, offsets, left, code.to(KIND), KIND, FULL)
