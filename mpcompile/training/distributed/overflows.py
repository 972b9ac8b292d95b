"""Whose batch overflowed."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from mpcompile.training.distributed.ranks import Ranks
from mpcompile.training.loss_scale.overflow import Overflow


def first_of(ranks: Ranks, found: Overflow | None) -> Overflow | None:
    """The overflow of the first rank that has one, with its number; a collective."""
    every: list[Overflow | None] = [None] * ranks.size
    dist.all_gather_object(every, found, group=ranks.group)
    return next((replace(one, rank=rank) for rank, one in enumerate(every) if one is not None), None)


__all__ = ["first_of"]
