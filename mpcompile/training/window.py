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

    def __contains__(self, layout: Layout) -> bool:
        return layout in self._pick

    def prepare(self, layout: Layout, parameters: dict[str, Tensor], order: Sequence[int]) -> None:
        """Make room for gradients of this layout.

        Args:
          order: ids of the parameters as the optimizer lists them, which is how the sums lie in memory.
        """
        if any(name not in self.sums for name, _ in layout):
            self._allocate(layout, parameters, order)
        names = [name for name, _ in layout]
        self._pick[layout] = itemgetter(*names) if len(names) > 1 else lambda sums: (sums[names[0]],)

    def _allocate(self, layout: Layout, parameters: dict[str, Tensor], order: Sequence[int]) -> None:
        """FP32 sums lie side by side in one tensor, which the fused update then reads as it is."""
        dtypes = {**{name: held.dtype for name, held in self.sums.items()}, **dict(layout)}
        rank = {key: i for i, key in enumerate(order)}
        names = sorted(dtypes, key=lambda name: rank.get(id(parameters[name]), len(rank)))
        before, whole = self.sums, [torch.empty_like(parameters[name], device="meta") for name in names]
        if self.low:
            self.sums = {n: torch.zeros_like(parameters[n], dtype=dtypes[n], requires_grad=False) for n in names}
        else:
            device = parameters[names[0]].device
            flat = torch.zeros(sum(t.numel() for t in whole), device=device)
            self.sums = dict(zip(names, torch._C._nn.unflatten_dense_tensors(flat, whole), strict=True))
        for name, held in before.items():
            self.sums[name].copy_(held)

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

    def load(self, saved: dict[str, Any], parameters: dict[str, Tensor], order: Sequence[int]) -> None:
        self.count = saved["count"]
        self._pick.clear()
        self.sums = {}
        if saved["sums"]:
            layout = tuple((name, value.dtype) for name, value in saved["sums"].items())
            self._allocate(layout, parameters, order)
        for name, value in saved["sums"].items():
            self.sums[name].copy_(value)
