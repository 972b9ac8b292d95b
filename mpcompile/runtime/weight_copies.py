"""FP8 copies of weights that a step's graphs read, written once an update and not in every forward.

Each is a pair of layouts of one shadow, with its scale, at a place of its own: graphs take them as inputs.  On CUDA two
launches write all of them, and can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpcompile.runtime.quantise import kernels_for, quantise, shapes_of
from mpcompile.shadows.table import SHADOWS


@dataclass(frozen=True)
class Wanted:
    """What of a shadow is read: its format, and which layouts."""

    form: str
    lies: bool
    transposed: bool


@dataclass
class WeightCopies:
    """All copies of one step's weights.

    Fields:
      written: what of `SHADOWS` they were last made of; -1: of nothing yet.
    """

    written: int = -1
    _held: dict[tuple[int, Wanted], tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict)
    _launches: list[Any] | None = None

    def __len__(self) -> int:
        return len(self._held)

    def get(self, shadow: Tensor, wanted: Wanted) -> tuple[Tensor, ...]:
        """[rows, columns], its scale, [columns, rows], its scale: empty until the next look at `bring_up_to_date`."""
        found = self._held.get((id(shadow), wanted))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                made = shapes_of(shadow, wanted.form, wanted.lies, wanted.transposed)
            found = self._held[id(shadow), wanted] = shadow, made
            self.written, self._launches = -1, None
        return found[1]

    def tensors(self) -> list[Tensor]:
        """Every copy and scale that has elements, at its address."""
        return [one for _, made in self._held.values() for one in made if one.numel()]

    def clear(self) -> None:
        """The graphs that read them are void."""
        self._held.clear()
        self.written, self._launches = -1, None

    def bring_up_to_date(self) -> None:
        """Write them again if any shadow of this process was written since: an edit, a loaded file, another step."""
        if self._held and self.written != SHADOWS.written:
            self.write()
            self.note()

    def note(self) -> None:
        """They are of the shadows as these are now."""
        self.written = SHADOWS.written

    def write(self) -> None:
        """Write all of them. Asks the device nothing."""
        if not self._held:
            return
        if self._launches is None:
            self._launches = list(self._grouped())
        with torch.inference_mode(False), torch.no_grad():
            for launch in self._launches:
                launch()

    def _grouped(self) -> Sequence[Any]:
        """One call for all that our kernels serve, one for each of the others."""
        many: list[tuple[Wanted, Tensor, tuple[Tensor, ...]]] = []
        calls: list[Any] = []
        for (_, wanted), (shadow, made) in self._held.items():
            kernels = kernels_for(shadow)
            if kernels is not None and kernels.serves(shadow):
                many.append((wanted, shadow, made))
            else:
                calls.append(_Plain(wanted, shadow, made))
        kinds = sorted({(wanted.form, shadow.dtype) for wanted, shadow, _ in many}, key=str)
        for form, dtype in kinds:
            alike = [(shadow, made) for wanted, shadow, made in many if (wanted.form, shadow.dtype) == (form, dtype)]
            calls.append(kernels_for(alike[0][0]).Several(alike, form))
        return calls


@dataclass(frozen=True)
class _Plain:
    """One shadow's copies by torch's operations."""

    wanted: Wanted
    shadow: Tensor
    made: tuple[Tensor, ...]

    def __call__(self) -> None:
        new = quantise(self.shadow, self.wanted.form, self.wanted.lies, self.wanted.transposed)
        for target, source in zip(self.made, new, strict=True):
            target.copy_(source)


__all__ = ["Wanted", "WeightCopies"]
