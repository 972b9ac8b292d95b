"""Shadows: the low-precision copies of FP32 masters, cast once per change of the master and never per forward.

When is a shadow stale?  `Tensor._version` rises with ordinary in-place edits, ``load_state_dict`` and most
optimizers, but not with ``fused=True`` optimizers (measured on torch 2.13 CPU) and never with ``p.data`` edits.  So
a master is first compared by what is read on the host by a fixed number of calls, without a sync:

* its version counter and its storage address;
* the count of `torch.optim` steps that have touched it (a global post-step hook, which fused optimizers call too);
* its gradient: a backward that ran and a gradient that was since cleared mean that someone stepped by hand;
* whether the last look was under the same grad mode: weights are swapped in between training and evaluation.

On a CPU every shadow that is not cast for these is then compared with its master (`mpcompile.shadows.comparison`), so
that any edit is seen, however made.  On other devices reading elements would be a sync, and casting again at every
forward costs what autocast costs: an edit through ``p.data`` between two forwards of one kind, without an optimizer's
step between them, is not seen there, and `mpcompile.module.MixedPrecisionModule.refresh` is the way to say so.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from mpcompile.errors import RuntimeFailure
from mpcompile.shadows.comparison import Comparison
from mpcompile.torch_internals.tensors import foreach_copy, version

# Where an optimizer that writes shadows leaves what it wrote, for the hook after its step.
WROTE = "_mpcompile_wrote"
_GRAD = operator.attrgetter("grad")


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


@dataclass(slots=True)
class _Entry:
    """One shadow and what its master looked like when it was cast.

    Fields:
      lie: how the master lies (shape, strides, device), and so the shadow.
      state: (version, address, steps) then; had_grad: whether it was last seen with a gradient.
    """

    shadow: torch.Tensor
    lie: tuple[Any, ...]
    state: tuple[int, int, int] = (-1, 0, 0)
    had_grad: bool = False


_STATE = operator.attrgetter("state")
# What an optimizer wrote: (master, its entry, the master's version and address then).
Written = Sequence[tuple[torch.Tensor, _Entry, int, int]]


@dataclass(frozen=True)
class MasterSnapshot:
    """All of some masters that can change and is read on the host, by a fixed number of calls."""

    epoch: int
    learning: bool
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
        # Rises whenever a shadow may have been written, by a cast here or by an update's own kernels.
        self.written = 0
        # Rises with every optimizer step on a master: what was compared is void then.
        self.epoch = 0
        # Rises with every master that goes (another one may come under its id), and with every shadow that is replaced.
        self.gone = 0

    def get(self, master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The up-to-date shadow of `master` (same shape, `dtype`), cast now only if the master changed."""
        watched = Watched(self, self.entries([master], [dtype]))
        watched.bring_up_to_date([master])
        return watched.entries[0].shadow

    def entries(self, masters: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[_Entry]:
        """The entries of several masters, made where they are new; their shadows may be stale."""
        return [self._entry(*pair) for pair in zip(masters, dtypes, strict=True)]

    def look(self, masters: Sequence[torch.Tensor]) -> MasterSnapshot:
        """What `masters` look like now."""
        try:
            versions = list(map(version, masters))
        except RuntimeError:
            # An inference tensor has no version; it cannot be trained either: its address must do, and its elements.
            versions = [0 if master.is_inference() else version(master) for master in masters]
        grads = [grad is not None for grad in map(_GRAD, masters)]
        addresses = list(map(torch.Tensor.data_ptr, masters))
        return MasterSnapshot(self.epoch, torch.is_grad_enabled(), list(map(id, masters)), versions, addresses, grads)

    def refresh(self, masters: Iterable[torch.Tensor]) -> None:
        """Cast the shadows of `masters` again, whatever they look like (after `p.data` edits on a GPU)."""
        wanted = {id(m): m for m in masters}
        found = [(wanted[key], entry) for (key, _), entry in self._entries.items() if key in wanted]
        if found:
            states = self.states(self.look([master for master, _ in found]))
            self.write([(*pair, state) for pair, state in zip(found, states, strict=True)])

    def note_step(self, masters: Sequence[torch.Tensor]) -> None:
        """An optimizer stepped: these masters changed."""
        for master in masters:
            if id(master) in self._steps:
                self._steps[id(master)] += 1
                self.epoch += 1

    @property
    def changes(self) -> tuple[int, int]:
        """Another pair as soon as a shadow came, went or was replaced."""
        return self.gone, len(self._entries)

    def held(self, masters: Sequence[torch.Tensor], dtype: torch.dtype) -> list[_Entry | None]:
        """The entries of `masters` in this type, where there are any; their shadows may be stale."""
        return [self._entries.get((id(master), dtype)) for master in masters]

    def are_current(self, masters: Sequence[torch.Tensor], entries: Sequence[_Entry]) -> bool:
        """Whether all these shadows are their masters', as far as host calls tell."""
        return list(map(_STATE, entries)) == list(self.states(self.look(masters)))

    def note_written(self, written: Written) -> None:
        """An optimizer wrote these shadows with their masters, and its step has been noted."""
        self.written += 1
        for master, entry, number, address in written:
            entry.state, entry.had_grad = (number, address, self._steps[id(master)]), False

    def states(self, look: MasterSnapshot) -> Iterator[tuple[int, int, int]]:
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

    def write(self, stale: Sequence[tuple[torch.Tensor, _Entry, tuple[int, int, int]]]) -> None:
        """Cast these again, together; each is that of its master in the given state.

        Raises:
          RuntimeFailure: MP721, where FP16 cannot hold a weight.
        """
        with torch.inference_mode(False), torch.no_grad():
            # In place: a graph that saved a shadow for a backward still to come is told by its version.
            foreach_copy([entry.shadow for _, entry, _ in stale], [master for master, *_ in stale])
        # Reading elements off another device waits for it: there, once per shadow.
        refuse_infinite([
            (master, entry.shadow) for master, entry, _ in stale
            if entry.shadow.dtype == torch.float16 and (entry.state[0] == -1 or master.device.type == "cpu")
        ])  # fmt: skip
        for _, entry, state in stale:
            entry.state = state
        self.casts += len(stale)
        self.written += 1


def refuse_infinite(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], what: str = "weight") -> None:
    """A shadow is to be infinite only where its master is.

    Raises:
      RuntimeFailure: MP721.
    """
    with torch.inference_mode(False), torch.no_grad():
        for master, shadow in pairs:
            if shadow.is_meta or not shadow.isinf().any() or not (shadow.isinf() & master.isfinite()).any():
                continue
            largest = master[master.isfinite()].abs().max().item()
            raise RuntimeFailure(
                "MP721", f"a {what} of shape {tuple(master.shape)} holds {largest:g}, and is read in FP16",
                why="FP16 ends at 65,504: its low copy would be infinite",
                try_="mpcompile(model, ...) anew, which plans for the weights as they are; or policy='bf16'",
            )  # fmt: skip


