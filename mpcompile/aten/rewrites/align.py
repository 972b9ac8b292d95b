"""Low products whose rows tensor cores cannot read: padded by zero columns, so that the fast kernels can be chosen.

A row of 50,257 BF16 logits does not begin on 16 bytes, and every product that reads or writes such rows (forward, both
gradients) falls back to kernels that load element by element.  Inductor pads some of them, by its own measurement, and
not others: on an H100 the gradient of GPT-2's output weight took 8.3 ms of 46, four times as long as with 50,304 columns
(docs/decisions/0017).  Here the weight gets rows of zeros, and the product is made over all of them.  Its readers see the
columns that there were; a loss that alone reads them sees all, closed by a bias so low that no exponential is left of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mpcompile.aten.read import FxCapture
from mpcompile.aten.rewrites.logits import LogitsRegion, region_of, replay, values_of_written
from mpcompile.formats import LOW
from mpcompile.graph import PrecisionGraph

aten = torch.ops.aten
# 16 bytes hold so many low elements; NVIDIA's guide to matrix products asks for it, and for 128 bytes at best.
UNIT, BEST = 8, 64
DEVICES = frozenset({"cuda"})
# Columns from which the kernels' difference is more than that of a launch.
WIDE = 1024


def padding(columns: int, device: str) -> int:
    """Columns of zeros that a low product of so many columns should get; 0 where its rows are aligned."""
    return -columns % BEST if device in DEVICES and columns >= WIDE and columns % UNIT else 0


def padded(tensor: Tensor, rows: int) -> Tensor:
    """A weight or bias with so many rows (elements) of zeros after its own; itself for 0."""
    return torch.constant_pad_nd(tensor, [0, 0] * (tensor.dim() - 1) + [0, rows]) if rows else tensor


def closed(weight: Tensor, bias: Tensor | None, rows: int) -> Tensor | None:
    """The bias (zeros, for None) with the lowest number for so many further rows; `bias` for 0."""
    if not rows:
        return bias
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return torch.constant_pad_nd(bias, [0, rows], torch.finfo(weight.dtype).min)


def align_linears(module: fx.GraphModule, capture: FxCapture, plan: PrecisionGraph, device: str) -> int:
    """Pad the low `linear` calls of a written module, in place; returns how many.

    Args:
      capture: what was read; plan: its graph after the passes.
    """
    wanted = {}
    for node in module.graph.find_nodes(op="call_function", target=aten.linear.default):
        columns = low_columns(node, plan)
        if extra := padding(columns, device):
            wanted[node] = columns, extra
    if not wanted:
        return 0
    value_of = values_of_written(capture)
    losses = module.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default)
    regions = {region.linear: region for loss in losses if (region := region_of(loss, value_of)) is not None}
    for node, (columns, extra) in wanted.items():
        region = regions.get(node)
        # Label smoothing would count the columns that the bias closes.
        if region is not None and not region.smoothing:
            _close(module.graph, region, columns + extra, extra)
        else:
            _align(module.graph, node, columns, extra)
    module.recompile()
    return len(wanted)


def low_columns(node: fx.Node, plan: PrecisionGraph) -> int:
    """Columns that a written `linear` makes, where it is low, its weight has a fixed size and its bias, if any, an
    element for each; 0 for any other.
    """
    planned = plan.nodes.get(node.meta.get("mp_node", ""))
    if planned is None or planned.precision not in LOW or len(planned.inputs) < 2:
        return 0
    shape, *bias = (plan.values[name].shape for name in planned.inputs[1:])
    fixed = len(shape) == 2 and isinstance(shape[0], int) and all(tuple(one) == (shape[0],) for one in bias)
    return int(shape[0]) if fixed else 0


def _align(graph: fx.Graph, node: fx.Node, columns: int, extra: int) -> None:
    """Readers of the product see the first `columns` of it."""
    x, weight, bias = (*node.args, None)[:3]
    with graph.inserting_before(node):
        wide = graph.call_function(padded, (weight, extra))
        longer = None if bias is None else graph.call_function(padded, (bias, extra))
        product = graph.call_function(aten.linear.default, (x, wide, longer))
        own = graph.call_function(aten.slice.Tensor, (product, -1, 0, columns))
    for new in (wide, product, own):
        new.meta.update(node.meta)
    node.replace_all_uses_with(own)
    graph.erase_node(node)


def _close(graph: fx.Graph, region: LogitsRegion, columns: int, extra: int) -> None:
    """The loss reads all `columns`, the `extra` ones at the lowest number."""
    x, weight, bias = (*region.linear.args, None)[:3]
    with graph.inserting_before(region.loss):
        wide = graph.call_function(padded, (weight, extra))
        lowest = graph.call_function(closed, (weight, bias, extra))
        rows = product = graph.call_function(aten.linear.default, (x, wide, lowest))
        product.meta.update(region.linear.meta)
        for node in region.between:
            rows = replay(graph, node, rows, columns)
            rows.meta.update(node.meta)
    region.loss.args = (rows, *region.loss.args[1:])
    for node in (*reversed(region.between), region.linear):
        graph.erase_node(node)
