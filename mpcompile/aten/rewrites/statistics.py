"""Running statistics that stay finite: a batch that overflows FP16 leaves them as they were.

A scaler skips the update of such a batch, and the forward has written infinities by then, for good.  A training step puts
its buffers back (`mpcompile.training.skipped_buffers`); in the drop-in, whose forward ends before anyone knows of the
gradients, the graph itself keeps each old statistic whose new value is not finite.
"""

from __future__ import annotations

import torch
from torch import fx

_ATEN = torch.ops.aten
# Operation -> places of the running mean and variance, and of the flag that they are written.
_NORMS = {_ATEN.batch_norm.default: ((3, 4), 5), _ATEN.instance_norm.default: ((3, 4), 5)}


def keep_finite(module: fx.GraphModule) -> int:
    """Let each normalization that writes running statistics keep the finite ones, in place. Returns how many it changed."""
    changed = 0
    for target, (places, flag) in _NORMS.items():
        for node in module.graph.find_nodes(op="call_function", target=target):
            held = {i: node.args[i] for i in places if isinstance(node.args[i], fx.Node)}
            if node.args[flag] and held:
                _keep(module.graph, node, held)
                changed += 1
    if changed:
        module.recompile()
    return changed


def _keep(graph: fx.Graph, node: fx.Node, held: dict[int, fx.Node]) -> None:
    """The norm writes to copies: its backward keeps those, and would miss a write to the statistics themselves."""
    with graph.inserting_before(node):
        copies = {i: graph.call_function(_ATEN.clone.default, (one,)) for i, one in held.items()}
    node.args = tuple(copies.get(i, argument) for i, argument in enumerate(node.args))
    last = node
    for i, one in held.items():
        for target, args in ((_ATEN.isfinite.default, (copies[i],)), (_ATEN.where.self, (None, copies[i], one)),
                             (_ATEN.copy_.default, (one, None))):  # fmt: skip
            with graph.inserting_after(last):
                last = graph.call_function(target, tuple(last if a is None else a for a in args))


__all__ = ["keep_finite"]
