"""What ranks found each in its own batches, brought together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mpcompile.training.distributed.ranks import Ranks
from mpcompile.training.loss_scale.overflow import Overflow

if TYPE_CHECKING:
    from mpcompile.ranges import Ranges


def first_of(ranks: Ranks, found: Overflow | None) -> Overflow | None:
    """The overflow of the first rank that has one, with its number; a collective."""
    every = _of_all(ranks, found)
    return next((replace(one, rank=rank) for rank, one in enumerate(every) if one is not None), None)


def joined(ranks: Ranks, found: Ranges) -> Ranges:
    """The ranges of all ranks' batches, the same on each; a collective."""
    every = _of_all(ranks, found)
    whole: Ranges = replace(every[0], batches=sum(one.batches for one in every))
    for one in every[1:]:
        for graph in one.graphs:
            whole.note_graph(graph)
        for key, spread in one.values.items():
            whole.note(key, spread)
        for key, spread in one.gradients.items():
            whole.note(key, spread, gradient=True)
    return whole


def _of_all(ranks: Ranks, mine: Any) -> list[Any]:
    every: list[Any] = [None] * ranks.size
    dist.all_gather_object(every, mine, group=ranks.group)
    return every


__all__ = ["first_of", "joined"]
