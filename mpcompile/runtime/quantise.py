"""Two operations of FP8: an operand's copies with their scales, and the product of two copies.

What they compute is defined here, for any device, and the kernels of a CUDA device give the same bits:

* a scale's inverse is the format's largest number over the operand's largest magnitude (of all of it, or of each row),
  in FP32; below `FLOOR` that magnitude counts as `FLOOR`.  An element is x * inverse, in FP32, rounded to nearest even.
* a product adds up in FP32, is multiplied by both scales, and is rounded to BF16 once.

An infinity or NaN makes every element that shares its scale NaN: what overflows is never hidden.  No operation waits
for the device, so both can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mpcompile.aten.facts import TORCH_DTYPES

# An operand that is smaller has the scale of this one: 1 / scale stays a normal FP32 number.
FLOOR = 2.0**-100

_LIBRARY: Any = torch.library.Library("mpcompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "quantise(Tensor x, str form, bool lies, bool transposed, bool rowwise, Tensor? largest=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("scaled_product(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias) -> Tensor")


def quantise(
    x: Tensor, form: str, lies: bool, transposed: bool, rowwise: bool = False, largest: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FP8 copies of a matrix.

    Args:
      x: [rows, columns] in BF16, FP16 or FP32.
      form: name of the format ("float8_e4m3fn", "float8_e5m2").
      lies, transposed: which copies are wanted; one that is not has no elements.
      rowwise: a scale for each row of a copy instead of one for all of `x`.
      largest: the largest magnitude in `x` where it is known already, FP32 of one element (see `look`); not by rows.

    Returns:
      [rows, columns], its scale ([1, 1]; [rows, 1] by rows), [columns, rows], its scale ([1, 1]; [columns, 1] by rows).
      A copy times its scale is the matrix.
    """
    return torch.ops.mpcompile.quantise.default(x, form, lies, transposed, rowwise, largest)  # type: ignore[no-any-return]


def look(x: Tensor) -> Tensor | None:
    """The largest magnitude in a matrix, FP32 [1]; None in an empty one. A NaN is the largest of all.

    Plain operations, row by row first: a compiler takes each row's in the kernel that makes the row (a norm's, an
    activation's), which spares reading all of `x` again.  There it sees numbers before they are rounded to BF16, so the
    largest may be half a unit below that of `x`; formats round what lies so little beyond their end back to it.
    """
    if x.numel() == 0:
        return None
    return x.abs().amax(1).amax(0, keepdim=True).to(torch.float32)


def scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None) -> Tensor:
    """(a * scale_a) @ (b * scale_b).T + bias in BF16: a [rows, inner], b [columns, inner], bias [columns] -> [rows, columns]."""
    return torch.ops.mpcompile.scaled_product.default(a, b, scale_a, scale_b, bias)  # type: ignore[no-any-return]


def shapes_of(x: Tensor, form: str, lies: bool, transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors such as `quantise` gives, one scale for all of `x`."""
    return _shapes(x, form, lies, transposed, False)  # type: ignore[return-value]


def inverse_scale(largest: Tensor, form: str) -> Tensor:
    """What elements are multiplied by, from the largest magnitude (FP32)."""
    most = torch.finfo(TORCH_DTYPES[form]).max
    return torch.full_like(largest, most) / largest.clamp(min=FLOOR)


def _copy(wide: Tensor, form: str, rowwise: bool, largest: Tensor | None) -> tuple[Tensor, Tensor]:
    """The copy of an FP32 matrix as it lies, and its scale."""
    if largest is None or rowwise:
        largest = wide.abs().amax(1, keepdim=True) if rowwise else wide.abs().amax()
    largest = largest if rowwise else largest.reshape(1, 1)
    inverse = inverse_scale(largest, form)
    most = torch.finfo(TORCH_DTYPES[form]).max
    # No finite element reaches beyond; clamp keeps NaN, and the cast alone would make NaN of 449.
    copy = (wide * inverse).clamp(-most, most).to(TORCH_DTYPES[form])
    return copy.contiguous(), inverse.reciprocal()


def _plain(
    x: Tensor, form: str, lies: bool, transposed: bool, rowwise: bool, largest: Tensor | None = None
) -> tuple[Tensor, ...]:
    wide = x.to(torch.float32)
    none = x.new_empty((0,), dtype=TORCH_DTYPES[form]), x.new_empty((0,), dtype=torch.float32)
    if x.numel() == 0:
        return _shapes(x, form, lies, transposed, rowwise)
    first = _copy(wide, form, rowwise, largest) if lies else none
    second = _copy(wide.t(), form, rowwise, largest) if transposed else tuple(one.clone() for one in none)
    return *first, *second


def _shapes(
    x: Tensor, form: str, lies: bool, transposed: bool, rowwise: bool, largest: Tensor | None = None
) -> tuple[Tensor, ...]:
    rows, columns = x.shape
    made = []
    for wanted, shape in ((lies, (rows, columns)), (transposed, (columns, rows))):
        made.append(x.new_empty(shape if wanted else (0,), dtype=TORCH_DTYPES[form]))
        scale = (shape[0], 1) if rowwise else (1, 1)
        made.append(x.new_empty(scale if wanted else (0,), dtype=torch.float32))
    return tuple(made)


def _on_cuda(
    x: Tensor, form: str, lies: bool, transposed: bool, rowwise: bool, largest: Tensor | None = None
) -> tuple[Tensor, ...]:
    kernels = _kernels()
    if kernels is None or rowwise or x.numel() == 0 or x.dtype not in kernels.TYPES:
        return _plain(x, form, lies, transposed, rowwise, largest)
    made = _shapes(x, form, lies, transposed, rowwise)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current one
        kernels.quantise(x.contiguous(), *made, form, lies, transposed, largest)
    return made


def kernels_for(x: Tensor) -> Any:
    """What makes a matrix's copies by kernels of ours, all at once; None where they do not serve."""
    kernels = _kernels() if x.is_cuda else None
    return kernels if kernels is not None and x.numel() and x.dtype in kernels.TYPES else None


@functools.cache
def _kernels() -> Any:
    """The Triton kernels; None where there is no Triton: torch's CUDA builds bring it."""
    try:
        from mpcompile.runtime.kernels import quantise_triton
    except ImportError:
        return None
    return quantise_triton


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
    total = (a.to(torch.float32) @ b.to(torch.float32).t()) * (scale_a * scale_b.t())
    return (total if bias is None else total + bias.to(torch.float32)).to(torch.bfloat16)


_LIBRARY.impl("quantise", _plain, "CompositeExplicitAutograd")
_LIBRARY.impl("quantise", _on_cuda, "CUDA")
_LIBRARY.impl("scaled_product", _product, "CompositeExplicitAutograd")
torch.library.register_fake("mpcompile::quantise", _shapes, lib=_LIBRARY)
torch.library.register_fake(
    "mpcompile::scaled_product",
    lambda a, b, scale_a, scale_b, bias: a.new_empty((a.shape[0], b.shape[0]), dtype=torch.bfloat16),
    lib=_LIBRARY,
)

__all__ = ["FLOOR", "inverse_scale", "kernels_for", "look", "quantise", "scaled_product", "shapes_of"]
