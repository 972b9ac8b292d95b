"""What ranks decide together of gradients of which each has a share: one collective of two numbers of each rank."""

from __future__ import annotations

import torch
from torch import Tensor

from mpcompile.torch_internals.groups import collectives as _C10D
from mpcompile.training.distributed.ranks import Ranks


def of_all(ranks: Ranks, mine: Tensor) -> Tensor:
    """`mine` of every rank, one after the other along the first dimension; the same bits on all. In a trace, nodes."""
    found: Tensor = _C10D.wait_tensor(_C10D.all_gather_into_tensor(mine, ranks.size, ranks.name))
    return found


def decide(ranks: Ranks, broken: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(per rank, whether its share holds what is not finite: 0 or 1; per rank, the norm of its share), FP32 each.

    Whichever way a rank's update runs, it asks this once, of gradients that are still scaled: the ways may differ.

    Args:
      broken: 0-dim, 0 or 1; norm: 0-dim.
    """
    every = of_all(ranks, torch.stack([broken.float(), norm.float()])).view(ranks.size, 2)
    return every[:, 0], every[:, 1]


__all__ = ["decide", "of_all"]
