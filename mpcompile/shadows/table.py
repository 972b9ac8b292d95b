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
from collections.abc import Iterable, Iterator, Sequence
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
    """The shadow, as a function of its master: for graphs, where a compiler fuses the gradient's cast."""
    return UseShadow.apply(master, shadow)  # type: ignore[no-any-return,no-untyped-call]


class UseShadows(torch.autograd.Function):
    """Reads several shadows in place of their masters; the gradients are cast by one call."""

    @staticmethod
    def forward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(shadow.view_as(shadow) for shadow in given[len(given) // 2 :])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        low = [grad for grad in grads if grad is not None]
        if not low:  # no weight of the group reached the loss (a detached branch)
            return (None,) * (2 * len(grads))
        single = [torch.empty_like(grad, dtype=torch.float32) for grad in low]
        torch._foreach_copy_(single, low)
        made = iter(single)
        return (*(None if grad is None else next(made) for grad in grads), *(None,) * len(grads))


def use_shadows(masters: Sequence[torch.Tensor], shadows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The shadows, as one function of their masters: for calls op by op."""
    return UseShadows.apply(*masters, *shadows)  # type: ignore[no-any-return,no-untyped-call]


@dataclass(slots=True)
class _Entry:
    """One shadow and what its master looked like when it was cast.

    Fields:
      lie: how the master lies (shape, strides, device), and so the shadow.
      state: (version, address, steps) then; had_grad: whether it was last seen with a gradient.
      view: some of the master's elements, where they are sampled; `sample` is what they were.
    """

    shadow: torch.Tensor
    lie: tuple[Any, ...]
    state: tuple[int, int, int] = (-1, 0, 0)
    had_grad: bool = False
    view: torch.Tensor | None = None
    sample: torch.Tensor | None = None


@dataclass(frozen=True)
class _Look:
    """All of some masters that can change and is read on the host, by a fixed number of calls."""

    epoch: int
    ids: list[int]
    versions: list[int]
    addresses: list[int]
    grads: list[bool]


class ShadowTable:
    """The shadows of one process: one per (master, low type), however many graphs read it (tied weights share)."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, torch.dtype], _Entry] = {}
        self._steps: dict[int, int] = {}
        self.casts = 0
        # Rises with every optimizer step on a master: what was compared is void then.
        self.epoch = 0
        # Rises with every master that goes (another one may come under its id), and with every shadow that is replaced.
        self.gone = 0

    def get(self, master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The up-to-date shadow of `master` (same shape, `dtype`), cast now only if the master changed."""
        entries = self.entries([master], [dtype])
        self.bring_up_to_date([master], entries, self.look([master]))
        return entries[0].shadow

    def entries(self, masters: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[_Entry]:
        """The entries of several masters, made where they are new; their shadows may be stale."""
        return [self._entry(*pair) for pair in zip(masters, dtypes, strict=True)]

    def look(self, masters: Sequence[torch.Tensor]) -> _Look:
        """What `masters` look like now."""
        try:
            versions = list(map(_VERSION, masters))
        except RuntimeError:
            # An inference tensor has no version; it cannot be trained either, so its address and sample must do.
            versions = [0 if master.is_inference() else master._version for master in masters]
        grads = [grad is not None for grad in map(_GRAD, masters)]
        return _Look(self.epoch, list(map(id, masters)), versions, list(map(torch.Tensor.data_ptr, masters)), grads)

    def bring_up_to_date(self, masters: Sequence[torch.Tensor], entries: Sequence[_Entry], look: _Look) -> None:
        """Cast the shadows whose masters changed, together."""
        stale = [
            (master, entry, state)
            for master, entry, state, has_grad in zip(masters, entries, self._states(look), look.grads, strict=True)
            if entry.state != state or (entry.had_grad and not has_grad) or _edited(entry)
        ]
        for entry, has_grad in zip(entries, look.grads, strict=True):
            entry.had_grad = has_grad
        if stale:
            self._write(stale)

    def refresh(self, masters: Iterable[torch.Tensor]) -> None:
        """Cast the shadows of `masters` again, whatever they look like (after `p.data` edits on a GPU)."""
        wanted = {id(m): m for m in masters}
        found = [(wanted[key], entry) for (key, _), entry in self._entries.items() if key in wanted]
        if found:
            states = self._states(self.look([master for master, _ in found]))
            self._write([(*pair, state) for pair, state in zip(found, states, strict=True)])

    def note_step(self, masters: Sequence[torch.Tensor]) -> None:
        """An optimizer stepped: these masters changed."""
        for master in masters:
            if id(master) in self._steps:
                self._steps[id(master)] += 1
                self.epoch += 1

    def _states(self, look: _Look) -> Iterator[tuple[int, int, int]]:
        """(version, address, steps) of each master."""
        return zip(look.versions, look.addresses, map(self._steps.__getitem__, look.ids), strict=True)

    def _entry(self, master: torch.Tensor, dtype: torch.dtype) -> _Entry:
        """The entry of a master, with a shadow that lies as it does: `module.to` moves and lays out masters in place."""
        key, lie = (id(master), dtype), (master.shape, master.stride(), master.device)
        found = self._entries.get(key)
        if found is not None and found.lie == lie:
            return found
        # An inference tensor could never be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            shadow = torch.empty_like(master, dtype=dtype, requires_grad=False)
        self._entries[key] = entry = _Entry(shadow, lie)
        if found is None:
            self._steps.setdefault(key[0], 0)
            weakref.finalize(master, self._forget, key)
        else:
            self.gone += 1
        return entry

    def _forget(self, key: tuple[int, torch.dtype]) -> None:
        self._entries.pop(key, None)
        self._steps.pop(key[0], None)
        self.gone += 1

    def _write(self, stale: Sequence[tuple[torch.Tensor, _Entry, tuple[int, int, int]]]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            # In place: a graph that saved a shadow for a backward still to come is told by its version.
            torch._foreach_copy_([entry.shadow for _, entry, _ in stale], [master for master, *_ in stale])
        _sample(stale)
        for _, entry, state in stale:
            entry.state = state
        self.casts += len(stale)


def _edited(entry: _Entry) -> bool:
    """Whether a sampled element changed: only elements show an edit through `p.data`."""
    return entry.sample is not None and entry.view is not None and not torch.equal(entry.sample, entry.view)


def _sample(written: Sequence[tuple[torch.Tensor, _Entry, tuple[int, int, int]]]) -> None:
    """Keep some elements of each master on a CPU, read by views that are made once per address."""
    for master, entry, state in written:
        if entry.state[1] != state[1]:
            entry.view = spread(master, _SAMPLE) if master.device.type == "cpu" and master.numel() else None
    entries = [(entry, entry.view) for _, entry, _ in written if entry.view is not None]
    views = [view for _, view in entries]
    copies = torch.split(torch.cat(views), list(map(len, views))) if views else ()
    for (entry, _), copy in zip(entries, copies, strict=True):
        entry.sample = copy


class ShadowGroup:
    """The shadows that one compiled graph reads, found with a few calls where no master changed.

    Args:
      table: where the shadows live.
      dtypes: the low type of each, in the order of the masters.
    """

    def __init__(self, table: ShadowTable, dtypes: Sequence[torch.dtype]) -> None:
        self.table, self.dtypes = table, list(dtypes)
        self._seen: _Look | None = None
        self._gone = -1
        self._entries: list[_Entry] = []
        self._shadows: list[torch.Tensor] = []
        # On a CPU: the masters' sampled elements, as views and as they were.
        self._views: list[torch.Tensor] = []
        self._sample: torch.Tensor | None = None

    def get(self, masters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The up-to-date shadows of `masters`."""
        now = self.table.look(masters)
        if now != self._seen or self._gone != self.table.gone or self._edited():
            self._find(masters, now)
            self.table.bring_up_to_date(masters, self._entries, now)
            self._seen = now
            self._views = [entry.view for entry in self._entries if entry.view is not None]
            self._sample = torch.cat(self._views) if self._views else None
        return self._shadows

    def _find(self, masters: Sequence[torch.Tensor], now: _Look) -> None:
        """The entries of `masters`: those of the last call, where the masters are the same and where they were."""
        seen = self._seen
        if (
            seen is not None
            and (seen.ids, seen.addresses) == (now.ids, now.addresses)
            and self._gone == self.table.gone
        ):
            return
        self._entries = self.table.entries(masters, self.dtypes)
        self._shadows = [entry.shadow for entry in self._entries]
        self._gone = self.table.gone

    def _edited(self) -> bool:
        return self._sample is not None and not torch.equal(self._sample, torch.cat(self._views))


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
