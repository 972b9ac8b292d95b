"""Say so when the loss scale stays at its floor, without waiting for the device."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from mpcompile.errors import TrainingError
from mpcompile.training.loss_scale.scale import LossScale, ScaleState


class LossScaleFloorMonitor:
    """Looks at the count of overflows at the floor after each update.

    On a CPU the count is read where it lies.  From a device it is copied to pinned memory without waiting, so what is
    seen may be a step or two old.
    """

    def __init__(self, rule: LossScale, state: ScaleState) -> None:
        self._rule, self._count = rule, state.floor_hits
        self._copy: Tensor = state.floor_hits
        if state.floor_hits.is_cuda and rule.at_floor != "keep":
            self._copy = torch.zeros((), dtype=torch.int64, pin_memory=True)
        self._host = self._copy.numpy() if self._copy.device.type == "cpu" else None
        self._known = int(self._host) if self._host is not None else 0

    def look(self) -> None:
        """Warn or raise as the rule says, when the count rose.

        Raises:
          TrainingError: MP502.
        """
        if self._rule.at_floor == "keep" or self._host is None:
            return
        if self._copy is not self._count:
            self._copy.copy_(self._count, non_blocking=True)
        hits = int(self._host)
        if hits <= self._known:
            return
        self._known = hits
        error = TrainingError(
            "MP502",
            f"a step overflowed with the loss scale at its floor, {self._rule.floor:g}",
            why="either the loss is not finite, or an operation overflows whatever the scale",
            try_="step.explain_overflow(*batch) names the operation",
        )
        if self._rule.at_floor == "raise":
            raise error
        warnings.warn(str(error), stacklevel=4)
