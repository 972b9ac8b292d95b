"""The gradients of one accumulation window, summed in buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.tensors import foreach_add, foreach_copy, foreach_zero

Layout = tuple[tuple[str, torch.dtype], ...]

# Elements of a piece: a CPU adds a low gradient by way of a wide copy of it, which so stays in the cache.
PIECE = 1 << 18


@dataclass(frozen=True)
class _Way:
    """How gradients of one layout reach the sums.

    Fields:
      rows: per gradient, the rows of its pieces; 0 leaves it whole.
      ranks: (rank, targets, numbers of the pieces): first every sum's first gradient, then the second ones (of tied
        weights), so that no call writes to one sum twice; one call per dtype, as CUDA's kernels want it.
      names: whose gradients these are; absent: the sums that they leave out.
    """

    rows: tuple[int, ...]
    ranks: tuple[tuple[int, list[Tensor], list[int]], ...]
    names: frozenset[str]
    absent: list[Tensor]

    def pieces(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        if not any(self.rows):
            return grads
        found = list[Tensor]()
        for grad, rows in zip(grads, self.rows, strict=True):
            found += torch.split(grad, rows) if rows else (grad,)
        return found


class GradAccumulator:
    """Sums over `size` microbatches: FP32, or in the gradients' own type where `low`.

    A gradient that is not finite leaves its sum so; the check at the end of the window sees it, and the whole window
    is skipped.  A parameter that got no gradient in this window has no part in its update, as if its gradient were None.

    Fields:
      sums: of every parameter that ever had a gradient; those outside `present` hold what an earlier window left.
      present: the parameters with a gradient in this window.
      epoch: how often the sums, or the ways to them, became others.
    """

    def __init__(self, size: int, low: bool) -> None:
        self.size, self.low, self.count, self.epoch = size, low, 0, 0
        self.sums: dict[str, Tensor] = {}
        self.present: frozenset[str] = frozenset()
        self._ways: dict[Layout, _Way] = {}
        self._layouts: dict[frozenset[str], Layout] = {}

    def __len__(self) -> int:
        return len(self.sums)

    def __contains__(self, layout: Layout) -> bool:
        return layout in self._ways

    def prepare(self, layout: Layout, parameters: dict[str, Tensor], order: Sequence[int]) -> None:
        """Make room for gradients of this layout.

        Args:
          order: ids of the parameters as the optimizer lists them, which is how the sums lie in memory.
        """
        self.epoch += 1
        if any(name not in self.sums for name, _ in layout):
            self._allocate(layout, parameters, order)
            self._ways = {known: self._way(known) for known in self._ways}
        self._ways[layout] = self._way(layout)

    def _allocate(self, layout: Layout, parameters: dict[str, Tensor], order: Sequence[int]) -> None:
        dtypes = {**{name: held.dtype for name, held in self.sums.items()}, **dict(layout)}
        rank = {key: i for i, key in enumerate(order)}
        names = sorted(dtypes, key=lambda name: rank.get(id(parameters[name]), len(rank)))
        before = self.sums
        types = dtypes if self.low else dict.fromkeys(names, torch.float32)
        self.sums = {n: torch.zeros_like(parameters[n], dtype=types[n], requires_grad=False) for n in names}
        self._layouts.clear()
        for name, held in before.items():
            self.sums[name].copy_(held)

    def _way(self, layout: Layout) -> _Way:
        rows = tuple(_rows(self.sums[name], dtype) for name, dtype in layout)
        ranks: dict[tuple[int, torch.dtype], tuple[list[Tensor], list[int]]] = {}
        seen, number = dict[str, int](), 0
        for (name, dtype), each in zip(layout, rows, strict=True):
            rank = seen[name] = seen.get(name, -1) + 1
            targets = torch.split(self.sums[name], each) if each else (self.sums[name],)
            held, numbers = ranks.setdefault((rank, dtype), ([], []))
            held.extend(targets)
            numbers.extend(range(number, number + len(targets)))
            number += len(targets)
        ordered = sorted(ranks.items(), key=lambda item: item[0][0])
        absent = [held for name, held in self.sums.items() if name not in seen]
        return _Way(rows, tuple((rank, *ways) for (rank, _), ways in ordered), frozenset(seen), absent)

    def add(self, layout: Layout, grads: Sequence[Tensor]) -> None:
        """Add one microbatch, and let `count` rise next; the first of a window takes the place of what the last left."""
        way = self._ways[layout]
        pieces = way.pieces(grads)
        for rank, targets, numbers in way.ranks:
            given = [pieces[i] for i in numbers]
            if rank == 0 and self.count == 0:
                foreach_copy(targets, given)
            else:
                foreach_add(targets, given)
        if self.count == 0 and way.absent:
            foreach_zero(way.absent)

    def note(self, layout: Layout) -> None:
        """A microbatch of this layout was added."""
        names = self._ways[layout].names
        self.present = names | self.present if self.count else names
        self.count += 1

    def close(self) -> None:
        """The window is over; the next microbatch opens another."""
        self.count = 0

    @property
    def full(self) -> bool:
        return self.count >= self.size

    def layout(self) -> Layout:
        """What is in this window: (parameter's name, dtype) of each sum, as they lie."""
        if self.present not in self._layouts:
            pairs = tuple((name, held.dtype) for name, held in self.sums.items() if name in self.present)
            self._layouts[self.present] = pairs
        return self._layouts[self.present]

    def held(self, layout: Layout) -> list[Tensor]:
        """The sums of a layout."""
        return [self.sums[name] for name, _ in layout]

    def follow(self, moved: Mapping[str, str | None]) -> None:
        """Parameters go by other names now, and their sums with them; None: they are gone, and what was summed of them."""
        self.epoch += 1
        names = {name: moved.get(name, name) for name in self.sums}
        self.sums = {new: self.sums[name] for name, new in names.items() if new is not None}
        self.present = frozenset(new for name in self.present if (new := names.get(name)) is not None)
        self._ways.clear()
        self._layouts.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint in the middle of a window needs."""
        open_ = bool(self.count)
        return {"count": self.count, "sums": {n: s for n, s in self.sums.items() if open_ and n in self.present}}

    def _refuse(self, count: int, sums: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        if count and not sums:
            # torch.distributed.checkpoint loads only what a fresh step's state has, and that has no sums yet.
            raise _unfit(f"it had {count} microbatches, and their sums are not there")
        if count >= self.size:
            raise _unfit(f"it had {count} microbatches, and a window has {self.size} here")
        unknown = [name for name in sums if name not in parameters]
        if unknown:
            raise _unfit(f"there is no parameter {unknown[0]!r} here")

    def load(self, saved: dict[str, Any], parameters: dict[str, Tensor], order: Sequence[int]) -> None:
        """Put back what `state` gave.

        Raises:
          TrainingError: MP514, for an open window without its sums, or one of other parameters or another size.
        """
        self._refuse(saved["count"], saved["sums"], parameters)
        self.epoch += 1
        self.count, self.present = saved["count"], frozenset(saved["sums"])
        self._ways.clear()
        self.sums = {}
        if saved["sums"]:
            layout = tuple((name, value.dtype) for name, value in saved["sums"].items())
            self._allocate(layout, parameters, order)
        for name, value in saved["sums"].items():
            self.sums[name].copy_(value)


def _unfit(why: str) -> TrainingError:
    return TrainingError("MP514", "the open window of the saved step does not fit", why=why,
                         try_="save at the end of a window, or with `mpcompile.save_checkpoint`")  # fmt: skip


def _rows(total: Tensor, dtype: torch.dtype) -> int:
    """Rows of a piece of a gradient of `dtype`, or 0 where it is added whole."""
    if total.device.type != "cpu" or total.dtype == dtype or total.dim() < 2 or total.numel() <= PIECE:
        return 0
    return max(1, PIECE // (total.numel() // total.shape[0]))
