"""Windows of microbatches that end: full, or before that because an epoch did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mpcompile.training.accumulation import Layout, Window
from mpcompile.training.cuda_graph import Replays
from mpcompile.training.distributed.team import Team
from mpcompile.training.gradients.specialization import Artefact
from mpcompile.training.inspection import Like
from mpcompile.training.loss_scale.scale import ScaleState
from mpcompile.training.optimizer.build import Update
from mpcompile.training.result import StepResult
from mpcompile.training.step_log import StepLog


class Windows:
    """The part of a training step that ends its windows."""

    state: ScaleState
    team: Team
    _window: Window
    _replays: Replays
    _recent: Artefact | None = None
    _log: StepLog | None
    _last: tuple[Artefact, Layout, Like] | None
    _no: Tensor
    _yes: Tensor
    _nan: Tensor
    follow: Callable[[], bool]
    _before_update: Callable[[], None]
    _updater: Callable[[Layout, Any, Like], Update]
    _written: Callable[[Update], list[Tensor]]
    _updated: Callable[[Update, Callable[[], Sequence[Tensor]]], StepResult]

    @property
    def pending(self) -> int:
        """Microbatches that are summed in the open window, and in no update yet. Asks no device anything."""
        return self._window.count

    def end_window(self) -> StepResult:
        """Update now, on the open window as it is: the last of an epoch may be short.

        Its sum is divided by `accumulate`, as by a loop that divides each loss by it. Without an open window nothing is
        done.

        Returns:
          As a call gives it; `loss` is NaN, for there is no batch.
        """
        self.follow()
        if not self.pending:
            return self._not_yet(self._nan)
        result = self._close(self._nan)
        if self._log is not None:
            self._log.note(result, True, None)
        return result

    def _not_yet(self, loss: Tensor) -> StepResult:
        """What a call gives that updates nothing."""
        return StepResult(loss, self._no, self._yes, self.state.scale.clone(), self._nan)

    def _close(self, loss: Tensor) -> StepResult:
        """The update at the end of a window."""
        self._window.close()
        self._before_update()
        layout = self._window.layout()
        held = self._window.held(layout)
        if self._recent is not None:
            self._last = self._recent, layout, lambda: self._window.held(layout)
        updater = self._updater(layout, None, lambda: held)

        def end(_: Sequence[Tensor]) -> tuple[Tensor, ...]:
            self.team.average(layout, held)
            return tuple(updater(held))

        update = self._replays.find((id(updater),), end, [], lambda: [*self._written(updater), *held])
        return self._updated(updater, lambda: (loss, *update([])))


__all__ = ["Windows"]
