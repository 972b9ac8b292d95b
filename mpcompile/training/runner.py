"""Runs the batches of a step: whole, or into a window of microbatches; replayed where a CUDA graph was recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcompile.torch_internals.optimizers import hooks_of_all_optimizers, step_hooks
from mpcompile.training.accumulation import Layout
from mpcompile.training.cuda_graph import Run
from mpcompile.training.distributed.team import Team
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.gradients.specialization import Specialization
from mpcompile.training.loss_scale.floor_monitor import LossScaleFloorMonitor
from mpcompile.training.optimizer.build import Update
from mpcompile.training.optimizer.hosts import GradientsUnread, is_not_ours
from mpcompile.training.optimizer.update_cache import Like, UpdateCache
from mpcompile.training.result import StepResult
from mpcompile.training.skipped_buffers import SkippedBuffers


class Runner:
    """One batch after another, in a fixed number of calls each, however many parameters there are.

    Fields:
      last: what the last update ran: its graph, the gradients' layout, and what gives examples of them.
      share_out: called when it is known which gradients the ranks send, before an update is made of them.
      no, yes, nan: bool [], bool [] and FP32 [] on the step's device, for results that say nothing else.
    """

    def __init__(self, updates: UpdateCache, team: Team, share_out: Callable[[], None]) -> None:
        self._updates, self._team, self._share_out = updates, team, share_out
        self._context, self._accumulator, self._monitor = updates.context, updates.accumulator, updates.monitor
        context = self._context
        self.buffers = SkippedBuffers(team.ranks)
        self.floor = LossScaleFloorMonitor(context.rule, context.state)
        self.last: tuple[Specialization, Layout, Like] | None = None
        self._recent: Specialization | None = None
        device = context.seed.device
        self.no, self.yes = (torch.tensor(value, device=device) for value in (False, True))
        self.nan = torch.full((), float("nan"), device=device)

    def run(self, specialization: Specialization, batch: Batch) -> StepResult:
        """One (micro)batch; the masters are updated where it ends a window."""
        self._context.shadows.bring_up_to_date()
        self._context.copies.bring_up_to_date()
        specialization.look_at_buffers()
        self.buffers.remember(specialization, specialization.written(), first=self._accumulator.count == 0)
        if self._context.accumulate == 1:
            self.last = specialization, specialization.layout, specialization.gradients
            result = self._whole(specialization, batch)
        else:
            result = self._in_window(specialization, batch)
        if specialization.writes:
            batch.write_back()
        return result

    def clear(self) -> None:
        """The graphs that ran are void: of the model as it was."""
        self.buffers.clear()
        self.last = self._recent = None

    def end_window(self) -> StepResult:
        """The update of the open window as it is; where none is open, nothing is done."""
        return self._close(self.nan) if self._accumulator.count else self._not_yet(self.nan)

    # ------------------------------------------------------------------------------------------------- batch by batch

    def _whole(self, specialization: Specialization, batch: Batch) -> StepResult:
        """Forward, backward and update of a batch, as a replayed CUDA graph where there is one."""
        self._before_update()
        self._share_out()
        if specialization.strides is None:
            # Only the gradients themselves show how the compiler lays them out.
            loss, grads = specialization(batch.tensors, self._context.seed)
            updater = self._updates.find(specialization.layout, specialization.strides, specialization.gradients)
            return self._updated(updater, lambda: (loss, *self._apply(updater, grads)))
        updater = self._updates.find(specialization.layout, specialization.strides, specialization.gradients)

        def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            loss, grads = specialization(tensors, self._context.seed)
            return loss, *self._apply(updater, grads)

        key = id(specialization), id(updater), batch.shapes()
        call = self._replayed(
            specialization, key, run, batch.tensors, lambda: [*specialization.tensors(), *self._written(updater)]
        )
        return self._updated(updater, lambda: call(batch.tensors))

    def _in_window(self, specialization: Specialization, batch: Batch) -> StepResult:
        if self._team.in_graph is not None:
            self._share_out()
        if specialization.layout not in self._accumulator:
            order = list(map(id, self._context.updated.params()))
            self._accumulator.prepare(specialization.layout, self._context.summed(), order)

        def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            loss, grads = specialization(tensors, self._context.seed)
            self._accumulator.add(specialization.layout, grads)
            return (loss,)

        sums = list(self._accumulator.sums.values())
        key = id(specialization), self._accumulator.count == 0, batch.shapes()
        call = self._replayed(specialization, key, run, batch.tensors, lambda: [*specialization.tensors(), *sums])
        (loss,) = call(batch.tensors)
        self._accumulator.note(specialization.layout)
        self._recent = specialization
        return self._close(loss) if self._accumulator.full else self._not_yet(loss)

    def _close(self, loss: Tensor) -> StepResult:
        """The update at the end of a window."""
        self._accumulator.close()
        self._before_update()
        layout = self._accumulator.layout()
        held = self._accumulator.held(layout)
        if self._recent is not None:
            self.last = self._recent, layout, lambda: self._accumulator.held(layout)
        self._team.prepare(layout, held)
        self._share_out()
        updater = self._updates.find(*self._context.of_rank(layout, None, lambda: held))

        def end(_: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(self._apply(updater, self._team.average(layout, held)))

        update = self._updates.replayed((id(updater),), end, [], lambda: [*self._written(updater), *held])
        return self._updated(updater, lambda: (loss, *update([])))

    # ------------------------------------------------------------------------------------------------- around a run

    def _not_yet(self, loss: Tensor) -> StepResult:
        """What a call gives that updates nothing."""
        return StepResult(loss, self.no, self.yes, self._context.state.scale.clone(), self.nan)

    def _replayed(
        self, specialization: Specialization, key: tuple[Any, ...], run: Run, tensors: Sequence[Tensor], fixed: Like
    ) -> Run:
        """`run`, or its replay. A recording reads a copy of the batch: what the model writes to it would be lost."""
        return self._updates.replayed(key, run, tensors, fixed) if specialization.replayable else run

    def _written(self, updater: Update) -> list[Tensor]:
        """What an update writes at fixed addresses; a master that only its shadow stands for is in no specialization."""
        gathered = self._context.shares.written() if self._context.shares is not None else ()
        copies = self._context.copies.tensors()
        return [*updater.binding.params, *self._context.shadows.shadows, *copies, *gathered]

    def _apply(self, updater: Update, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """(finite, norm, scale) of an update; what is made of its shadows is made after it."""
        results = updater(grads)
        self._context.copies.write()
        return results

    def _before_update(self) -> None:
        """Run the optimizers' own hooks, before the groups' numbers are read: a hook may set them."""
        of_all, _ = hooks_of_all_optimizers()
        with self._monitor.own(), GradientsUnread():
            for one in self._context.optimizers:
                for hook in [*of_all.values(), *step_hooks(one)[0].values()]:
                    hook(one, (), {})

    def _updated(self, updater: Update, run: Callable[[], Sequence[Tensor]]) -> StepResult:
        """Run what ends with an update, and the optimizer's own hooks after it."""
        loss, finite, norm, scale = run()
        self.buffers.keep_if(finite)
        # Compiled code raises no version; other shadows of these masters, and autograd, go by it.
        torch.autograd.graph.increment_version(updater.binding.params)
        if self._context.shares is not None:
            self._context.shares.note_update()
        self._context.shadows.note_update()
        self._context.copies.note()
        self._context.optimizers.note_step()
        for counters in self._monitor.counters:
            counters.note()
        _, of_all = hooks_of_all_optimizers()
        with self._monitor.own():
            for one in self._context.optimizers:
                for hook in [*step_hooks(one)[1].values(), *filter(is_not_ours, of_all.values())]:
                    hook(one, (), {})
        self.floor.look()
        return StepResult(loss, finite, finite, scale, norm)


__all__ = ["Runner"]
