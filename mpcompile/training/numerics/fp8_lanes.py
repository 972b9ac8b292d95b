"""FP8 products in a run beside FP32's: what a copy and a product of copies are where nothing is rounded.

A plan's `quantise` gives copies and their scales, and a product multiplies both in.  In FP32 a copy is the matrix itself
and its scale is one, so the rest of the graph stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.rules.hazards import base
from mpcompile.runtime import quantise as _defines_the_operations  # noqa: F401
from mpcompile.torch_internals.operators import OpOverload, schema_of

# (operation, place of the bias among its arguments)
_PRODUCTS = {"mpcompile::scaled_product": 4, "aten::_scaled_mm": 4}


def is_quantise(n: fx.Node) -> bool:
    """True for the node that makes an operand's FP8 copies and their scales."""
    return _name(n) == "mpcompile::quantise"


def is_product(n: fx.Node) -> bool:
    return _name(n) in _PRODUCTS


def _name(n: fx.Node) -> str:
    target = n.target
    return schema_of(target).name if n.op == "call_function" and isinstance(target, OpOverload) else ""


def copies(graph: fx.Graph, moves: frozenset[str]) -> frozenset[fx.Node]:
    """Every node whose result is a copy or a scale: those of `quantise`, and what only moves them."""
    found = set[fx.Node]()
    for n in graph.nodes:
        moved = n.op == "call_function" and (n.target is operator.getitem or base(str(n.target)) in moves)
        if is_quantise(n) or (moved and n.all_input_nodes and n.all_input_nodes[0] in found):
            found.add(n)
    return frozenset(found)


def full_quantise(
    x: Tensor, form: str, lies: bool, transposed: bool, rowwise: bool, largest: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The matrix itself and a scale of one for each copy that is wanted; see `mpcompile.runtime.quantise`.

    The largest magnitude is for a scale, and there is none here to find.
    """
    wide, none, one = x.float(), x.new_empty((0,), dtype=torch.float32), x.new_ones((1, 1), dtype=torch.float32)
    first = (wide, one) if lies else (none, none)
    return (*first, *((wide.t(), one.clone()) if transposed else (none, none)))


def full_product(n: fx.Node, args: tuple[Any, ...]) -> Tensor:
    """The product of two matrices in FP32, bias and all: `n` is torch's own operation, or ours."""
    a, b, scale_a, scale_b, bias = args[:5]
    b, scale_b = (b, scale_b) if _name(n) == "aten::_scaled_mm" else (b.t(), scale_b.t())
    made: Tensor = (a.float() @ b.float()) * (scale_a * scale_b)
    return made if bias is None else made + bias.float()
