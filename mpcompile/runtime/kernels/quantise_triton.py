"""FP8 copies of a matrix on a CUDA device, in two launches: the largest magnitude, then both layouts from one read.

Where the kernel that made the matrix has told the largest magnitude, the first is spared.

`mpcompile.runtime.quantise` defines what is computed, to the bit.  Magnitudes are compared as the integers that their
bits are: an infinity is above every number and a NaN above infinity, so both reach the scale, and everything after it.
The first launch leaves one number per program; each program of the second reads them all (a few KB, from L2), which
spares a launch between and anything to be set to zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpcompile.formats import LARGEST
from mpcompile.runtime.kernels.table import chunks

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


# Columns of a weight's row.
X = tl.constexpr(0)
LIES = tl.constexpr(1)
SCALE = tl.constexpr(2)
TURNED = tl.constexpr(3)
TURNED_SCALE = tl.constexpr(4)
HEIGHT = tl.constexpr(5)
LENGTH = tl.constexpr(6)
WIDTH = tl.constexpr(8)
# Programs that look at one weight.
EACH = 64


@triton.jit
def largest_each(table, partials, EACH: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    """`largest` of several matrices: EACH numbers of each."""
    place = table + tl.program_id(0) * WIDTH
    x = tl.multiple_of(tl.load(place + X).to(tl.pointer_type(TYPE)), 16)
    count = tl.multiple_of(tl.load(place + HEIGHT) * tl.load(place + LENGTH), 16)
    start = tl.program_id(1).to(tl.int64) * BLOCK
    best = tl.zeros([BLOCK], dtype=tl.int32)
    offsets = tl.arange(0, BLOCK)
    while start < count:
        value = tl.load(x + start + offsets, mask=start + offsets < count, other=0.0).to(tl.float32)
        best = tl.maximum(best, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        start += EACH * BLOCK
    tl.store(partials + tl.program_id(0) * EACH + tl.program_id(1), tl.max(best, axis=0))


@triton.jit
def copies_each(
    table, tile_row, tile_number, partials,
    FORM: tl.constexpr, MOST: tl.constexpr, FLOOR: tl.constexpr, EACH: tl.constexpr, TYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`copies` of several matrices, one tile a program; a copy without an address is not wanted."""
    matrix = tl.load(tile_row + tl.program_id(0))
    number = tl.load(tile_number + tl.program_id(0))
    place = table + matrix * WIDTH
    # What `Several` asks for, and a compiler cannot see: accesses are of many bytes.
    x = tl.multiple_of(tl.load(place + X).to(tl.pointer_type(TYPE)), 16)
    lies, turned = tl.load(place + LIES), tl.load(place + TURNED)
    rows, columns = tl.multiple_of(tl.load(place + HEIGHT), 16), tl.multiple_of(tl.load(place + LENGTH), 16)
    bits = tl.max(tl.load(partials + matrix * EACH + tl.arange(0, EACH)), axis=0)
    floor = tl.full([], FLOOR, tl.float32).to(tl.int32, bitcast=True)
    top = tl.maximum(bits, floor).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(tl.full([], MOST, tl.float32), top)
    across = tl.cdiv(columns, TILE_COLUMNS)
    row = (number // across) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = (number % across) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None] * columns + column[None, :]
    value = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse).to(FORM)
    back = tl.div_rn(tl.full([], 1.0, tl.float32), inverse)
    if lies != 0:
        tl.store(tl.multiple_of(lies.to(tl.pointer_type(FORM)), 16) + at, value, mask=inside)
        if number == 0:
            tl.store(tl.load(place + SCALE).to(tl.pointer_type(tl.float32)), back)
    if turned != 0:
        across_at = column[:, None] * rows + row[None, :]
        turned_inside = (column[:, None] < columns) & (row[None, :] < rows)
        tl.store(tl.multiple_of(turned.to(tl.pointer_type(FORM)), 16) + across_at, tl.trans(value), mask=turned_inside)
        if number == 0:
            tl.store(tl.load(place + TURNED_SCALE).to(tl.pointer_type(tl.float32)), back)


def serves(x: Tensor) -> bool:
    """True for what `Several` takes: contiguous, on 16 bytes, rows and columns in sixteens."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0 and all(size % 16 == 0 for size in x.shape)


class Several:
    """The copies of several matrices of one type in one format, in two launches.

    Args:
      pairs: each matrix (see `serves`) and (copy as it lies, its scale, transposed, its scale); those without elements
        are not wanted.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, tuple[Tensor, ...]]], form: str) -> None:
        self.pairs, self.form, first = list(pairs), form, pairs[0][0]
        self.count, self.type = len(pairs), TYPES[first.dtype]
        table = [
            [x.data_ptr(), *(one.data_ptr() if one.numel() else 0 for one in made), *x.shape, 0] for x, made in pairs
        ]
        self.table = torch.tensor(table, dtype=torch.int64).to(first.device)
        tiles = [triton.cdiv(x.shape[0], TILE_ROWS) * triton.cdiv(x.shape[1], TILE_COLUMNS) for x, _ in pairs]
        self.rows, self.numbers = chunks(tiles, 1, first.device)
        self.partials = torch.empty(self.count * EACH, dtype=torch.int32, device=first.device)

    def __call__(self) -> None:
        with torch.cuda.device_of(self.table):  # Triton launches on the current one
            largest_each[(self.count, EACH)](
                self.table, self.partials, EACH=EACH, BLOCK=BLOCK, TYPE=self.type, num_warps=8
            )
            copies_each[(len(self.rows),)](
                self.table, self.rows, self.numbers, self.partials,
                FORM=_FORMS[self.form], MOST=LARGEST[self.form], FLOOR=FLOOR, EACH=EACH, TYPE=self.type,
                TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, num_warps=8,
            )  # fmt: skip


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
