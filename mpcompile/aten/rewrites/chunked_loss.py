"""The loss region in chunks of rows: logits of a large vocabulary are never held whole, in FP32 or at all.

``cross_entropy(linear(h, w))`` keeps rows x classes logits for the backward, the largest tensor of a language model's
step, and its gradient beside it.  The seed of the backward (the loss scale) is known before the forward starts, so
each chunk of rows is taken forward and backward at once: its gradient for `h` and its part of the gradient for `w`
replace its logits.  The arithmetic of a chunk is autograd's own of the rewritten nodes, so roundings stay what the
plan says; the parts for `w` are summed in FP32.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import argument
from mpcompile.aten.rewrites.align import closed, padded
from mpcompile.aten.rewrites.logits import LogitsRegion, ValueOf, region_of, replay

aten = torch.ops.aten
# Chunk when the FP32 logits would take more; in at most so many chunks, each of which is compiled.
WORTH_BYTES, MOST = 16 << 20, 16
# Rows of a chunk on a GPU are a multiple: what a tile of its products takes.
TILE = 128

# (logits, targets, unit, classes, ignore, smoothing) -> (losses of the rows, gradient of the logits), by a kernel.
RowsKernel = Callable[[Tensor, Tensor, Tensor, int, int, float], tuple[Tensor, Tensor]]


class Options(NamedTuple):
    """How a loss region is taken.

    Fields:
      chunks: of the rows. extra: columns of zeros that the product gets.
      casts: of the logits, in order. ignore, smoothing: as `torch.nn.functional.cross_entropy` has them.
      kernel: losses and gradient of a chunk's logits; None has autograd's own.
    """

    chunks: int
    extra: int
    casts: tuple[torch.dtype, ...]
    ignore: int
    smoothing: float
    kernel: RowsKernel | None = None

    @property
    def by_kernel(self) -> bool:
        """A kernel computes in FP32, whatever the logits are: it serves where the program does so too."""
        return self.kernel is not None and self.casts[-1:] == (torch.float32,) and set(self.casts) == {torch.float32}


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear layer, forward and backward by chunks of rows.

    `seed` must be the gradient that arrives, up to a factor: the gradients are made with it in the forward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, weights: Tensor | None,
                seed: Tensor, given: tuple[Any, ...]) -> Tensor:  # fmt: skip
        options = Options(*given)
        classes, biased = weight.shape[0], bias is not None
        wide = padded(weight, options.extra), _widened(weight, bias, options)
        count = _count(target, weights, options.ignore)
        unit = seed / count
        total: Tensor | None = None
        hiddens = list[Tensor]()
        sums: list[Any] = [None, None]
        ends = bounds(hidden.shape[0], options.chunks, hidden.device.type)
        for first, last in itertools.pairwise(ends):
            rows = hidden[first:last], *wide, biased, target[first:last], unit
            part = _by_kernel(*rows, classes, options) if options.by_kernel else _chunk(*rows, weights, options)
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
        return (*grads, None, None, None, None)


def _count(target: Tensor, weights: Tensor | None, ignore: int) -> Tensor:
    """0-dim FP32: what the mean divides by, the rows that count or the sum of their classes' weights."""
    counted = target != ignore
    if weights is None:
        return counted.sum().float()
    return torch.where(counted, weights.float()[torch.where(counted, target, 0)], 0.0).sum()


def _widened(weight: Tensor, bias: Tensor | None, options: Options) -> Tensor | None:
    """The bias of the padded product: a kernel knows which columns are classes, torch's loss sees the others closed."""
    if not options.by_kernel:
        return closed(weight, bias, options.extra)
    return None if bias is None else padded(bias, options.extra)


def _chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, biased: bool, target: Tensor, unit: Tensor,
           weights: Tensor | None, options: Options) -> tuple[Any, ...]:  # fmt: skip
    """(sum of losses, gradient for the rows, FP32 gradients for weight and bias) of one chunk.

    `biased` says whether the bias is the model's, and wants a gradient.
    """
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (hidden, weight, *((bias,) if biased else ()))]
        logits = torch.nn.functional.linear(leaves[0], leaves[1], leaves[2] if biased else bias)
        for dtype in options.casts:
            logits = logits.to(dtype)
        loss = torch.nn.functional.cross_entropy(
            logits,
            target,
            None if weights is None else weights.to(logits.dtype),
            ignore_index=options.ignore,
            reduction="sum",
            label_smoothing=options.smoothing,
        )
        grads = list(torch.autograd.grad(loss, leaves, unit.to(loss.dtype)))
    return loss.detach(), grads[0], grads[1].float(), grads[2].float() if biased else None


