"""Whether shadows are what a cast of their masters would give, on a CPU: every element, whoever edited it and how.

An edit through ``p.data`` (or numpy, or another process) leaves no trace but the elements themselves.  So they are
compared, and with the shadow itself: what is kept of a master anyway, and all of it that matters.  A sum or a hash of
the master is read faster (0.4 of the time), but a sum that elements swapped or negated in pairs leave as it was, and
must be taken once more after each update (decision 0025).  Pieces stay in the cache: what is cast to be compared never
reaches the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Elements of a piece: its master, its cast and its shadow are 1 MB together.
PIECE = 1 << 17
# Masters with fewer are compared together, by four calls for all.
SMALL = 1 << 14
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class _Piece:
    """Elements that are compared at once: of one large master, or of several small ones (`numbers`)."""

    numbers: tuple[int, ...]
    masters: list[Tensor]
    shadows: list[Tensor]
    low: torch.dtype


class Comparison:
    """Compares some masters with their shadows, by views that are made once.

    Args:
      masters: FP32 tensors on a CPU, of any layout.
      shadows: their low copies; one that shares its master's memory (split masters) is never compared.
    """

    def __init__(self, masters: Sequence[Tensor], shadows: Sequence[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._pieces = list(_pieces(masters, shadows))

    def differing(self) -> set[int]:
        """The numbers of the masters whose shadow is not theirs."""
        wide: dict[torch.dtype, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            unlike = [piece for piece in self._pieces if not _same(piece, wide)]
            return {number for piece in unlike for number in _unlike(piece, wide)}


def _pieces(masters: Sequence[Tensor], shadows: Sequence[Tensor]) -> Iterator[_Piece]:
    small: dict[tuple[torch.dtype, torch.dtype], list[tuple[int, Tensor, Tensor]]] = {}
    for number, (master, shadow) in enumerate(zip(masters, shadows, strict=True)):
        if master.device.type != "cpu" or not master.numel() or master.data_ptr() == shadow.data_ptr():
            continue
        if not _lies_as(master, shadow):
            yield _Piece((number,), [master.detach()], [shadow.detach()], shadow.dtype)
            continue
        wide, low = _flat(master), _flat(shadow)
        if wide.numel() < SMALL:
            small.setdefault((master.dtype, shadow.dtype), []).append((number, wide, low))
            continue
        for part, kept in zip(torch.split(wide, PIECE), torch.split(low, PIECE), strict=True):
            yield _Piece((number,), [part], [kept.view(_wide(kept))], shadow.dtype)
    for (_, low_type), held in small.items():
        for numbers, parts, lows in _filled(held):
            yield _Piece(numbers, list(parts), [low.view(_BITS[low.element_size()]) for low in lows], low_type)


def _filled(held: Sequence[tuple[int, Tensor, Tensor]]) -> Iterator[Any]:
    """Small ones in groups that fill a piece: (numbers, masters, shadows) of each."""
    group, room = list[tuple[int, Tensor, Tensor]](), PIECE
    for one in held:
        if one[1].numel() > room:
            yield zip(*group, strict=True)
            group, room = [], PIECE
        group.append(one)
        room -= one[1].numel()
    yield zip(*group, strict=True)


def _lies_as(master: Tensor, shadow: Tensor) -> bool:
    """Both without gaps and in one order, so that their memory can be compared as it lies."""
    dense = torch.ops.aten.is_non_overlapping_and_dense.default
    return master.stride() == shadow.stride() and dense(master.detach()) and dense(shadow)


def _flat(tensor: Tensor) -> Tensor:
    """All elements, in the order of memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _wide(low: Tensor) -> torch.dtype:
    """An integer type that holds these bits whole, the wider the faster to compare."""
    return torch.int64 if low.numel() * low.element_size() % 8 == 0 else _BITS[low.element_size()]


def _same(piece: _Piece, room: dict[torch.dtype, Tensor]) -> bool:
    """Compared as integers, which tell minus zero from zero and equal a NaN to itself."""
    master, shadow = piece.masters[0], piece.shadows[0]
    if master.dim() != 1 or master.numel() > PIECE or shadow.dtype == piece.low:
        bits = _BITS[shadow.element_size()]
        return torch.equal(master.to(piece.low).reshape(-1).view(bits), shadow.reshape(-1).view(bits))
    if len(piece.numbers) > 1:
        master, shadow = torch.cat(piece.masters), torch.cat(piece.shadows)
    if piece.low not in room:
        room[piece.low] = torch.empty(PIECE, dtype=piece.low)
    cast = room[piece.low][: master.numel()].copy_(master)
    return torch.equal(cast.view(shadow.dtype), shadow)


def _unlike(piece: _Piece, room: dict[torch.dtype, Tensor]) -> Iterator[int]:
    """Which of a piece's masters it is."""
    for number, master, shadow in zip(piece.numbers, piece.masters, piece.shadows, strict=True):
        if len(piece.numbers) == 1 or not _same(_Piece((number,), [master], [shadow], piece.low), room):
            yield number


__all__ = ["PIECE", "SMALL", "Comparison"]