class Watched:
    """The shadows of some masters, kept equal to them by a few calls where nothing changed.

    The one rule of staleness, for the drop-in's graphs (`ShadowGroup`) and the training step's (`ShadowSet`), which
    hold the masters.

    Args:
      table: where the shadows live.
      entries: the entry of each master.
    """

    def __init__(self, table: ShadowTable, entries: Sequence[_Entry]) -> None:
        self.table, self.entries = table, list(entries)
        self.shadows = [entry.shadow for entry in entries]
        self._seen: MasterSnapshot | None = None
        # What an update of our own left behind, not yet written into the entries.
        self._noted: list[tuple[int, int, int]] | None = None
        self._comparison: Comparison | None = None

    def bring_up_to_date(self, masters: Sequence[torch.Tensor], now: MasterSnapshot | None = None) -> None:
        """Cast again what is not its master's any more; `now` is what the masters look like, where it is known."""
        now = now or self.table.look(masters)
        stale = self._changed(masters, now) if now != self._seen else set[int]()
        if self._comparison is None or self._seen is None or self._seen.addresses != now.addresses:
            self._comparison = Comparison(masters, self.shadows)
        self._write(masters, stale, now)
        if len(stale) < len(masters):
            self._write(masters, self._comparison.differing(), now)
        self._seen = now

    def _write(self, masters: Sequence[torch.Tensor], numbers: set[int], now: MasterSnapshot) -> None:
        if numbers:
            states = list(self.table.states(now))
            self.table.write([(masters[i], self.entries[i], states[i]) for i in sorted(numbers)])

    def note_update(self, masters: Sequence[torch.Tensor]) -> None:
        """The shadows are those of the masters as they are now: who updated these wrote those too."""
        self.table.written += 1
        now = self.table.look(masters)
        if self._seen is not None and self._seen.addresses != now.addresses:
            self._comparison = None
        self._seen, self._noted = now, list(self.table.states(now))

    def _changed(self, masters: Sequence[torch.Tensor], now: MasterSnapshot) -> set[int]:
        """The numbers of the masters that changed as far as host calls tell."""
        if self._noted is not None:
            for entry, state in zip(self.entries, self._noted, strict=True):
                entry.state = state
            self._noted = None
        turned = self._seen is not None and self._seen.learning != now.learning
        stale = set[int]()
        for number, (master, entry, state, has_grad) in enumerate(
            zip(masters, self.entries, self.table.states(now), now.grads, strict=True)
        ):
            unread = turned and master.device.type != "cpu"
            if unread or entry.state != state or (entry.had_grad and not has_grad):
                stale.add(number)
            entry.had_grad = has_grad
        return stale


class ShadowGroup:
    """The shadows that one compiled graph reads.

    Args:
      table: where the shadows live.
      dtypes: the low type of each, in the order of the masters.
    """

    def __init__(self, table: ShadowTable, dtypes: Sequence[torch.dtype]) -> None:
        self.table, self.dtypes = table, list(dtypes)
        self._gone = -1
        self._found: tuple[list[int], list[int]] | None = None
        self._watched = Watched(table, ())

    def get(self, masters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The up-to-date shadows of `masters`."""
        now = self.table.look(masters)
        if self._gone != self.table.gone or self._found != (now.ids, now.addresses):
            self._watched = Watched(self.table, self.table.entries(masters, self.dtypes))
            self._gone, self._found = self.table.gone, (now.ids, now.addresses)
        self._watched.bring_up_to_date(masters, now)
        return self._watched.shadows


SHADOWS = ShadowTable()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    SHADOWS.note_step([p for group in optimizer.param_groups for p in group["params"]])
    # What a hook after the step edits is seen by the versions.
    written = vars(optimizer).pop(WROTE, None)
    if written is not None:
        SHADOWS.note_written(written)


register_optimizer_step_post_hook(_after_step)
