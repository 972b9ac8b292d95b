"""The shadows that a step's compiled graphs read, kept equal to their masters."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from mpcompile.shadows.table import SHADOWS, spread

_VERSION = operator.attrgetter("_version")
# On a CPU so many elements of each master are compared before a step.
_SAMPLE = 8


class ShadowSet:
    """The shadows that the compiled graphs read, kept equal to their masters.

    The update refreshes them.  An edit of a master from outside is seen by what one comparison per step can read on
    the host: its version (`load_state_dict`, ordinary in-place edits, another step), its address (``p.data = …``: an
    average swapped in), an optimizer that stepped or a shadow that the drop-in cast (fused optimizers raise no version),
    and on a CPU a few elements of each master (edits through ``p.data``: clipped weights).
    """

    def __init__(self) -> None:
        self.masters: list[Tensor] = []
        self.shadows: list[Tensor] = []
        self._places: dict[tuple[int, torch.dtype], int] = {}
        self._seen: Any = None
        self._views: list[Tensor] = []
        self._addresses: list[int] = []
        self._sample: Tensor | None = None

    def __len__(self) -> int:
        return len(self.shadows)

    def get(self, master: Tensor, dtype: torch.dtype) -> Tensor:
        """The shadow of `master`, made now if it is new."""
        place = self._places.setdefault((id(master), dtype), len(self.shadows))
        if place == len(self.shadows):
            self.masters.append(master)
            self.shadows.append(SHADOWS.get(master, dtype))
            self._seen = None
        return self.shadows[place]

    def bring_up_to_date(self) -> None:
        """Cast again if a master was edited since the last update."""
        if self.masters and (self._look() != self._seen or self._differs()):
            self.refresh()

    def refresh(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.shadows, self.masters)
        self.note_update()

    def note_update(self) -> None:
        """The shadows are those of the masters as they are now."""
        self._seen = self._look()
        self._sample = self._elements() if self.masters and self.masters[0].device.type == "cpu" else None

    def _look(self) -> Any:
        versions, addresses = map(_VERSION, self.masters), map(torch.Tensor.data_ptr, self.masters)
        return SHADOWS.epoch, SHADOWS.casts, list(versions), list(addresses)

    def _differs(self) -> bool:
        return self._sample is not None and not torch.equal(self._sample, self._elements())

    def _elements(self) -> Tensor:
        """A few elements of each master, by views that are made once per storage."""
        addresses = list(map(torch.Tensor.data_ptr, self.masters))
        if addresses != self._addresses:
            self._views, self._addresses = [spread(m, _SAMPLE) for m in self.masters if m.numel()], addresses
        return torch.cat(self._views)
