"""The part of a training step that shares its update out among the ranks, and takes it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mpcompile.errors import TrainingError
from mpcompile.training.distributed.full_shares import FullShares
from mpcompile.training.distributed.meeting import Meeting
from mpcompile.training.distributed.share_hooks import ShareHooks
from mpcompile.training.distributed.share_optimizers import refuse_undivided
from mpcompile.training.distributed.shares import Shares
from mpcompile.training.distributed.team import Team
from mpcompile.training.gradients.specialization import SpecializationCache
from mpcompile.training.identity import ModelIdentity
from mpcompile.training.optimizer.build import UpdateContext
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.monitor import OptimizerMonitor
from mpcompile.training.optimizer.step_counters import counters_of


class Sharing:
    """Shares of a `TrainStep` with ``shard="update"`` or ``"full"`` (decisions 0034, 0038); else nothing."""

    specializations: SpecializationCache
    device: torch.device
    identity: ModelIdentity
    model: torch.nn.Module
    optimizers: Optimizers
    context: UpdateContext
    team: Team
    monitor: OptimizerMonitor
    _meeting: Meeting | None = None
    _hooks: ShareHooks | None = None

    def _prepare_shares(self) -> None:
        """Once, on all ranks.

        Raises:
          TrainingError: MP549.
        """
        scatterer = self.team.scatterer
        if scatterer is None:
            return
        refuse_undivided(self.optimizers)
        scatterer.named = lambda: self.specializations.named
        self._meeting = Meeting(scatterer.ranks, self.device)
        self._hooks = ShareHooks(lambda: self.context.shares, self.model, self.optimizers, self.monitor)

    def _share_out(self) -> None:
        """Keep of masters and moments what this rank updates, once it is settled which that is."""
        scatterer = self.team.scatterer
        if scatterer is None or scatterer.layout is None or self.context.shares is not None:
            return
        assert self._meeting is not None
        given = (scatterer.ranks, self._meeting, scatterer.layout, self.specializations.named, self.context.shadows,
                 self.optimizers)  # fmt: skip
        self.context.shares = made = (
            Shares(*given)
            if scatterer.full is None
            else FullShares(*given, model=self.model, chunks=scatterer.chunks, orders=scatterer.orders)
        )
        self.context.shares_epoch += 1
        self.monitor.counters = [counters_of(one) for one in made.optimizers]
        self.monitor.accept()
        self.identity.take()

    def _give_back(self, *, anew: bool = False) -> None:
        """Let this rank hold all of it again. A call of all ranks.

        Args:
          anew: graphs are void too, and the next ones settle who holds what.

        Raises:
          TrainingError: MP548.
        """
        shares = self.context.shares
        if anew and self.team.scatterer is not None:
            self.team.forget()
        if shares is None:
            return
        shares.release()
        self.context.shares = None
        self.context.shares_epoch += 1
        self.monitor.counters = [counters_of(one) for one in self.optimizers]
        for counters in self.monitor.counters:
            counters.clear()
        self.monitor.accept()
        self.identity.take()

    def _look_at_shares(self) -> None:
        """Refuse to go on where weights were edited that are shared out.

        Raises:
          TrainingError: MP549.
        """
        if self.context.shares is not None and self._hooks is not None:
            self._hooks.close()
            self.context.shares.check()

    def write_once(self, write: Callable[[], None]) -> None:
        """Let a file be written by the first of the ranks that gathered what is in it; all are told how it went.

        Raises:
          TrainingError: MP513, on every rank; MP548.
        """
        if self.context.shares is None or self._meeting is None:
            write()
            return
        failed: TrainingError | None = None
        if self.context.shares.ranks.rank == 0:
            try:
                write()
            except TrainingError as error:
                failed = error
        self._meeting.meet("save_checkpoint()")
        told = self._meeting.of_all(None if failed is None else str(failed))[0]
        if failed is not None:
            raise failed
        if told is not None:
            raise TrainingError("MP513", "the first rank could not write the checkpoint", why=told[:300])


def refuse_shard(shard: str, ranks: Any, masters: str) -> None:
    """Refuse what cannot be shared out.

    Raises:
      TrainingError: MP541.
    """
    if shard == "none":
        return
    if ranks is None:
        raise TrainingError("MP541", f"train_step(shard={shard!r}) without ranks to share it with",
                            try_="process_group=torch.distributed.group.WORLD, or mpcompile(DDP(model))")  # fmt: skip
    if masters == "split":
        raise TrainingError("MP541", f"train_step(shard={shard!r}, masters='split') is not possible",
                            why="a master is held in halves, or in shares",
                            try_="masters='full': a rank holds 4 / ranks bytes of it")  # fmt: skip


__all__ = ["Sharing", "refuse_shard"]
