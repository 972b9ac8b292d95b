"""The updates of a step: made once for each set of gradients, and void together when the step's epoch is another."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from mpcompile.training.accumulation import GradAccumulator, Layout
from mpcompile.training.cuda_graph import Replays, Run
from mpcompile.training.emitted.weave import Emitted
from mpcompile.training.gradients.joint import Joint
from mpcompile.training.gradients.specialization import SpecializationCache, compiling
from mpcompile.training.optimizer.build import Update, UpdateContext
from mpcompile.training.optimizer.monitor import OptimizerMonitor

Like = Callable[[], Sequence[Tensor]]


class UpdateCache:
    """Finds, or builds, the update for gradients of a layout; holds what stands on updates: recordings, emitted graphs.

    An update is made for tensors, groups, shadows and sums that it holds by identity. Whoever owns one of these counts
    its changes; `epoch` is all of the counts, and what was made in another epoch is let go of before anything is found.

    Fields:
      replays: what was recorded with these updates; emitted: what was emitted of them, by (specialization, update).
    """

    def __init__(
        self,
        *,
        context: UpdateContext,
        monitor: OptimizerMonitor,
        specializations: SpecializationCache,
        accumulator: GradAccumulator,
        replays: Replays,
        on_built: Callable[[], None],
    ) -> None:
        self.context, self.monitor = context, monitor
        self._specializations, self.accumulator = specializations, accumulator
        self._on_built = on_built
        self.replays = replays
        self.emitted: dict[tuple[int, int], tuple[Emitted, Joint]] = {}
        self._updates: dict[Any, Update] = {}
        self._epoch = self.epoch()

    def __iter__(self) -> Iterator[Update]:
        return iter(self._updates.values())

    def __len__(self) -> int:
        return len(self._updates)

    def epoch(self) -> tuple[Any, ...]:
        """What every update stands on, as one value: graphs, groups and state, sums, split masters, rule of the scale."""
        split = self.context.split.epoch if self.context.split is not None else 0
        shared = self.context.shares_epoch
        return self._specializations.epoch, self.monitor.epoch, self.accumulator.epoch, split, shared, self.context.rule

    def find(self, layout: Layout, strides: Any, like: Like) -> Update:
        """The update for gradients of `layout`, its numbers (learning rates …) as the groups have them now.

        Args:
          strides: how the gradients lie in memory; None where they lie as their parameters do.
          like: gives examples of them, where one must be built.
        """
        self.monitor.look()
        self.monitor.look_at_state()
        self._let_go()
        update = self._updates.get((layout, strides))
        if update is None or not (update.epoch == self.monitor.moves or update.holds()):
            update = self._build(layout, strides, like)
        update.epoch = self.monitor.moves
        if any(counters.ran is None or counters.ran() is not update for counters in self.monitor.counters):
            update.binding.resync()
            for counters in self.monitor.counters:
                counters.ran = weakref.ref(update)
        return update

    def replayed(self, key: tuple[Any, ...], run: Run, tensors: Sequence[Tensor], fixed: Like) -> Run:
        """`run`, or its replay; see `Replays.find`."""
        self._let_go()
        return self.replays.find(key, run, tensors, fixed)

    def _build(self, layout: Layout, strides: Any, like: Like) -> Update:
        with compiling():
            update = self.context.build(layout, like())
        # Parameters that moved together may part here: updates that took their counters for one are of another epoch.
        self.monitor.accept()
        self._let_go()
        self._on_built()
        replaced = self._updates.get((layout, strides))
        self._updates[layout, strides] = update
        if replaced is not None:
            self.replays.forget(id(replaced))
        return update

    def _let_go(self) -> None:
        """What was made in another epoch is void, and nothing of it is kept alive."""
        now = self.epoch()
        if now == self._epoch:
            return
        self._epoch = now
        self._updates.clear()
        self.emitted.clear()
        self.replays.clear()


__all__ = ["UpdateCache"]
