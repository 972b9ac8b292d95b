"""Shadows: the low-precision copies of FP32 masters, cast once per change of the master and never per forward.

When is a shadow stale?  `Tensor._version` rises with ordinary in-place edits, ``load_state_dict`` and most
optimizers, but not with ``fused=True`` optimizers (measured on torch 2.13 CPU) and never with ``p.data`` edits.  So
a master is compared by five things, all read on the host without a sync:

* its version counter and its storage address;
* the count of `torch.optim` steps that have touched it (a global post-step hook, which fused optimizers call too);
* its gradient: a backward that ran and a gradient that was since cleared mean that someone stepped by hand;
* on a CPU, a sample of its elements, which sees ``p.data`` edits outside training (an average of weights swapped
  in for evaluation).  On other devices reading elements would be a sync: `refresh` says so instead.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_SAMPLE = 64
_VERSION, _GRAD = operator.attrgetter("_version"), operator.attrgetter("grad")


class UseShadow(torch.autograd.Function):
    """Reads the shadow in place of its master; the gradient goes to the master, in FP32."""

    @staticmethod
    def forward(ctx: Any, master: torch.Tensor, shadow: torch.Tensor) -> torch.Tensor:
        return shadow.view_as(shadow)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0].to(torch.float32), None


def use_shadow(master: torch.Tensor, shadow: torch.Tensor) -> torch.Tensor:
    """The shadow, as a function of its master."""
    return UseShadow.apply(master, shadow)  # type: ignore[no-any-return,no-untyped-call]


@dataclass(slots=True)
class _Entry:
    """One shadow and what its master looked like when it was cast."""

    shadow: torch.Tensor
    version: int
    address: int
    steps: int
    had_grad: bool
    sample: torch.Tensor | None


class ShadowTable:
    """The shadows of one process: one per (master, low type), however many graphs read it (tied weights share)."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, torch.dtype], _Entry] = {}
        self._steps: dict[int, int] = {}
        self.casts = 0
        # Rises with every optimizer step on a master, and with every master that goes: what was compared is void then.
        self.epoch = 0

    def get(self, master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The up-to-date shadow of `master` (same shape, `dtype`), cast now only if the master changed."""
        key = (id(master), dtype)
        entry = self._entries.get(key)
        if entry is None:
            return self._create(master, dtype, key)
        if self._stale(master, entry):
            self._write(master, entry)
        return entry.shadow

    def refresh(self, masters: Iterable[torch.Tensor]) -> None:
        """Cast the shadows of `masters` again, whatever they look like (after `p.data` edits on a GPU)."""
        wanted = {id(m): m for m in masters}
        for (key, _), entry in self._entries.items():
            if key in wanted:
                self._write(wanted[key], entry)

    def note_step(self, masters: Sequence[torch.Tensor]) -> None:
        """An optimizer stepped: these masters changed."""
        for master in masters:
            if id(master) in self._steps:
                self._steps[id(master)] += 1
                self.epoch += 1

    def _create(self, master: torch.Tensor, dtype: torch.dtype, key: tuple[int, torch.dtype]) -> torch.Tensor:
        # An inference tensor could never be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            shadow = torch.empty_like(master, dtype=dtype, requires_grad=False)
        self._steps.setdefault(key[0], 0)
        entry = _Entry(shadow, -1, 0, 0, False, None)
        self._entries[key] = entry
        weakref.finalize(master, self._forget, key)
        self._write(master, entry)
        return shadow

    def _forget(self, key: tuple[int, torch.dtype]) -> None:
        self._entries.pop(key, None)
        self._steps.pop(key[0], None)
        self.epoch += 1

    def _write(self, master: torch.Tensor, entry: _Entry) -> None:
        with torch.inference_mode(False), torch.no_grad():
            # Through a detached alias: a graph that saved the shadow for a backward still to come must be told.
            entry.shadow.copy_(master.detach())
            entry.sample = _sample(master)
        entry.version, entry.address = _version(master), master.data_ptr()
        entry.steps, entry.had_grad = self._steps[id(master)], master.grad is not None
        self.casts += 1

    def _stale(self, master: torch.Tensor, entry: _Entry) -> bool:
        if entry.version != _version(master) or entry.address != master.data_ptr():
            return True
        if entry.steps != self._steps[id(master)]:
            return True
        has_grad = master.grad is not None
        if entry.had_grad and not has_grad:
            return True
        entry.had_grad = has_grad
        return entry.sample is not None and not torch.equal(entry.sample, _view(master))


class ShadowGroup:
    """The shadows that one compiled graph reads, found with a few calls where no master changed.

    Args:
      table: where the shadows live.
      dtypes: the low type of each, in the order of the masters.
    """

    def __init__(self, table: ShadowTable, dtypes: Sequence[torch.dtype]) -> None:
        self.table, self.dtypes = table, list(dtypes)
        self._seen: list[Any] = []
        self._shadows: list[torch.Tensor] = []

    def get(self, masters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The up-to-date shadows of `masters`."""
        now = self._look(masters)
        # A CPU's sample is compared by the table: only elements show an edit through `p.data`.
        if now is None or now != self._seen or masters[0].device.type == "cpu":
            self._shadows = [self.table.get(m, dtype) for m, dtype in zip(masters, self.dtypes, strict=True)]
            self._seen = self._look(masters) or []
        return self._shadows

    def _look(self, masters: Sequence[torch.Tensor]) -> list[Any] | None:
        """All that can change, read by a fixed number of calls; None where a master has no version."""
        try:
            versions = list(map(_VERSION, masters))
        except RuntimeError:
            return None
        grads = [grad is None for grad in map(_GRAD, masters)]
        return [self.table.epoch, list(map(id, masters)), versions, list(map(torch.Tensor.data_ptr, masters)), grads]


def _version(master: torch.Tensor) -> int:
    # An inference tensor has no version; it cannot be trained either, so its address and sample must do.
    return 0 if master.is_inference() else master._version


def _view(master: torch.Tensor) -> torch.Tensor:
    """Up to `_SAMPLE` elements spread over the master, without a copy."""
    flat = master.detach()
    count = flat.numel()
    if not flat.is_contiguous():
        return flat.flatten()[:_SAMPLE]
    return flat.view(-1).as_strided((min(count, _SAMPLE),), (max(1, count // _SAMPLE),))


def _sample(master: torch.Tensor) -> torch.Tensor | None:
    return _view(master).clone() if master.device.type == "cpu" and master.numel() else None


SHADOWS = ShadowTable()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    SHADOWS.note_step([p for group in optimizer.param_groups for p in group["params"]])


register_optimizer_step_post_hook(_after_step)
