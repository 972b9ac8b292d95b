"""Who holds what of a sharded update: parameters flat in buckets, each rank an equal share of each bucket.

All of it is numbers, the same on every rank.  A bucket's gradients travel together; what its update gives is gathered
together, and so all are of one kind: `whole` (a graph reads the FP32 master, and every rank keeps it), or known to the
graphs by a low shadow alone (of the master a rank keeps its share).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements on which members and shares begin: 64 bytes of FP32, as wide accesses want it.
ALIGN = 16


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from the slowest to the fastest; () where that is their own order."""
    if tensor.is_contiguous():
        return ()
    return tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


def padded(count: int, ranks: int = 1) -> int:
    """`count`, up to a multiple of `ALIGN` on each of `ranks`."""
    step = ALIGN * ranks
    return -(-count // step) * step


@dataclass(frozen=True)
class Member:
    """A parameter's place in its bucket, in elements."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel together.

    Fields:
      travels: their gradients' dtype on the way; chunk: elements of a rank's share, padding included.
    """

    members: tuple[Member, ...]
    travels: torch.dtype
    whole: bool
    chunk: int

    @classmethod
    def of(cls, sizes: Iterable[tuple[str, int]], travels: torch.dtype, whole: bool, ranks: int) -> Bucket:
        members, start = list[Member](), 0
        for name, count in sizes:
            members.append(Member(name, start, count))
            start += padded(count)
        return cls(tuple(members), travels, whole, padded(start, ranks) // ranks)


@dataclass(frozen=True)
class Piece:
    """Of a parameter, what one rank updates.

    Fields:
      bucket: its number; at: where it lies in the rank's share of it.
      begin, length: its elements, counted as the parameter's lie in memory. Padding has no name.
    """

    name: str
    bucket: int
    at: int
    begin: int
    length: int


@dataclass(frozen=True)
class ShareLayout:
    """All buckets, in the order in which they are sent; and the pieces of one rank."""

    buckets: tuple[Bucket, ...]
    ranks: int
    rank: int

    @property
    def pieces(self) -> list[Piece]:
        """The rank's own. One that would have none has a piece of padding, which is zero and stays so."""
        found = [piece for number in range(len(self.buckets)) for piece in self.of_bucket(number)]
        return found or [Piece("", 0, 0, 0, ALIGN)]

    def of_bucket(self, number: int) -> Iterator[Piece]:
        """The rank's pieces of parameters in one bucket."""
        bucket = self.buckets[number]
        first, end = self.rank * bucket.chunk, (self.rank + 1) * bucket.chunk
        for one in bucket.members:
            low, high = max(one.start, first), min(one.start + one.count, end)
            if low < high:
                yield Piece(one.name, number, low - first, low - one.start, high - low)

    @property
    def mine(self) -> tuple[tuple[str, torch.dtype], ...]:
        """(name, dtype) of each gradient that reaches the rank's update."""
        return tuple((piece.name, self.buckets[piece.bucket].travels) for piece in self.pieces)

    @property
    def sent(self) -> tuple[tuple[str, torch.dtype], ...]:
        """(name, dtype) of each gradient that travels."""
        return tuple((one.name, bucket.travels) for bucket in self.buckets for one in bucket.members)

    def facts(self) -> list[list[tuple[str, int]]]:
        """What of it ranks compare."""
        return [[(one.name, one.count) for one in bucket.members] for bucket in self.buckets]


def in_buckets(
    ready: Sequence[tuple[str, int, torch.dtype, bool]], ranks: int, first: int, room: int
) -> Iterator[tuple[list[int], Bucket]]:
    """Gradients, in the order in which they become ready, in buckets: (their numbers in `ready`, the bucket).

    Args:
      ready: (name, elements, dtype, whether a graph reads the master) of each.
      first, room: bytes of the first bucket of a kind and of the later ones.
    """
    open_ = dict[tuple[torch.dtype, bool], list[int]]()
    left = dict[tuple[torch.dtype, bool], int]()

    def close(kind: tuple[torch.dtype, bool]) -> tuple[list[int], Bucket]:
        numbers = open_.pop(kind)
        left[kind] = room
        return numbers, Bucket.of([ready[i][:2] for i in numbers], *kind, ranks)

    for number, (_, count, dtype, whole) in enumerate(ready):
        kind = dtype, whole
        open_.setdefault(kind, []).append(number)
        left[kind] = left.get(kind, first) - count * dtype.itemsize
        if left[kind] <= 0:
            yield close(kind)
    for kind in list(open_):
        yield close(kind)


__all__ = ["ALIGN", "Bucket", "Member", "Piece", "ShareLayout", "in_buckets", "memory_order", "padded"]
