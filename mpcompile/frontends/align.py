"""Low products whose rows tensor cores cannot read: padded by zero columns, so that the fast kernels can be chosen.

A row of 50,257 BF16 logits does not begin on 16 bytes, and every product that reads or writes such rows (forward, both
gradients) falls back to kernels that load element by element.  Inductor pads some of them, by its own measurement, and
not others: on an H100 the gradient of GPT-2's output weight took 8.3 ms of 46, four times as long as with 50,304 columns
(docs/decisions/0016).  Here the weight gets rows of zeros, the product is made over all of them, and its readers see the
columns that there were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from mpcompile.graph import LOW, PrecisionGraph

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


def align_linears(module: fx.GraphModule, plan: PrecisionGraph, device: str) -> int:
    """Pad the low `linear` calls of a written module, in place; returns how many."""
    done = 0
    for node in module.graph.find_nodes(op="call_function", target=aten.linear.default):
        columns = low_columns(node, plan)
        extra = padding(columns, device)
        if extra:
            _align(module.graph, node, columns, extra)
            done += 1
    if done:
        module.recompile()
    return done


def low_columns(node: fx.Node, plan: PrecisionGraph) -> int:
    """Columns that a written `linear` makes, where it is low and its weight has a fixed size; 0 for any other."""
    planned = plan.nodes.get(node.meta.get("mp_node", ""))
    if planned is None or planned.precision not in LOW or len(planned.inputs) < 2:
        return 0
    shape = plan.values[planned.inputs[1]].shape
    return shape[0] if len(shape) == 2 and isinstance(shape[0], int) else 0


def _align(graph: fx.Graph, node: fx.Node, columns: int, extra: int) -> None:
    x, *weights = node.args
    with graph.inserting_before(node):
        wide = [_pad(graph, weight, dims, extra) for weight, dims in zip(weights, (2, 1), strict=False)]
        product = graph.call_function(aten.linear.default, (x, *wide))
        own = graph.call_function(aten.slice.Tensor, (product, -1, 0, columns))
    for new in (product, own, *(one for one in wide if one is not None)):
        new.meta.update(node.meta)
    node.replace_all_uses_with(own)
    graph.erase_node(node)


def _pad(graph: fx.Graph, weight: fx.node.Argument, dims: int, extra: int) -> fx.Node | None:
    if weight is None:
        return None
    sides: Sequence[int] = [0, 0] * (dims - 1) + [0, extra]
    return graph.call_function(aten.constant_pad_nd.default, (weight, sides))
