"""The device side of the one-launch update: three kernels over a table of addresses.

`look` reads every gradient once: FP32 partial sums of squares, and whether an element is infinite or NaN.  `advance_scale`, one
program, adds the partials up and moves all scalars: clip factor, loss scale, step counters, and per parameter the
numbers that the update multiplies by.  `move` (`mpcompile.runtime.kernels.move_triton`) reads gradient, master and
moments and writes master, moments and shadow.  `mpcompile.runtime.kernels.update` says what the tables hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of a parameter's row.
GRAD = tl.constexpr(0)
OTHER = tl.constexpr(1)
MASTER = tl.constexpr(2)
FIRST = tl.constexpr(3)
SECOND = tl.constexpr(4)
SHADOW = tl.constexpr(5)
LOWER = tl.constexpr(6)
COUNTER = tl.constexpr(7)
COUNT = tl.constexpr(8)
GROUP = tl.constexpr(9)
LOW_GRAD = tl.constexpr(10)
LOW_OTHER = tl.constexpr(11)
ALIGNED = tl.constexpr(12)
FIRST_SCALES = tl.constexpr(13)
SECOND_SCALES = tl.constexpr(14)
COLUMNS = tl.constexpr(16)
# FP64 numbers of a group or the rule, FP32 pairs of a parameter; what `advance_scale` reads at once.
NUMBERS = tl.constexpr(8)
TILE = tl.constexpr(256)


@triton.jit
def _at(address, start, offsets, TYPE: tl.constexpr, FULL: tl.constexpr):
    """Pointers to elements of TYPE; FULL promises the compiler that the first lies on 16 bytes.

    Of low types it is told 8: then every access is of four elements a thread, and none changes hands between threads.
    """
    pointers = address.to(tl.pointer_type(TYPE)) + start + offsets
    if FULL:
        pointers = tl.multiple_of(pointers, 4 * TYPE.primitive_bitwidth // 8)
    return pointers


@triton.jit
def read(address, start, offsets, left, TYPE: tl.constexpr, FULL: tl.constexpr):
    """Elements of TYPE at `address`; FULL says that they are all there."""
    pointers = _at(address, start, offsets, TYPE, FULL)
    if FULL:
        value = tl.load(pointers)
    else:
        value = tl.load(pointers, mask=offsets < left, other=0)
    return value


@triton.jit
def write(address, start, offsets, left, value, TYPE: tl.constexpr, FULL: tl.constexpr):
    pointers = _at(address, start, offsets, TYPE, FULL)
    if FULL:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=offsets < left)


@triton.jit
def _one(address, low, start, offsets, left, LOW: tl.constexpr, MIXED: tl.constexpr, FULL: tl.constexpr):
    """One gradient, in FP32."""
    if MIXED:
        if low != 0:
            value = read(address, start, offsets, left, LOW, FULL).to(tl.float32)
        else:
            value = read(address, start, offsets, left, tl.float32, FULL)
    else:
        value = read(address, start, offsets, left, LOW, FULL).to(tl.float32)
    return value


@triton.jit
def gradient(
    grad, low, other, low_other, start, offsets, left,
    LOW: tl.constexpr, MIXED: tl.constexpr, TWO: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The gradient of a row, in FP32: the sum of two where a tied weight has two."""
    value = _one(grad, low, start, offsets, left, LOW, MIXED, FULL)
    if TWO:
        if other != 0:
            value += _one(other, low_other, start, offsets, left, LOW, MIXED, FULL)
    return value


@triton.jit
def look(
    table, chunk_row, chunk_number, partials, chunks,
    LOW: tl.constexpr, MIXED: tl.constexpr, TWO: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Per program: the sum of its gradients' squares, and 0 or NaN (an element times 0)."""
    offsets = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    broken = tl.zeros([CHUNK], tl.float32)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        row = table + tl.load(chunk_row + chunk).to(tl.int64) * COLUMNS
        start = tl.load(chunk_number + chunk).to(tl.int64) * CHUNK
        left, aligned = tl.load(row + COUNT) - start, tl.load(row + ALIGNED)
        at, low, other, low_other = (
            tl.load(row),
            tl.load(row + LOW_GRAD),
            tl.load(row + OTHER),
            tl.load(row + LOW_OTHER),
        )
        if (left >= CHUNK) & (aligned != 0):
            grad = gradient(at, low, other, low_other, start, offsets, left, LOW, MIXED, TWO, True)
        else:
            grad = gradient(at, low, other, low_other, start, offsets, left, LOW, MIXED, TWO, False)
        total += grad * grad
        broken += grad * 0.0
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))
    tl.store(partials + tl.num_programs(0) + tl.program_id(0), tl.sum(broken, 0))


