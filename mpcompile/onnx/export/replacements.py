"""Operations of a forward that torch's exporter translates wrongly or not at all, in operations that it gets right.

They are put in place of the original before the export, which traces through them; each is tested against torch.

- ``cross_entropy_loss`` with label smoothing: the exporter drops the smoothing, silently; of probabilities: it writes an
  operator that takes classes only.
- ``adaptive_max_pool2d``: it has no translation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.onnx.export.pooling import adaptive_max_pool2d

aten = torch.ops.aten
MEAN, SUM = 1, 2


def cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN,
                  ignore_index: int = -100, label_smoothing: float = 0.0) -> Tensor:  # fmt: skip
    """`aten.cross_entropy_loss`; in elementary FP32 operations where the exporter would get it wrong."""
    if target.is_floating_point():
        return _of_probabilities(x, target, weight, reduction, label_smoothing)
    if weight is None and not label_smoothing:
        whole: Tensor = aten.cross_entropy_loss(x, target, None, reduction, ignore_index, 0.0)
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


def _of_probabilities(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, smoothing: float) -> Tensor:
    axis = 1 if x.dim() > 1 else 0
    classes = x.shape[axis]
    wanted = target.float() * (1.0 - smoothing) + smoothing / classes
    if weight is not None:
        wanted = wanted * weight.float().reshape([-1] + [1] * (x.dim() - axis - 1))
    loss = -(torch.log_softmax(x.float(), axis) * wanted).sum(axis)
    if reduction == MEAN:
        loss = loss.mean()
    elif reduction == SUM:
        loss = loss.sum()
    return loss.to(x.dtype)


REPLACED: dict[Any, Any] = {
    aten.cross_entropy_loss.default: cross_entropy,
    aten.adaptive_max_pool2d.default: adaptive_max_pool2d,
}


def replace_wrong(module: fx.GraphModule) -> int:
    """Replace such operations in place; how many there were."""
    found = [node for node in module.graph.nodes if node.target in REPLACED]
    for node in found:
        node.target = REPLACED[node.target]
    if found:
        module.recompile()
    return len(found)


__all__ = ["cross_entropy", "replace_wrong"]
