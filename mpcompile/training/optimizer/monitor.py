"""Notice what happens to an optimizer between steps: its groups, its state, and steps that were not ours."""

from __future__ import annotations

import contextlib
import enum
import operator
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mpcompile.training.identity import Tables
from mpcompile.training.optimizer.binding import is_number
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.step_counters import Counters, counters_of

# Written by schedulers and by torch's own bookkeeping: no update reads them.
_UNREAD = ("params", "initial_lr", "param_names")
_PARAMS = operator.itemgetter("params")


class Seen(enum.Flag):
    """What changed since the last look.

    Fields:
      PARAMS: the optimizers hold other parameters; GROUPS: in other groups, or a flag of a group changed.
      STATE: the state, or a tensor in it, is another object; COUNTERS: counters that were one have parted.
      NUMBERS: a number of a group may have moved.
    """

    NOTHING = 0
    PARAMS = enum.auto()
    GROUPS = enum.auto()
    STATE = enum.auto()
    COUNTERS = enum.auto()
    NUMBERS = enum.auto()


class OptimizerMonitor:
    """Compares the optimizers of a step with what they were, by a fixed number of calls of C code.

    A step of an optimizer's own (the drop-in way, between two of ours) moves its counters; that they still move
    together is then read from the device once.

    Fields:
      epoch: how often something changed that updates are made for; moves: how often a number of a group may have moved.
    """

    def __init__(self, optimizers: Optimizers) -> None:
        self.optimizers = optimizers
        self.epoch = self.moves = 0
        self.counters: list[Counters] = [counters_of(one) for one in optimizers]
        self._take_groups()
        self.accept()

    @property
    def ours(self) -> bool:
        """True while a step that the hooks see is one of a training step."""
        return any(one.ours for one in self.counters)

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """The step that is noted inside is ours."""
        for one in self.counters:
            one.ours = True
        try:
            yield
        finally:
            for one in self.counters:
                one.ours = False

    def look(self) -> Seen:
        """What changed since the last look at the groups."""
        groups, seen = self.optimizers.groups, Seen.NOTHING
        params, values = self._params(groups), self._values(groups)
        if not _same(params, self._held) or list(map(len, map(_PARAMS, groups))) != self._sizes:
            moved = set(map(id, params)) == set(map(id, self._held))
            seen |= Seen.GROUPS if moved else Seen.GROUPS | Seen.PARAMS
        if self._live or not _same(values, self._known):
            flags = _flags(groups)
            seen |= Seen.NUMBERS if flags == self._flags else Seen.NUMBERS | Seen.GROUPS
        if seen:
            self._take_groups()
        return self._noted(seen)

    def look_at_state(self) -> Seen:
        """What changed in the optimizers' state since `accept`."""
        for one in self.counters:
            if one.stepped or one.edited():
                one.look_again()
        same = all(one.same() for one in self._states)
        return self._noted(Seen.NOTHING if same else Seen.STATE) | self.accept(keep=same)

    def accept(self, *, keep: bool = False) -> Seen:
        """Things are as they should be from here on; COUNTERS when counters that were one have parted before.

        Args:
          keep: the state was looked at just now, and is the same.
        """
        if not keep:
            self._states = [_State(one) for one in self.optimizers]
        generations = [one.generation for one in self.counters]
        parted = generations != getattr(self, "_generations", generations)
        self._generations = generations
        return self._noted(Seen.COUNTERS if parted else Seen.NOTHING)

    def _noted(self, seen: Seen) -> Seen:
        self.moves += Seen.NUMBERS in seen
        self.epoch += bool(seen & ~Seen.NUMBERS)
        return seen

    def _take_groups(self) -> None:
        groups = self.optimizers.groups
        self._held, self._sizes = self._params(groups), list(map(len, map(_PARAMS, groups)))
        self._known, self._flags = self._values(groups), _flags(groups)
        # What can change where it lies: to be read at every step.
        self._live = any(isinstance(v, (Tensor, list)) for group in groups for k, v in group.items() if k != "params")

    def _params(self, groups: Sequence[dict[str, Any]]) -> list[Tensor]:
        return list(chain.from_iterable(map(_PARAMS, groups)))

    def _values(self, groups: Sequence[dict[str, Any]]) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, groups)))


class _State:
    """One optimizer's state, by identity: the table, whose it is, and all that it holds."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._state: Any = optimizer.state
        self._whose, self._tables = list(self._state), list(self._state.values())
        self._held = Tables(self._tables)

    def same(self) -> bool:
        state: Any = self._optimizer.state
        mine = state is self._state and _same(list(state), self._whose)
        return mine and _same(list(state.values()), self._tables) and self._held.same()


def _same(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _flags(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the groups is no number: a branch that a trace has taken."""
    return [{k: v for k, v in group.items() if k not in _UNREAD and not is_number(k, v)} for group in groups]
