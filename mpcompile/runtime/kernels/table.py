"""A table of addresses on the device, so that one launch reaches any number of tensors.

A row a parameter: where its gradient, master, moments, shadow and step counter lie, how many elements it has, and of
which group it is.  A list of chunks says which elements of which row a program takes.  The host compares all addresses
with those that it sent last, in a fixed number of calls, and sends them again when a tensor moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# As in `update_triton`.
GRAD, OTHER, MASTER, FIRST, SECOND, SHADOW, LOWER, COUNTER, COUNT, GROUP, LOW_GRAD, LOW_OTHER, ALIGNED = range(13)
FIRST_SCALES, SECOND_SCALES = 13, 14
COLUMNS = 16
# Bytes on which a row must lie for wide accesses.
WIDE = 16
# Pinned tables that are ready for the captures of CUDA graphs, in which none can be allocated.
SPARE = 16


@dataclass(frozen=True)
class Rows:
    """What one update reads and writes beside gradients: one entry a parameter in every list.

    Fields:
      masters: FP32, or the BF16 half of a split master.
      firsts, seconds: moments (SGD: its buffer, and None), laid out as their masters; None where there is none. All are
        FP32, all BF16, or all codes (`mpcompile.runtime.state_codes`).
      shadows: low copies of the masters, laid out as they are, or None; lowers: int16 halves of split masters, or None.
      counters: 0-dim FP32, what counts a parameter's steps; None where nothing is counted.
      groups: the group's number.
      first_scales, second_scales: FP32, one for every 256 elements of moments that are codes; empty where none are.
    """

    masters: list[Tensor]
    firsts: list[Tensor | None]
    seconds: list[Tensor | None]
    shadows: list[Tensor | None]
    lowers: list[Tensor | None]
    counters: list[Tensor | None]
    groups: list[int]
    first_scales: list[Tensor | None] = field(default_factory=list)
    second_scales: list[Tensor | None] = field(default_factory=list)

    def cells(self) -> list[tuple[Tensor, int, int]]:
        """(tensor, row, column) of all that is there."""
        columns: dict[int, Sequence[Tensor | None]] = {
            MASTER: self.masters,
            FIRST: self.firsts,
            SECOND: self.seconds,
            SHADOW: self.shadows,
            LOWER: self.lowers,
            COUNTER: self.counters,
            FIRST_SCALES: self.first_scales,
            SECOND_SCALES: self.second_scales,
        }
        return [
            (tensor, row, column)
            for column, tensors in columns.items()
            for row, tensor in enumerate(tensors)
            if tensor is not None
        ]


def fits(master: Tensor, other: Tensor) -> bool:
    """True when `other` lies in memory as `master` does, element for element, and without holes.

    Dimensions of size 1 may have any stride.
    """
    if master.shape != other.shape:
        return False
    strides = zip(master.shape, master.stride(), other.stride(), strict=True)
    return all(size <= 1 or mine == theirs for size, mine, theirs in strides) and dense(master)


def dense(tensor: Tensor) -> bool:
    """True when a tensor's elements fill their memory, in whatever order of dimensions."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor)) or tensor.numel() <= 1


def chunks(counts: Sequence[int], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, number within the row) of every chunk of `size` elements: int32 each."""
    each = np.array([-(-count // size) for count in counts], dtype=np.int64)
    row = np.repeat(np.arange(len(each), dtype=np.int32), each)
    first = np.cumsum(each) - each
    number = (np.arange(len(row), dtype=np.int64) - np.repeat(first, each)).astype(np.int32)
    return torch.from_numpy(row).to(device), torch.from_numpy(number).to(device)


@dataclass
class AddressTable:
    """The table of some rows, and the addresses that it was made of.

    Args:
      rows: what stays; grads: (row, OTHER or GRAD, whether it is low) of each gradient, in the order of `now`'s list.
    """

    rows: Rows
    grads: list[tuple[int, int, bool]]
    device: torch.device
    _seen: list[int] = field(default_factory=list)
    _spare: list[Tensor] = field(default_factory=list)
    _kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        cells = self.rows.cells()
        self._held = [tensor for tensor, _, _ in cells]
        places = [(row, column) for row, column, _ in self.grads] + [(row, column) for _, row, column in cells]
        self._places = np.array([row * COLUMNS + column for row, column in places], dtype=np.int64)
        self._table: Any = np.zeros((len(self.rows.masters), COLUMNS), dtype=np.int64)
        self._table[:, COUNT] = [master.numel() for master in self.rows.masters]
        self._table[:, GROUP] = self.rows.groups
        for row, column, low in self.grads:
            self._table[row, column - GRAD + LOW_GRAD] = low
        self._sent = torch.zeros(self._table.shape, dtype=torch.int64, device=self.device)
        self.fill_spare()

    def now(self, grads: Sequence[Tensor]) -> Tensor:
        """The table on the device, int64 (rows, COLUMNS), for these gradients and for where all tensors lie now.

        While a CUDA graph is captured it is one of the graph's own, which every replay sends again.
        """
        addresses = list(map(torch.Tensor.data_ptr, [*grads, *self._held]))
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if not self._spare:
                # A step then runs without a graph, and says so.
                raise RuntimeError("no pinned memory lies ready for another capture of the update")
            staged = self._spare.pop()
            self._kept.append(staged)
            self._write(addresses, staged)
            return torch.empty_like(self._sent).copy_(staged, non_blocking=True)
        self.fill_spare()
        if addresses != self._seen:
            staged = torch.empty(self._table.shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")
            self._write(addresses, staged)
            self._sent.copy_(staged, non_blocking=True)
            self._seen = addresses
        return self._sent

    def _write(self, addresses: list[int], staged: Tensor) -> None:
        self._table.reshape(-1)[self._places] = addresses
        self._table[:, ALIGNED] = (self._table[:, : LOWER + 1] % WIDE == 0).all(axis=1)
        staged.copy_(torch.from_numpy(self._table))

    def fill_spare(self) -> None:
        """Make the pinned tables that captures will take."""
        if self.device.type == "cuda" and len(self._spare) < SPARE:
            self._spare += [
                torch.empty(self._table.shape, dtype=torch.int64, pin_memory=True)
                for _ in range(SPARE - len(self._spare))
            ]