@triton.jit
def _sum(partials, count):
    offsets = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float64)
    for first in range(0, count, TILE):
        total += tl.load(partials + first + offsets, mask=first + offsets < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _move_scale(finite, rule, scale, growth_tracker, hysteresis, steps, skipped, floor_hits):
    """`mpcompile.training.loss_scale.scale.transition`, in place; returns the scale after it."""
    now = tl.load(scale)
    after = now
    tl.store(steps, tl.load(steps) + finite.to(tl.int64))
    tl.store(skipped, tl.load(skipped) + 1 - finite.to(tl.int64))
    if tl.load(rule) != 0.0:
        growth, backoff, interval, most = tl.load(rule + 1), tl.load(rule + 2), tl.load(rule + 3), tl.load(rule + 6)
        floor, cap = tl.load(rule + 4).to(tl.float32), tl.load(rule + 5).to(tl.float32)
        left, count = tl.load(hysteresis), tl.load(growth_tracker)
        full = count + 1 >= interval
        if finite:
            grown = (now.to(tl.float64) * growth).to(tl.float32)
            grown = tl.where(grown > cap, cap, grown)
            # A product past FP32 is not taken.
            grown = tl.where(grown < float("inf"), grown, now)
            after = tl.where(full, grown, now)
            tl.store(growth_tracker, tl.where(full, 0, count + 1))
            tl.store(hysteresis, tl.where(full | (tl.load(rule + 7) != 0.0), most.to(tl.int32), left))
        else:
            left = tl.where(left > 0, left - 1, 0)
            lowered = (now.to(tl.float64) * backoff).to(tl.float32)
            lowered = tl.where(lowered < floor, floor, lowered)
            after = tl.where(left <= 0, lowered, now)
            tl.store(growth_tracker, 0)
            tl.store(hysteresis, left)
            tl.store(floor_hits, tl.load(floor_hits) + ((left <= 0) & (now <= floor)).to(tl.int64))
        tl.store(scale, after)
    return after


@triton.jit
def _phases(factors, steps):
    """`mpcompile.runtime.state_codes.phase` of both moments; whole numbers below 2**24 are exact in FP32."""
    taken = tl.load(steps)
    tl.store(factors + 2, ((taken * 12664747) & 0xFFFFFF).to(tl.float32))
    tl.store(factors + 3, ((taken * 9560335 + 0x800000) & 0xFFFFFF).to(tl.float32))


@triton.jit
def advance_scale(
    partials, programs, table, rows, groups, numbers, rule, limits, factors,
    scale, growth_tracker, hysteresis, steps, skipped, floor_hits, seed,
    found_inf, grad_scale, finite_out, norm_out, scale_out,
    LOOKED: tl.constexpr, OWNED: tl.constexpr, FOUND: tl.constexpr, UNSCALE: tl.constexpr, ADAM: tl.constexpr,
):  # fmt: skip
    """All scalars of one update.

    Args:
      rule: kind (0 static), growth, backoff, interval, floor, cap, hysteresis, refill on every clean step.
      limits: the greatest norm (infinite: none), 1 / accumulate.
      factors: receives what gradients are multiplied by, 1 where the step is skipped, and the phases
        that low first and second moments are rounded by (`mpcompile.runtime.state_codes.phase`).
      scale …seed: the loss scale's own state, OWNED by this update; else found_inf and grad_scale are a GradScaler's.
    """
    # Not `tl.full([], ...)`: that is a block, which the interpreter cannot combine with others.
    broken = tl.load(limits + 1) * 0.0
    norm = broken.to(tl.float32)
    if LOOKED:
        norm = tl.sqrt(_sum(partials, programs)).to(tl.float32)
        broken += _sum(partials + programs, programs)
    if FOUND:
        broken += tl.load(found_inf).to(tl.float64)
    finite = broken == 0.0
    taken = tl.where(finite, 1.0, 0.0)
    factor = (tl.load(limits + 1) * 0.0 + 1.0).to(tl.float32)
    if UNSCALE:
        before = tl.load(scale if OWNED else grad_scale)
        factor = (1.0 / before.to(tl.float64)).to(tl.float32)
        norm = norm * factor
    most = tl.load(limits).to(tl.float32)
    if most < float("inf"):
        clip = (1.0 / (norm + 1e-6)) * most
        factor = factor * tl.where(clip > 1.0, 1.0, clip)
    tl.store(factors, factor)
    tl.store(factors + 1, 1.0 - taken)
    tl.store(finite_out, finite.to(tl.uint8))
    tl.store(norm_out, norm)
    if OWNED:
        _phases(factors, steps)
        after = _move_scale(finite, rule, scale, growth_tracker, hysteresis, steps, skipped, floor_hits)
        tl.store(scale_out, after)
        tl.store(seed, after * tl.load(limits + 1).to(tl.float32))
    for first in range(0, rows, TILE):
        if ADAM:
            _adam_numbers(first, rows, table, groups, numbers, taken)
        else:
            _sgd_numbers(first, rows, table, groups, numbers, taken)


@triton.jit
def _power(base, exponent):
    """base ** exponent for 0 <= base < 1, in FP64."""
    power = tl.exp(exponent * tl.log(tl.where(base > 0.0, base, 1.0)))
    return tl.where(base > 0.0, power, 0.0)


@triton.jit
def _keep(numbers, index, value, there):
    """Store an FP64 number as an FP32 pair: itself, and what that rounding left."""
    near = value.to(tl.float32)
    rest = (value - near.to(tl.float64)).to(tl.float32)
    tl.store(numbers + 2 * index, near, mask=there)
    tl.store(numbers + 2 * index + 1, tl.where(tl.abs(near) < float("inf"), rest, 0.0), mask=there)


@triton.jit
def _adam_numbers(first, rows, table, groups, numbers, taken):
    """Per parameter: -step size, 1 / sqrt(second correction), betas, epsilon, decay, coupled decay, sign."""
    number = first + tl.arange(0, TILE)
    there = number < rows
    row = table + number.to(tl.int64) * COLUMNS
    group = groups + tl.load(row + GROUP, mask=there, other=0) * NUMBERS
    counter = tl.load(row + COUNTER, mask=there, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(counter, mask=there, other=0.0)
    tl.store(counter, step + taken.to(tl.float32), mask=there)
    lr, beta1, beta2 = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    out = numbers + number * 2 * NUMBERS
    step = (step + 1.0).to(tl.float64)
    _keep(out, 0, -lr / (1.0 - _power(beta1, step)), there)
    _keep(out, 1, 1.0 / tl.sqrt(1.0 - _power(beta2, step)), there)
    _keep(out, 2, beta1, there)
    _keep(out, 3, beta2, there)
    _keep(out, 4, tl.load(group + 3), there)
    _keep(out, 5, 1.0 - lr * tl.load(group + 4), there)
    _keep(out, 6, tl.load(group + 5), there)
    _keep(out, 7, tl.load(group + 6), there)


@triton.jit
def _sgd_numbers(first, rows, table, groups, numbers, taken):
    """Per parameter: -lr, momentum, 1 - dampening (1 at the first step), nesterov, decay, sign."""
    number = first + tl.arange(0, TILE)
    there = number < rows
    row = table + number.to(tl.int64) * COLUMNS
    group = groups + tl.load(row + GROUP, mask=there, other=0) * NUMBERS
    address = tl.load(row + COUNTER, mask=there, other=0)
    counter, counted = address.to(tl.pointer_type(tl.float32)), there & (address != 0)
    # The first buffer is the gradient itself, undampened; before it the buffer is zeros.
    begun = tl.load(counter, mask=counted, other=1.0)
    tl.store(counter, tl.where(taken > 0.0, 1.0, begun), mask=counted)
    dampening = tl.where(begun != 0.0, tl.load(group + 2), 0.0)
    out = numbers + number * 2 * NUMBERS
    _keep(out, 0, -tl.load(group), there)
    _keep(out, 1, tl.load(group + 1), there)
    _keep(out, 2, 1.0 - dampening, there)
    _keep(out, 3, tl.load(group + 3), there)
    _keep(out, 4, tl.load(group + 4), there)
    _keep(out, 5, tl.load(group + 5), there)
