"""The loss region in chunks of rows: logits of a large vocabulary are never held whole, in FP32 or at all.

``cross_entropy(linear(h, w))`` keeps rows x classes logits for the backward, the largest tensor of a language model's
step, and its gradient beside it.  The seed of the backward (the loss scale) is known before the forward starts, so
each chunk of rows is taken forward and backward at once: its gradient for `h` and its part of the gradient for `w`
replace its logits.  The arithmetic of a chunk is autograd's own of the rewritten nodes, so roundings stay what the
plan says; the parts for `w` are summed in FP32.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.frontends.align import padded

aten = torch.ops.aten
# Chunk when the FP32 logits would take more; in at most so many chunks, each of which is compiled.
WORTH_BYTES, MOST = 16 << 20, 16
_ROW_OPS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default,
            aten.clone.default, aten.slice.Tensor, aten._unsafe_view.default)  # fmt: skip


@dataclass(frozen=True)
class Region:
    """One found region: the loss node, its linear, and what stands between (in order)."""

    loss: fx.Node
    linear: fx.Node
    between: tuple[fx.Node, ...]

    @property
    def casts(self) -> tuple[torch.dtype, ...]:
        return tuple(n.args[1] for n in self.between if n.target is aten.to.dtype)  # type: ignore[misc]


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear layer, forward and backward by chunks of rows.

    `seed` must be the gradient that arrives, up to a factor: the gradients are made with it in the forward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, seed: Tensor,
                options: tuple[Any, ...]) -> Tensor:  # fmt: skip
        chunks, extra, casts, ignore, smoothing = options
        classes, wide = weight.shape[0], (padded(weight, extra), None if bias is None else padded(bias, extra))
        count: Tensor = (target != ignore).sum().float()
        unit = seed / count
        total: Tensor | None = None
        rows, hiddens = hidden.shape[0], list[Tensor]()
        sums: list[Any] = [None, None]
        for number in range(chunks):
            first, last = rows * number // chunks, rows * (number + 1) // chunks
            part = _chunk(hidden[first:last], *wide, classes, target[first:last], unit, casts, ignore, smoothing)
            total = part[0] if total is None else total + part[0]
            hiddens.append(part[1])
            sums = [g if s is None else (s if g is None else s + g) for s, g in zip(sums, part[2:], strict=True)]
        sums = [None if s is None else s[:classes] for s in sums]
        kept = [torch.cat(hiddens), sums[0].to(weight.dtype), None if bias is None else sums[1].to(bias.dtype)]
        ctx.save_for_backward(seed, *kept)
        assert total is not None
        mean: Tensor = total / count
        return mean

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor) -> tuple[Any, ...]:
        seed, hidden, weight, bias = ctx.saved_tensors
        # 1 exactly where the loss is the step's own; another factor where it is one term of it.
        factor = arrived[0] / seed
        grads = [None if g is None else (g * factor).to(g.dtype) for g in (hidden, weight, bias)]
        return (*grads, None, None, None)


def _chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: int, target: Tensor, unit: Tensor,
           casts: Sequence[torch.dtype], ignore: int, smoothing: float) -> tuple[Any, ...]:  # fmt: skip
    """(sum of losses, gradient for the rows, FP32 gradients for weight and bias) of one chunk.

    Rows of `weight` beyond the `classes` are padding.
    """
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() if t is not None else None for t in (hidden, weight, bias)]
        logits = torch.nn.functional.linear(leaves[0], leaves[1], leaves[2])[:, :classes]  # type: ignore[arg-type]
        for dtype in casts:
            logits = logits.to(dtype)
        loss = torch.nn.functional.cross_entropy(
            logits, target, ignore_index=ignore, reduction="sum", label_smoothing=smoothing
        )
        wanted = [t for t in leaves if t is not None]
        grads = list(torch.autograd.grad(loss, wanted, unit.to(loss.dtype)))
    return loss.detach(), grads[0], grads[1].float(), grads[2].float() if bias is not None else None


def chunked_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, seed: Tensor,
                 options: tuple[Any, ...]) -> Tensor:  # fmt: skip
    """`ChunkedLoss`, as a function for graphs."""
    return ChunkedLoss.apply(hidden, weight, bias, target, seed, options)  # type: ignore[no-any-return,no-untyped-call]


def find(module: fx.GraphModule, value_of: Callable[[Any], Tensor]) -> list[Region]:
    """The regions worth chunking: logits read by the loss alone, class indices as targets, no class weights."""
    found = []
    for loss in module.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
        region = _region(loss)
        if region is None:
            continue
        logits = value_of(loss.args[0])
        if logits.dim() == 2 and 4 * _hint(logits.numel()) > WORTH_BYTES:
            found.append(region)
    return found


def rewrite(
    module: fx.GraphModule,
    regions: Sequence[Region],
    seed: fx.Node,
    value_of: Callable[[Any], Tensor],
    extra_of: Callable[[fx.Node], int] = lambda linear: 0,
) -> None:
    """Replace each region by `chunked_loss`.

    Args:
      seed: the graph's input that holds the backward's seed.
      value_of: the fake value of a node.
      extra_of: columns of zeros that a linear's product should get (see `mpcompile.frontends.align`).
    """
    for region in regions:
        hidden, weight, *rest = region.linear.args
        width = value_of(hidden).shape[-1]
        chunks = chunk_count(_hint(value_of(region.loss.args[0]).shape[0]), _hint(width))
        with module.graph.inserting_before(region.loss):
            rows = hidden
            for node in region.between:
                rows = _replay(module.graph, node, rows, width)
            ignore, smoothing = (
                _argument(region.loss, 4, "ignore_index", -100),
                _argument(region.loss, 5, "label_smoothing", 0.0),
            )
            options = (chunks, extra_of(region.linear), region.casts, ignore, smoothing)
            bias = rest[0] if rest else None
            new = module.graph.call_function(chunked_loss, (rows, weight, bias, region.loss.args[1], seed, options))
        new.meta.update({k: region.loss.meta[k] for k in region.loss.meta if k != "val"})
        region.loss.replace_all_uses_with(new)
        for node in (region.loss, *reversed(region.between), region.linear):
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()


def chunk_count(rows: int, width: int) -> int:
    """The number of chunks that holds the fewest bytes.

    Inductor sums the parts of the weight's gradient in one kernel, at the end: n chunks hold n - 1 parts of
    classes x width elements beside the last chunk's logits and their gradient, 2 x rows / n x classes.  The sum
    is least at n = sqrt(2 rows / width).
    """
    return max(2, min(MOST, round(math.sqrt(2 * rows / width))))


def _region(loss: fx.Node) -> Region | None:
    mean = _argument(loss, 3, "reduction", 1) == 1
    if not mean or _argument(loss, 2, "weight", None) is not None:
        return None
    between, node = list[fx.Node](), loss.args[0]
    while isinstance(node, fx.Node) and len(node.users) == 1 and node.target in (*_ROW_OPS, aten.to.dtype):
        between.insert(0, node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or len(node.users) != 1:
        return None
    return Region(loss, node, tuple(between))


def _replay(graph: fx.Graph, node: fx.Node, rows: Any, width: Any) -> Any:
    """What `node` does to the rows of the logits, done to the rows of the hidden states."""
    if node.target is aten.to.dtype:
        return rows
    if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        shape = node.args[1]
        assert isinstance(shape, (list, tuple))
        return graph.call_function(aten.reshape.default, (rows, [*shape[:-1], width]))
    return graph.call_function(node.target, (rows, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _hint(size: Any) -> int:
    node = getattr(size, "node", None)
    return int(node.hint) if node is not None else int(operator.index(size))