def _by_kernel(hidden: Tensor, weight: Tensor, bias: Tensor | None, biased: bool, target: Tensor, unit: Tensor,
               classes: int, options: Options) -> tuple[Any, ...]:  # fmt: skip
    """The same as `_chunk`, the loss and its gradient by `options.kernel`."""
    assert options.kernel is not None
    logits = torch.nn.functional.linear(hidden, weight, bias)
    losses, grad = options.kernel(logits, target, unit, classes, options.ignore, options.smoothing)
    of_bias = grad.sum(0, dtype=torch.float32) if biased else None
    return losses.sum(), grad @ weight, (grad.t() @ hidden).float(), of_bias


def chunked_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, weights: Tensor | None,
                 seed: Tensor, options: tuple[Any, ...]) -> Tensor:  # fmt: skip
    """`ChunkedLoss`, as a function for graphs; `options` are those of `Options`."""
    return ChunkedLoss.apply(hidden, weight, bias, target, weights, seed, options)  # type: ignore[no-any-return,no-untyped-call]


def find(module: fx.GraphModule, value_of: ValueOf) -> list[LogitsRegion]:
    """The regions worth chunking: large logits, and the mean of their losses."""
    found = []
    for loss in module.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
        region = region_of(loss, value_of, weighted=True) if argument(loss, 3, "reduction", 1) == 1 else None
        if region is None:
            continue
        if 4 * _hint(value_of(loss.args[0]).numel()) > WORTH_BYTES:
            found.append(region)
    return found


def rewrite(
    module: fx.GraphModule,
    regions: Sequence[LogitsRegion],
    seed: fx.Node,
    value_of: ValueOf,
    extra_of: Callable[[fx.Node], int],
    kernel: RowsKernel | None = None,
) -> None:
    """Replace each region by `chunked_loss`.

    Args:
      seed: the graph's input that holds the backward's seed.
      value_of: the fake value of a node.
      extra_of: columns of zeros that a linear's product should get (see `mpcompile.aten.rewrites.align`).
      kernel: computes losses and gradients of rows of logits, where there is one.
    """
    for region in regions:
        hidden, weight, *rest = region.linear.args
        width = value_of(hidden).shape[-1]
        chunks = chunk_count(_hint(value_of(region.loss.args[0]).shape[0]), _hint(width))
        with module.graph.inserting_before(region.loss):
            rows = hidden
            for node in region.between:
                rows = rows if node.target is aten.to.dtype else replay(module.graph, node, rows, width)
            # The kernel has no weights of classes; torch's loss of a chunk has.
            by = kernel if region.weights is None else None
            options = Options(chunks, extra_of(region.linear), region.casts, region.ignore, region.smoothing, by)
            if region.weights is not None or (region.smoothing and not options.by_kernel):
                # Padding is closed by a bias, which label smoothing would count, and has no weights.
                options = options._replace(extra=0)
            bias = rest[0] if rest else None
            operands: Any = (rows, weight, bias, region.loss.args[1], region.weights, seed, tuple(options))
            new = module.graph.call_function(chunked_loss, operands)
        new.meta.update({k: region.loss.meta[k] for k in region.loss.meta if k != "val"})
        region.loss.replace_all_uses_with(new)
        for node in (region.loss, *reversed(region.between), region.linear):
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()


def bounds(rows: Any, chunks: int, device: str) -> list[Any]:
    """Where the chunks begin, and `rows`.

    On a GPU no two chunks have as many rows: Inductor takes the losses of chunks of one size in a single kernel, and so
    holds all their logits at once.
    """
    unit = TILE if device == "cuda" and isinstance(rows, int) and rows >= TILE * chunks * chunks else 0
    if not unit:
        return [rows * number // chunks for number in range(chunks + 1)]
    sizes = [(rows // unit // chunks + number - chunks // 2) * unit for number in range(chunks - 1)]
    return [0, *itertools.accumulate(sizes), rows]


def chunk_count(rows: int, width: int) -> int:
    """The number of chunks that holds the fewest bytes.

    Inductor sums the parts of the weight's gradient in one kernel, at the end: n chunks hold n - 1 parts of
    classes x width elements beside the last chunk's logits and their gradient, 2 x rows / n x classes.  The sum
    is least at n = sqrt(2 rows / width).
    """
    return max(2, min(MOST, round(math.sqrt(2 * rows / width))))


def _hint(size: Any) -> int:
    node = getattr(size, "node", None)
    return int(node.hint) if node is not None else int(operator.index(size))
