"""An optimizer's moments held in fewer bytes between steps: `states="bf16"` or `"8bit"`.

While they are low, `optimizer.state` holds BF16 tensors, or the codes whose scales are kept here
(`mpcompile.runtime.state_codes`); the update reads them, computes in FP32 and rounds what it stores.  For everyone else
they are FP32: `optimizer.state_dict()` gives FP32, what is loaded is taken in again, and a step of the optimizer's own,
or of another training step, finds FP32 moments.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import TrainingError
from mpcompile.runtime import state_codes as codes
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.monitor import OptimizerMonitor

# State key -> whether it has a sign. Others (running maxima, sums that only grow) mean their last places.
SIGNED = {"exp_avg": True, "momentum_buffer": True, "exp_avg_sq": False, "square_avg": False}


def encode(state: Tensor, signed: bool, kind: str, at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """An FP32 state as (BF16 or codes in its shape, scales of the codes); `at` as in `state_codes`."""
    flat = codes.flat(state)
    if kind == "bf16":
        return codes.shaped(codes.to_bf16(flat, at), state), None
    low, scales = codes.to_codes(flat, signed, at)
    return codes.shaped(low, state), scales


def decode(low: Tensor, scales: Tensor | None) -> Tensor:
    """The FP32 state."""
    if scales is None:
        return low.to(torch.float32)
    return codes.shaped(codes.from_codes(codes.flat(low), scales), low)


@dataclass
class _Held:
    """One low state: whose it is, in which optimizer, and what stands there while it is FP32 for a while."""

    optimizer: torch.optim.Optimizer
    param: Tensor
    key: str
    low: Tensor
    scales: Tensor | None
    full: Tensor | None = None

    def is_there(self) -> bool:
        state: Any = self.optimizer.state
        return state.get(self.param, {}).get(self.key) is (self.low if self.full is None else self.full)

    def put(self, tensor: Tensor) -> None:
        self.optimizer.state[self.param][self.key] = tensor


class LowStates:
    """The states of a step's optimizers that are low, and when they are FP32 again.

    Args:
      kind: "bf16" or "8bit".
    """

    def __init__(self, kind: str, optimizers: Optimizers, monitor: OptimizerMonitor) -> None:
        self.kind, self._optimizers, self._monitor = kind, optimizers, monitor
        self._held: dict[tuple[int, str], _Held] = {}
        self._open = contextlib.ExitStack()
        for optimizer in optimizers:
            optimizer.register_state_dict_pre_hook(lambda *_: self._enter())
            optimizer.register_state_dict_post_hook(lambda _, saved: self._leave(saved))
            optimizer.register_step_pre_hook(self._before_step)

    def take(self, optimizer: torch.optim.Optimizer, param: Tensor) -> None:
        """Make the moments of `param` low, where they are not.

        Raises:
          TrainingError: MP541, for a state that would not survive it; all are FP32 then.
        """
        state: Any = optimizer.state.get(param, {})
        wanted = [
            (key, value) for key, value in state.items()
            if isinstance(value, Tensor) and (key in SIGNED or value.dim())
        ]  # fmt: skip
        self._refuse(optimizer, [key for key, _ in wanted])
        for key, value in wanted:
            known = self._held.get((id(param), key))
            if value.dtype != torch.float32 or (known is not None and known.low is value):
                continue
            low, scales = encode(value, SIGNED[key], self.kind)
            state[key] = made = torch.empty_like(value, dtype=low.dtype).copy_(low)
            self._held[id(param), key] = _Held(optimizer, param, key, made, scales)

    def _refuse(self, optimizer: torch.optim.Optimizer, keys: list[str]) -> None:
        other = [key for key in keys if key not in SIGNED]
        if other:
            self.expand()
            raise TrainingError(
                "MP541",
                f"train_step(states={self.kind!r}) is not possible with {type(optimizer).__name__}",
                why=f"its state {other[0]!r} is no moving average, and would lose what its last places hold",
                try_='states="fp32"; Adam, AdamW, NAdam, RAdam, SGD, RMSprop and Muon (without amsgrad) can be low',
            )

    def place(self, param: Tensor, key: str) -> tuple[Tensor | None] | None:
        """(scales of its codes,) for a state that is low, else None."""
        held = self._held.get((id(param), key))
        return (held.scales,) if held is not None and held.is_there() else None

    def expand(self) -> None:
        """The states are FP32 from here on, until an update takes them in again."""
        for held in self._held.values():
            if held.is_there() and held.full is None:
                held.put(decode(held.low, held.scales))
        self._held.clear()

    @contextlib.contextmanager
    def expanded(self, *, changed: bool = True) -> Iterator[None]:
        """The states are FP32 inside; what was changed there is made low again after.

        Args:
          changed: nothing was, if False.
        """
        if any(held.full is not None for held in self._held.values()):
            yield  # inside another `expanded`
            return
        for held in self._held.values():
            if held.is_there():
                full = decode(held.low, held.scales)
                held.put(full)
                held.full = full
        try:
            yield
        finally:
            self._settle(changed)

    def _settle(self, changed: bool) -> None:
        for place, held in list(self._held.items()):
            if held.full is None or not held.is_there():
                # Someone put another tensor there: it is the state now, and is FP32.
                del self._held[place]
                continue
            if changed:
                pairs = zip((held.low, held.scales), encode(held.full, SIGNED[held.key], self.kind), strict=True)
                for mine, new in pairs:
                    if mine is not None and new is not None:
                        mine.copy_(new)
            held.full = None
            held.put(held.low)

    def _before_step(self, *_: Any) -> None:
        if not self._monitor.ours:
            self.expand()

    def _enter(self) -> None:
        self._open.enter_context(self.expanded(changed=False))

    def _leave(self, saved: dict[str, Any]) -> None:
        """What is saved holds the FP32 tensors, in tables of its own: torch puts the optimizer's own there."""
        saved["state"] = {key: dict(state) for key, state in saved["state"].items()}
        self._open.close()


_LOW: weakref.WeakKeyDictionary[torch.optim.Optimizer, LowStates] = weakref.WeakKeyDictionary()


def claim(optimizers: Optimizers, mine: LowStates | None) -> None:
    """From here on the states of `optimizers` are low by `mine`, or FP32: what another step made low is expanded."""
    for optimizer in optimizers:
        other = _LOW.get(optimizer)
        if other is not None and other is not mine:
            other.expand()
            del _LOW[optimizer]
        if mine is not None:
            _LOW[optimizer] = mine
