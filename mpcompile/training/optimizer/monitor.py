"""See what happens to an optimizer between two of our steps, without looking at every parameter."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from mpcompile.training.optimizer.step_counters import Counters


class OptimizerWatch:
    """Notices groups that changed, state that was replaced, and steps that were not ours.

    A step of the optimizer's own (the drop-in way, between two of ours) moves its counters; that they still move
    together is then read from the device once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, counters: Counters) -> None:
        self.optimizer, self.counters = optimizer, counters
        self._sizes = self._group_sizes()
        self._state: Any = (optimizer.state, len(optimizer.state))
        self._generation = counters.generation
        self.ours, self._stepped = False, False
        # Weak: an optimizer outlives the steps that were made for it.
        me = weakref.ref(self)
        optimizer.register_step_post_hook(lambda *_: _call(me, "_note_step"))
        optimizer.register_load_state_dict_post_hook(lambda *_: _call(me, "_note_load"))

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """The step that is noted inside is ours."""
        self.ours = True
        try:
            yield
        finally:
            self.ours = False

    def regrouped(self) -> bool:
        """True when the optimizer has other parameters now: what was compiled may lack their gradients."""
        sizes = self._group_sizes()
        changed, self._sizes = sizes != self._sizes, sizes
        return changed

    def disturbed(self) -> bool:
        """True when updates made before must not be used any more."""
        if self._stepped:
            self._stepped = False
            self.counters.look_again()
        state, size = self._state
        if state is not self.optimizer.state or size != len(self.optimizer.state):
            self.counters.clear()
        return self.settle()

    def settle(self) -> bool:
        """Things are as they should be from here on; True when counters that were one have parted before."""
        parted, self._generation = self.counters.generation != self._generation, self.counters.generation
        self._state = self.optimizer.state, len(self.optimizer.state)
        return parted

    def _note_step(self) -> None:
        self._stepped = self._stepped or not self.ours

    def _note_load(self) -> None:
        self.counters.clear()

    def _group_sizes(self) -> list[int]:
        return [len(group["params"]) for group in self.optimizer.param_groups]


def _call(watch: weakref.ref[OptimizerWatch], method: str) -> None:
    held = watch()
    if held is not None:
        getattr(held, method)()
