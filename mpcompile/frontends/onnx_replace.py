"""Operations of a forward that torch's exporter translates wrongly or not at all, in operations that it gets right.

They are put in place of the original before the export, which traces through them; each is tested against torch.

- ``cross_entropy_loss`` with class weights or label smoothing: the exporter drops the smoothing, silently.
- ``adaptive_max_pool2d``: it has no translation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.frontends.onnx_pool import adaptive_max_pool2d

aten = torch.ops.aten
MEAN, SUM = 1, 2


def cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN,
                  ignore_index: int = -100, label_smoothing: float = 0.0) -> Tensor:  # fmt: skip
    """`aten.cross_entropy_loss`, in FP32."""
    if target.is_floating_point():  # probabilities: torch itself takes this apart, without a loss of its own
        whole: Tensor = aten.cross_entropy_loss(x, target, weight, reduction, ignore_index, label_smoothing)
        return whole
    axis = 1 if x.dim() > 1 else 0
    classes = x.shape[axis]
    logs = torch.log_softmax(x.float(), axis)
    counts = target != ignore_index
    safe = torch.where(counts, target, torch.zeros_like(target))
    picked = -logs.gather(axis, safe.unsqueeze(axis)).squeeze(axis)
    weights = torch.ones_like(picked) if weight is None else weight.float()[safe]
    weights = torch.where(counts, weights, torch.zeros_like(weights))
    spread = logs if weight is None else logs * weight.float().reshape([-1] + [1] * (x.dim() - axis - 1))
    smooth = torch.where(counts, -spread.sum(axis), torch.zeros_like(picked))
    loss = (1.0 - label_smoothing) * picked * weights + (label_smoothing / classes) * smooth
    if reduction == MEAN:
        loss = loss.sum() / weights.sum()
    elif reduction == SUM:
        loss = loss.sum()
    return loss.to(x.dtype)


def _is_wrong(node: fx.Node) -> bool:
    """True for a cross entropy whose class weights or smoothing the exporter would get wrong."""
    given = dict(
        zip(("x", "target", "weight", "reduction", "ignore_index", "label_smoothing"), node.args, strict=False)
    )
    given |= node.kwargs
    return given.get("weight") is not None or bool(given.get("label_smoothing"))


def replace_wrong(module: fx.GraphModule) -> int:
    """Replace such operations in place; how many there were."""
    count = 0
    for node in module.graph.nodes:
        act: Any = None
        if node.target is aten.cross_entropy_loss.default and _is_wrong(node):
            act = cross_entropy
        elif node.target is aten.adaptive_max_pool2d.default:
            act = adaptive_max_pool2d
        if act is not None:
            node.target = act
            count += 1
    if count:
        module.recompile()
    return count


__all__ = ["cross_entropy", "replace_wrong"]
