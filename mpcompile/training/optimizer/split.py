"""Split masters: an FP32 weight as its BF16 shadow and the 16 bits that the shadow lacks.

FP32 is the upper 16 bits of BF16 with 16 more below them.  The shadow is the weight rounded (halves away from zero),
and the low half is the difference of the bit patterns, so both together are the FP32 weight exactly: 4 bytes a
parameter where master and shadow take 6.  While split, the model's `Parameter` holds the shadow; state dicts, loading
and tracing see FP32 (`SplitMasters.joined`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.errors import TrainingError
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.monitor import OptimizerMonitor


def join(high: Tensor, low: Tensor) -> Tensor:
    """The FP32 tensor of a BF16 `high` and an int16 `low`, exactly."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def split(full: Tensor) -> tuple[Tensor, Tensor]:
    """(BF16, int16) of an FP32 tensor; `join` gives it back bit for bit (NaNs of the largest payload apart)."""
    bits = full.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


class SplitMasters:
    """The parameters of a model that are split, and when they are whole again.

    Fields:
      epoch: how often a parameter was made whole.
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers, monitor: OptimizerMonitor) -> None:
        self._monitor, self.epoch = monitor, 0
        self._held: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._open = contextlib.ExitStack()
        # A state dict holds FP32, and what is loaded is split again; torch casts an optimizer's loaded state to its
        # parameter's dtype.
        hooks: list[tuple[Any, str]] = [(model, "state_dict"), (model, "load_state_dict")]
        hooks += [(optimizer, "load_state_dict") for optimizer in optimizers]
        for owner, call in hooks:
            getattr(owner, f"register_{call}_pre_hook")(lambda *_: self._enter())
            getattr(owner, f"register_{call}_post_hook")(lambda *_: self._open.close())
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._refuse_step)

    def __len__(self) -> int:
        return len(self._held)

    def low_of(self, parameter: Tensor) -> Tensor | None:
        """The low halves of a split parameter."""
        held = self._held.get(id(parameter))
        return held[2] if held else None

    def take(self, parameter: Tensor, shadow: Tensor) -> None:
        """Split `parameter`; `shadow` is its high half from now on."""
        if id(parameter) in self._held:
            return
        high, low = split(parameter.detach())
        shadow.copy_(high)
        self._held[id(parameter)] = parameter, shadow, low
        parameter.data = shadow

    def keep_only(self, wanted: set[int]) -> None:
        """Make whole again the parameters that are not in `wanted` (a graph reads them in FP32)."""
        for key in [k for k in self._held if k not in wanted]:
            parameter, high, low = self._held.pop(key)
            parameter.data = join(high, low)
            self.epoch += 1

    def drop_replaced(self) -> None:
        """Someone gave a parameter other data: that is the weight now, and it is whole."""
        for key in [k for k, (p, high, _) in self._held.items() if p.data_ptr() != high.data_ptr()]:
            del self._held[key]
            self.epoch += 1

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """The parameters are FP32 inside; what was changed there is split again after."""
        if any(p.dtype == torch.float32 for p, _, _ in self._held.values()):
            yield  # inside another `joined`
            return
        for parameter, high, low in self._held.values():
            parameter.data = join(high, low)
        try:
            yield
        finally:
            for parameter, high, low in self._held.values():
                for mine, new in zip((high, low), split(parameter.detach()), strict=True):
                    mine.copy_(new)
                parameter.data = high

    def _refuse_step(self, *_: Any) -> None:
        if not self._monitor.ours and any(p.dtype == torch.bfloat16 for p, _, _ in self._held.values()):
            raise TrainingError(
                "MP524",
                "optimizer.step() with split masters",
                why="the parameters hold the BF16 half of the weights",
                try_="step(...), or `with step.full_masters():` around forward, backward and optimizer.step()",
            )

    def _enter(self, *_: Any) -> None:
        self._open.enter_context(self.joined())
