"""The shadows that a step's compiled graphs read, kept equal to their masters."""

from __future__ import annotations

import torch
from torch import Tensor

from mpcompile.shadows.table import SHADOWS, Watched
from mpcompile.torch_internals.tensors import foreach_copy


class ShadowSet:
    """The shadows that a step's compiled graphs read, at the places where those graphs expect them.

    The update refreshes them; an edit of a master from outside is seen as the drop-in sees it (`Watched`).
    """

    def __init__(self) -> None:
        self.masters: list[Tensor] = []
        self._places: dict[tuple[int, torch.dtype], int] = {}
        self._watched = Watched(SHADOWS, ())
        self._rest: tuple[list[Tensor], Watched] | None = None

    def __len__(self) -> int:
        return len(self.masters)

    @property
    def shadows(self) -> list[Tensor]:
        """The shadow of each of `masters`."""
        return self._watched.shadows

    def get(self, master: Tensor, dtype: torch.dtype) -> Tensor:
        """The shadow of `master`, made now if it is new."""
        place = self._places.setdefault((id(master), dtype), len(self.masters))
        if place == len(self.masters):
            SHADOWS.get(master, dtype)
            self.masters.append(master)
            self._watched = Watched(SHADOWS, [*self._watched.entries, *SHADOWS.entries([master], [dtype])])
        return self.shadows[place]

    def clear(self) -> None:
        """Let go of all masters: the graphs that read their shadows are void."""
        self.masters, self._places, self._watched, self._rest = [], {}, Watched(SHADOWS, ()), None

    def lend(self, lent: set[int] | None) -> None:
        """Masters of these ids, and their shadows, hold nothing until this is called with None: they are left alone."""
        # What was compared was of other memory.
        self._watched, self._rest = Watched(SHADOWS, self._watched.entries), None
        SHADOWS.gone += 1
        if lent is not None:
            rest = [(master, entry) for master, entry in zip(self.masters, self._watched.entries, strict=True)
                    if id(master) not in lent]  # fmt: skip
            self._rest = [master for master, _ in rest], Watched(SHADOWS, [entry for _, entry in rest])

    def _here(self) -> tuple[list[Tensor], Watched]:
        return (self.masters, self._watched) if self._rest is None else self._rest

    def bring_up_to_date(self) -> None:
        """Cast again what was edited since the last update."""
        masters, watched = self._here()
        if masters:
            watched.bring_up_to_date(masters)

    def refresh(self) -> None:
        """Cast all of them again."""
        masters, watched = self._here()
        with torch.no_grad():
            if masters:
                foreach_copy(watched.shadows, masters)
        self.note_update()

    def note_update(self) -> None:
        """The shadows are those of the masters as they are now."""
        masters, watched = self._here()
        watched.note_update(masters)
