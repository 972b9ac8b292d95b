"""The gradients of one accumulation window, summed in buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

Layout = tuple[tuple[str, torch.dtype], ...]


class Window:
    """Sums over `size` microbatches: FP32, or in the gradients' own type where `low`.

    A gradient that is not finite leaves its sum so; the check at the end of the window sees it, and the whole window
    is skipped.
    """

    def __init__(self, size: int, low: bool) -> None:
        self.size, self.low, self.count = size, low, 0
        self.sums: dict[str, Tensor] = {}
        self._pick: dict[Layout, Callable[[Any], Any]] = {}

    def __len__(self) -> int:
        return len(self.sums)

    def prepare(self, layout: Layout, parameters: dict[str, Tensor]) -> bool:
        """Make room for gradients of this layout; True when there were none of it before."""
        if layout in self._pick:
            return False
        for name, dtype in layout:
            held = self.sums.get(name)
            if held is None:
                kept = dtype if self.low else torch.float32
                self.sums[name] = torch.zeros_like(parameters[name], dtype=kept, requires_grad=False)
        names = [name for name, _ in layout]
        self._pick[layout] = itemgetter(*names) if len(names) > 1 else lambda sums: (sums[names[0]],)
        return True

    def add(self, layout: Layout, grads: Sequence[Tensor]) -> None:
        """Add one microbatch."""
        whole = list(self.sums.values())
        if self.count == 0:
            torch._foreach_zero_(whole)
        # A tied weight has two gradients; foreach adds them one after the other.
        torch._foreach_add_(self._pick[layout](self.sums), list(grads))
        self.count += 1

    @property
    def full(self) -> bool:
        return self.count >= self.size

    def layout(self) -> Layout:
        return tuple((name, sum_.dtype) for name, sum_ in self.sums.items())

    def state(self) -> dict[str, Any]:
        """What a checkpoint in the middle of a window needs."""
        return {"count": self.count, "sums": dict(self.sums) if self.count else {}}

    def load(self, saved: dict[str, Any], parameters: dict[str, Tensor]) -> None:
        self.count = saved["count"]
        for name, value in saved["sums"].items():
            self.sums[name] = value.to(parameters[name].device, copy=True)
        self._pick.clear()
