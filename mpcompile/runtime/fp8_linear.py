"""A linear layer of which each of three products reads its operands in FP8 or in BF16, as the plan says.

Written into the graph as two plain functions, which AOTAutograd traces through: what it sees, partitions and gives to
Inductor are `mpcompile::quantise` and a product of torch's own.  For the backward an input is kept as the transposed
FP8 copy alone where grad_weight reads FP8, and a weight as its own where grad_input does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpcompile import fp8
from mpcompile.aten.write import FP8Linear
from mpcompile.runtime.quantise import look, quantise, scaled_product

# As it lies, its scale, transposed, its scale.
Copies = tuple[Tensor, Tensor, Tensor, Tensor]
_INPUT = fp8.form(fp8.Copy("", False), "")


def copies_of(value: Tensor, lies: bool, transposed: bool, recipe: str) -> Copies:
    """The copies of a weight; a transposed one is for the backward, so not made without grad."""
    return _copies(value, _INPUT, lies, transposed and torch.is_grad_enabled(), recipe, made_here=False)


def copies_of_input(value: Tensor, lies: bool, transposed: bool, recipe: str) -> Copies:
    """The copies of an input [.., columns], which the graph makes: its maker can find the largest magnitude."""
    return _copies(value, _INPUT, lies, transposed and torch.is_grad_enabled(), recipe, made_here=True)


def _copies(value: Tensor, form: str, lies: bool, transposed: bool, recipe: str, *, made_here: bool) -> Copies:
    with torch.no_grad():
        flat = value.detach().reshape(-1, value.shape[-1])
        largest = look(flat) if made_here and recipe == "tensorwise" else None
        return quantise(flat, form, lies, transposed, recipe == "rowwise", largest)


class _FP8Linear(torch.autograd.Function):
    """(input, weight, bias, copies of the input, copies of the weight, passes in FP8, recipe) -> input @ weight.T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *given: Any) -> Tensor:
        copies, (passes, recipe) = given[:8], given[8:]
        x_lies, x_scale, x_turned, x_turned_scale, w_lies, w_scale, w_turned, w_turned_scale = copies
        ctx.passes, ctx.recipe, ctx.has_bias = passes, recipe, bias is not None
        ctx.shape = x.shape
        if "output" in passes:
            flat = _product(x_lies, w_lies, x_scale, w_scale, bias, fast=True)
            result = flat.reshape(*x.shape[:-1], weight.shape[0])
        else:
            result = torch.nn.functional.linear(x, weight, bias)
        kept_x = (x_turned, x_turned_scale) if "grad_weight" in passes else (x, None)
        kept_w = (w_turned, w_turned_scale) if "grad_input" in passes else (weight, None)
        ctx.save_for_backward(*kept_x, *kept_w)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, x_scale, weight, w_scale = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        want_x, want_w = ctx.needs_input_grad[:2]
        lies, turned = want_x and "grad_input" in ctx.passes, want_w and "grad_weight" in ctx.passes
        form = fp8.form(fp8.Copy(":gradient", False), ctx.recipe)
        copies = _copies(grad, form, lies, turned, ctx.recipe, made_here=True) if lies or turned else None
        grad_x = grad_w = grad_bias = None
        if want_x:
            made = grad @ weight if copies is None or not lies else _product(copies[0], weight, copies[1], w_scale)
            grad_x = made.reshape(ctx.shape)
        if want_w:
            grad_w = (
                _grad_weight(grad, x) if copies is None or not turned else _product(copies[2], x, copies[3], x_scale)
            )
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return (grad_x, grad_w, grad_bias, *(None,) * 10)


def _grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    return grad.t() @ x.reshape(-1, x.shape[-1])


def _product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None, *, fast: bool = False
) -> Tensor:
    """`scaled_product` by torch's kernel where there is one. `fast` accumulates less exactly: good for outputs alone."""
    if not a.is_cuda or not _has_kernel(a.device.index or 0):
        return scaled_product(a, b, scale_a, scale_b, bias)
    made: Tensor = torch.ops.aten._scaled_mm.default(a, b.t(), scale_a, scale_b.t(), bias, None, torch.bfloat16, fast)
    return made


@functools.cache
def _has_kernel(device: int) -> bool:
    """FP8 products in hardware: Ada, Hopper and later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 9)


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    of_x: Sequence[Tensor],
    of_weight: Sequence[Tensor],
    passes: Sequence[str],
    recipe: str,
) -> Tensor:
    """input [.., inner] @ weight [outer, inner].T + bias [outer] in BF16, the named passes in FP8.

    Args:
      of_x, of_weight: what `copies_of` gave for each.
      passes: of "output", "grad_input", "grad_weight".
      recipe: "tensorwise" or "rowwise".
    """
    return _FP8Linear.apply(x, weight, bias, *of_x, *of_weight, tuple(passes), recipe)  # type: ignore[no-any-return,no-untyped-call]


# What `mpcompile.aten.write` puts into the graph.
FP8_LINEAR = FP8Linear(copies_of_input, copies_of, multiply)

__all__ = ["FP8_LINEAR", "copies_of", "copies_of_input", "multiply"]
