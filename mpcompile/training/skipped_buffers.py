"""Buffers of the model (running statistics, averages) as they were, where a step was skipped.

A forward that overflows writes infinities into BatchNorm's statistics, and there they would stay for good.  What the
forward writes is copied before, and put back by the update's own `finite`: on the device, in a fixed number of calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpcompile.torch_internals.tensors import foreach_copy
from mpcompile.training.distributed.ranks import Ranks


class _Group:
    """Buffers of one type and device, with room for their old and their new values: [elements] each."""

    def __init__(self, held: list[Tensor]) -> None:
        self.held = held
        sizes = [t.numel() for t in held]
        like = held[0]
        self.old, self.new = (torch.empty(sum(sizes), dtype=like.dtype, device=like.device) for _ in range(2))
        pairs = zip(torch.split(self.old, sizes), torch.split(self.new, sizes), held, strict=True)
        views = [(o.view(t.shape), n.view(t.shape)) for o, n, t in pairs]
        self.olds, self.news = [o for o, _ in views], [n for _, n in views]

    def remember(self) -> None:
        foreach_copy(self.olds, self.held)

    def keep_if(self, finite: Tensor, ranks: Ranks | None) -> None:
        foreach_copy(self.news, self.held)
        torch.where(finite.to(self.new.device), self.new, self.old, out=self.new)
        if ranks is not None:
            dist.broadcast(self.new, ranks.first(), group=ranks.group)
        foreach_copy(self.held, self.news)


class SkippedBuffers:
    """Remembers, at the start of each window of microbatches, what its forwards write.

    Among several `ranks` each has statistics of its own batches: after an update all have the first rank's, which is what
    DistributedDataParallel makes of them before a forward.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks
        self.clear()

    def clear(self) -> None:
        self._groups: list[_Group] = []
        self._known: set[int] = set()
        self._seen: dict[int, Any] = {}

    @torch.no_grad()
    def remember(self, specialization: Any, held: Sequence[Tensor], *, first: bool) -> None:
        """Before `specialization` runs.

        Args:
          held: what it writes of the model.
          first: it opens a window.
        """
        fresh = self._of(specialization, held) if id(specialization) not in self._seen else []
        for group in self._groups if first else fresh:
            group.remember()

    def _of(self, specialization: Any, held: Sequence[Tensor]) -> list[_Group]:
        self._seen[id(specialization)] = specialization
        alike = defaultdict[Any, list[Tensor]](list)
        for one in held:
            if id(one) not in self._known:
                alike[one.dtype, one.device].append(one)
        self._known.update(map(id, held))
        made = [_Group(group) for group in alike.values()]
        self._groups += made
        return made

    @torch.no_grad()
    def keep_if(self, finite: Tensor) -> None:
        """At the end of a window: all as it was, unless the update was finite."""
        for group in self._groups:
            group.keep_if(finite, self._ranks)


__all__ = ["SkippedBuffers"]
