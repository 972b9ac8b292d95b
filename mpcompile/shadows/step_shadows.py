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
        self.masters, self._places, self._watched = [], {}, Watched(SHADOWS, ())

    def bring_up_to_date(self) -> None:
        """Cast again what was edited since the last update."""
        if self.masters:
            self._watched.bring_up_to_date(self.masters)

    def refresh(self) -> None:
        """Cast all of them again."""
        with torch.no_grad():
            foreach_copy(self.shadows, self.masters)
        self.note_update()

    def note_update(self) -> None:
        """The shadows are those of the masters as they are now."""
        self._watched.note_update(self.masters)
