"""Sums of gradients in FP32: over the uses of a weight, over repeated rows and over broadcast dimensions.

Autograd adds up gradients in the type in which they arrive.  Of a weight that is used a hundred times (an unrolled
recurrence, a shared layer) that is a hundred low sums, each of which rounds.  What becomes a weight's gradient, or is
cast to FP32 anyway, is added up in FP32 here; products and views before it stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import LOW_DTYPES

aten = torch.ops.aten
# They move a gradient's elements and nothing else.
_MOVES = frozenset({
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default, aten.transpose.int,
    aten.permute.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    aten.clone.default, aten.alias.default, aten.detach.default,
})  # fmt: skip
_SUMS = frozenset({aten.sum.default, aten.sum.dim_IntList})
# They place it among zeros.
_PLACES = frozenset({aten.slice_backward.default, aten.select_backward.default})
# Operation -> the operand that it adds up.
_ROWS = {aten.embedding_dense_backward.default: 0}
_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)


def add_up_in_fp32(graph: fx.Graph, casts: Iterable[fx.Node], grads: Iterable[fx.Node]) -> int:
    """Widen the sums that `casts` (to FP32) and `grads` (of parameters) read, and nothing else does.

    Args:
      casts: nodes of the backward that cast a low value to FP32.
      grads: what the graph returns as gradients.

    Returns:
      how many of them now read an FP32 sum.
    """
    widened = 0
    output = graph.output_node()
    for cast in casts:
        source = cast.args[0]
        if isinstance(source, fx.Node) and (wide := _widened(graph, source)) is not None:
            cast.replace_all_uses_with(wide)
            widened += 1
    for grad in dict.fromkeys(grads):
        if (wide := _widened(graph, grad)) is not None:
            output.replace_input_with(grad, wide)
            widened += 1
    return widened


def _widened(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """`node` in FP32, where it is a sum, or moves one, that one reader has; None where there is nothing to add up."""
    if not _is_low(node) or len(node.users) != 1:
        return None
    if (node.target in _MOVES or node.target in _PLACES) and not node.kwargs:
        inner = node.args[0]
        wide = _widened(graph, inner) if isinstance(inner, fx.Node) else None
        return None if wide is None else _again(graph, node, (wide, *node.args[1:]), {})
    if node.target in _SUMS and "dtype" not in node.kwargs:
        return _again(graph, node, node.args, {**node.kwargs, "dtype": torch.float32})
    if node.target in _ROWS:
        place = _ROWS[node.target]
        args = [_in_fp32(graph, one) if i == place else one for i, one in enumerate(node.args)]
        return _again(graph, node, tuple(args), node.kwargs)
    if node.target is aten.add.Tensor and not node.kwargs and all(_is_low(one) for one in node.args):
        return _again(graph, node, tuple(_in_fp32(graph, one) for one in node.args), {})
    return None


def _in_fp32(graph: fx.Graph, node: Any) -> fx.Node:
    """A part of a sum: itself a sum in FP32, or cast, once for all who read it so."""
    if (wide := _widened(graph, node)) is not None:
        return wide
    others = [user for user in node.users if user.target in _CASTS and _is_fp32(user) and _same_place(user, node)]
    # Inductor has no lowering of `_to_copy`, which was decomposed before.
    cast = _again(graph, node, (node, torch.float32), {}, torch.ops.prims.convert_element_type.default)
    for other in others:
        other.replace_all_uses_with(cast)
    return cast


def _again(
    graph: fx.Graph, like: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any = None
) -> fx.Node:
    """A node such as `like`, right after it, that gives FP32."""
    with graph.inserting_after(like):
        new = graph.create_node("call_function", target or like.target, args, dict(kwargs), name=f"{like.name}_fp32")
    new.meta = {key: value for key, value in like.meta.items() if key != "tensor_meta"}
    with like.meta["val"].fake_mode:
        new.meta["val"] = like.meta["val"].to(torch.float32)
    return new


def _is_low(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in LOW_DTYPES


def _is_fp32(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _same_place(cast: fx.Node, node: fx.Node) -> bool:
    return bool(cast.meta["val"].device == node.meta["val"].device)
