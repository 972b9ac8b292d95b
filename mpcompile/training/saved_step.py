"""A step as state: what a checkpoint holds of it, its copies and its pickles."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from mpcompile.errors import TrainingError
from mpcompile.training.accumulation import GradAccumulator
from mpcompile.training.gradients.specialization import SpecializationCache
from mpcompile.training.loss_scale.floor_monitor import LossScaleFloorMonitor
from mpcompile.training.loss_scale.scale import LossScale, ScaleState, from_dict, to_dict
from mpcompile.training.optimizer.build import UpdateContext
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.runner import Runner


class SavedStep:
    """State, copies and pickles of a `TrainStep`."""

    specializations: SpecializationCache
    optimizers: Optimizers
    context: UpdateContext
    rule: LossScale
    state: ScaleState
    accumulator: GradAccumulator
    runner: Runner
    _made_of: tuple[Any, Any, Any, dict[str, Any]]

    def full_masters(self) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError

    def join_masters(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Loss scale (every field, and GradScaler's five keys) and the open window. Reads the device."""
        return {**to_dict(self.rule, self.state), "window": self.accumulator.state()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, or what a `torch.amp.GradScaler` did.

        Raises:
          TrainingError: MP501, when GradScaler's five keys are not all there.
        """
        rule, state = from_dict(saved, self.rule)
        window, order = saved.get("window", {"count": 0, "sums": {}}), list(map(id, self.optimizers.params()))
        self.accumulator.load(window, self.specializations.named, order)
        for mine, value in zip(self.state, state, strict=True):
            mine.fill_(value)
        self.context.seed.copy_(self.state.scale * (1.0 / self.context.added))
        self.rule = self.context.rule = rule
        self.runner.floor = LossScaleFloorMonitor(rule, self.state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A step of the same state on copies of model and optimizer; what is compiled is made again."""
        # A process group is what it is: the copy trains with the same ranks.
        memo.update((id(given[name]), given[name]) for given in self._made_of[3:] for name in ("process_group", "mesh"))
        if self.context.shares is not None:
            self.join_masters()
        with self.full_masters():
            owner, optimizer, loss_fn, given = copy.deepcopy(self._made_of, memo)
        return _remade(type(self), owner, optimizer, loss_fn, given, copy.deepcopy(self.state_dict(), memo))

    def __reduce__(self) -> Any:
        """Pickles hold model, optimizer, loss and state; what is compiled is made again. Split masters are joined."""
        self.join_masters()
        if any(self._made_of[3][name] is not None for name in ("process_group", "mesh")):
            raise TrainingError("MP512", "a step that was given a process group cannot be pickled",
                                why="the group is of this process",
                                try_="save_checkpoint, and train_step(..., process_group=...) anew")  # fmt: skip
        return _remade, (type(self), *self._made_of, self.state_dict())


def _remade(kind: Any, owner: Any, optimizer: Any, loss_fn: Any, given: dict[str, Any], state: dict[str, Any]) -> Any:
    made = kind(owner, optimizer, loss_fn, **given)
    made.load_state_dict(state)
    return made
