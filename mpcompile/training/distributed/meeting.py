"""Calls that all ranks must make, and a word about the ranks that do not come."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.groups import patience_of
from mpcompile.training.distributed.ranks import Ranks


class Meeting:
    """A gloo group beside that of the gradients: what waits there says who is missing, and is mixed up with no gradient.

    Made by all ranks at once.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self.patience = ranks, patience_of(ranks.group, device) or timedelta(minutes=10)
        members = dist.get_process_group_ranks(ranks.group)
        self._group = dist.new_group(members, timeout=self.patience, backend="gloo", use_local_synchronization=True)

    def meet(self, what: str) -> None:
        """Wait until all ranks call this.

        Raises:
          TrainingError: MP548, with those that did not come within the process group's timeout.
        """
        try:
            dist.monitored_barrier(self._group, timeout=self.patience, wait_all_ranks=True)
        except RuntimeError as error:
            why, try_ = str(error)[-300:], "call it on every rank; one alone may write the file"
            raise TrainingError(
                "MP548", f"{what} is a call of all ranks, and not all came", why=why, try_=try_
            ) from error

    def of_all(self, mine: Any) -> list[Any]:
        """What each rank gives."""
        every: list[Any] = [None] * self._ranks.size
        dist.all_gather_object(every, mine, group=self._group)
        return every


__all__ = ["Meeting"]
