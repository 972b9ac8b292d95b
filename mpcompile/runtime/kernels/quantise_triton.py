"""FP8 copies of a matrix on a CUDA device, in two launches: the largest magnitude, then both layouts from one read.

Where the kernel that made the matrix has told the largest magnitude, the first is spared.

`mpcompile.runtime.quantise` defines what is computed, to the bit.  Magnitudes are compared as the integers that their
bits are: an infinity is above every number and a NaN above infinity, so both reach the scale, and everything after it.
The first launch leaves one number per program; each program of the second reads them all (a few KB, from L2), which
spares a launch between and anything to be set to zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpcompile.formats import LARGEST

# Bits of a magnitude: what is masked, and how far to the left FP32 has them; FP16 is converted.
# FP32 is not among them: on an H200 some of its copies were not the definition's, and what a product reads is low.
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FLOOR = 2.0**-100
PROGRAMS = 1024  # partial results at most: one block of the second launch's first read
BLOCK = 8192
TILE_ROWS, TILE_COLUMNS = 64, 128
_FORMS = {"float8_e4m3fn": tl.float8e4nv, "float8_e5m2": tl.float8e5}


# One program is a number like any other, not a constant.
@triton.jit(do_not_specialize=["programs"])
def largest(x, partials, count, BLOCK: tl.constexpr):
    """The bits of the largest magnitude that a program sees, in FP32's layout."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    best = tl.zeros([BLOCK], dtype=tl.int32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    while start < count:
        value = tl.load(x + start + offsets, mask=start + offsets < count, other=0.0).to(tl.float32)
        best = tl.maximum(best, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        start += step
    tl.store(partials + tl.program_id(0), tl.max(best, axis=0))


@triton.jit(do_not_specialize=["programs"])
def copies(
    x, partials, lies, scale, turned, turned_scale, rows, columns, programs,
    FORM: tl.constexpr, MOST: tl.constexpr, FLOOR: tl.constexpr, LIES: tl.constexpr, TURNED: tl.constexpr,
    PROGRAMS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of the copies."""
    places = tl.arange(0, PROGRAMS)
    # Without signs: a NaN of another kernel's may have one.
    bits = tl.max(tl.load(partials + places, mask=places < programs, other=0) & 0x7FFFFFFF, axis=0)
    # Bits in order are magnitudes in order: the floor too, and a NaN stays one.
    floor = tl.full([], FLOOR, tl.float32).to(tl.int32, bitcast=True)
    top = tl.maximum(bits, floor).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(tl.full([], MOST, tl.float32), top)
    across = tl.cdiv(columns, TILE_COLUMNS)
    number = tl.program_id(0)
    row = (number // across) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = (number % across) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    # No finite element reaches beyond the format: |x| * inverse is the largest number, give or take a rounding.
    value = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * inverse).to(FORM)
    if LIES:
        tl.store(lies + place, value, mask=inside)
    if TURNED:
        place = column[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(turned + place, tl.trans(value), mask=(column[:, None] < columns) & (row[None, :] < rows))
    if number == 0:
        back = tl.div_rn(tl.full([], 1.0, tl.float32), inverse)
        if LIES:
            tl.store(scale, back)
        if TURNED:
            tl.store(turned_scale, back)


def quantise(
    x: Tensor,
    lies: Tensor,
    scale: Tensor,
    turned: Tensor,
    turned_scale: Tensor,
    form: str,
    want: bool,
    want_turned: bool,
    known: Tensor | None = None,
) -> None:
    """Fill the copies of a contiguous matrix `x` and their scales ([1, 1]); those that are not wanted are not touched.

    `known` is the largest magnitude (FP32, one element) where something has found it already.
    """
    rows, columns = x.shape
    programs = min(triton.cdiv(x.numel(), BLOCK), PROGRAMS) if known is None else 1
    if known is None:
        partials = torch.empty(programs, dtype=torch.int32, device=x.device)
        largest[(programs,)](x, partials, x.numel(), BLOCK=BLOCK, num_warps=8)
    else:
        partials = known.view(torch.int32)
    grid = (triton.cdiv(rows, TILE_ROWS) * triton.cdiv(columns, TILE_COLUMNS),)
    copies[grid](
        x, partials, lies, scale, turned, turned_scale, rows, columns, programs,
        FORM=_FORMS[form], MOST=LARGEST[form], FLOOR=FLOOR, LIES=want, TURNED=want_turned,
        PROGRAMS=PROGRAMS, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, num_warps=8,
    )  # fmt: skip
