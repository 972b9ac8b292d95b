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


class UseShadows(torch.autograd.Function):
    """Reads shadows in place of their masters; the gradients go to the masters, in FP32."""

    @staticmethod
    def forward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(shadow.view_as(shadow) for shadow in given[len(given) // 2 :])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        nothing = (None,) * len(grads)
        if len(grads) == 1:
            return (None if grads[0] is None else grads[0].to(torch.float32), *nothing)
        low = [grad for grad in grads if grad is not None]
        single = [torch.empty_like(grad, dtype=torch.float32) for grad in low]
        torch._foreach_copy_(single, low)
        made = iter(single)
        return (*(None if grad is None else next(made) for grad in grads), *nothing)


def use_shadow(master: torch.Tensor, shadow: torch.Tensor) -> torch.Tensor:
    """The shadow, as a function of its master."""
    return use_shadows([master], [shadow])[0]


def use_shadows(masters: Sequence[torch.Tensor], shadows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The shadows, as one function of their masters."""
    return UseShadows.apply(*masters, *shadows)  # type: ignore[no-any-return,no-untyped-call]


@dataclass(slots=True)
class _Entry:
    """One shadow and what its master looked like when it was cast.

    Fields:
      view: some of the master's elements, where they are sampled; `sample` is what they were.
    """

    shadow: torch.Tensor
    version: int
    address: int
    steps: int
    had_grad: bool
    view: torch.Tensor | None = None
    sample: torch.Tensor | None = None


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
        return self.entries([master], [dtype])[0].shadow

    def entries(self, masters: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[_Entry]:
        """The up-to-date shadows of several masters; those that changed are cast together."""
        keys = [(id(master), dtype) for master, dtype in zip(masters, dtypes, strict=True)]
        stale: dict[tuple[int, torch.dtype], tuple[torch.Tensor, _Entry]] = {}
        for master, key in zip(masters, keys, strict=True):
            entry = self._entries.get(key)
            if entry is None or self._stale(master, entry):
                stale[key] = master, entry or self._create(master, key)
        if stale:
            self._write(list(stale.values()))
        return [self._entries[key] for key in keys]

    def refresh(self, masters: Iterable[torch.Tensor]) -> None:
        """Cast the shadows of `masters` again, whatever they look like (after `p.data` edits on a GPU)."""
        wanted = {id(m): m for m in masters}
        found = [(wanted[key], entry) for (key, _), entry in self._entries.items() if key in wanted]
        if found:
            self._write(found)

    def note_step(self, masters: Sequence[torch.Tensor]) -> None:
        """An optimizer stepped: these masters changed."""
        for master in masters:
            if id(master) in self._steps:
                self._steps[id(master)] += 1
                self.epoch += 1

    def _create(self, master: torch.Tensor, key: tuple[int, torch.dtype]) -> _Entry:
        # An inference tensor could never be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            shadow = torch.empty_like(master, dtype=key[1], requires_grad=False)
        self._steps.setdefault(key[0], 0)
        self._entries[key] = entry = _Entry(shadow, -1, 0, 0, False)
        weakref.finalize(master, self._forget, key)
        return entry

    def _forget(self, key: tuple[int, torch.dtype]) -> None:
        self._entries.pop(key, None)
        self._steps.pop(key[0], None)
        self.epoch += 1

    def _write(self, pairs: Sequence[tuple[torch.Tensor, _Entry]]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            # Through detached aliases: a graph that saved a shadow for a backward still to come must be told.
            torch._foreach_copy_([entry.shadow for _, entry in pairs], [master.detach() for master, _ in pairs])
        for master, entry in pairs:
            address = master.data_ptr()
            if entry.address != address:
                entry.view = spread(master, _SAMPLE) if master.device.type == "cpu" and master.numel() else None
            entry.version, entry.address = _version(master), address
            entry.steps, entry.had_grad = self._steps[id(master)], master.grad is not None
        self._take_samples([entry for _, entry in pairs if entry.view is not None])
        self.casts += len(pairs)

    @staticmethod
    def _take_samples(entries: Sequence[_Entry]) -> None:
        views = [entry.view for entry in entries if entry.view is not None]
        copies = torch.split(torch.cat(views), [len(view) for view in views]) if views else ()
        for entry, copy in zip(entries, copies, strict=True):
            entry.sample = copy

    def _stale(self, master: torch.Tensor, entry: _Entry) -> bool:
        if entry.version != _version(master) or entry.address != master.data_ptr():
            return True
        if entry.steps != self._steps[id(master)]:
            return True
        has_grad = master.grad is not None
        if entry.had_grad and not has_grad:
            return True
        entry.had_grad = has_grad
        return entry.sample is not None and entry.view is not None and not torch.equal(entry.sample, entry.view)


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
        # On a CPU: the masters' sampled elements, as views and as they were.
        self._views: list[torch.Tensor] = []
        self._sample: torch.Tensor | None = None

    def get(self, masters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The up-to-date shadows of `masters`."""
        now = self._look(masters)
        if now is None or now != self._seen or self._edited():
            entries = self.table.entries(masters, self.dtypes)
            self._shadows = [entry.shadow for entry in entries]
            self._seen = self._look(masters) or []
            self._views = [entry.view for entry in entries if entry.view is not None]
            self._sample = torch.cat(self._views) if self._views else None
        return self._shadows

    def _edited(self) -> bool:
        """Whether a sampled element changed: only elements show an edit through `p.data`."""
        return self._sample is not None and not torch.equal(self._sample, torch.cat(self._views))

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


def spread(master: torch.Tensor, most: int) -> torch.Tensor:
    """Up to `most` elements over the whole of a master, first and last among them, without a copy."""
    flat, count = master.detach(), master.numel()
    if torch.ops.aten.is_non_overlapping_and_dense.default(flat):
        return flat.as_strided((min(count, most),), (max(1, (count - 1) // (most - 1)),))
    return flat[(0,) * (flat.dim() - 1)][:most]


SHADOWS = ShadowTable()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    SHADOWS.note_step([p for group in optimizer.param_groups for p in group["params"]])


register_optimizer_step_post_hook(_after_step)
