"""Shares of the weights themselves (``shard="full"``): a rank holds nothing whole between the calls of a step.

Graphs gather what they read from the ranks' shares (`gathered_weights`).  Meanwhile the model's parameters are names of
nothing: of their shape, and every number NaN, so that who reads them apart from the step cannot mistake them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.runtime.sharded import SHARED_OUT
from mpcompile.training.distributed.layout import Bucket, Piece
from mpcompile.training.distributed.shares import Shares, Spread, at


class FullShares(Shares):
    """One rank's shares of weights, masters and moments.

    Args:
      model: whose weights they are.
      chunks: the rank's share of each bucket, as graphs read it.
      orders: of each parameter, the dimensions as its elements lie in memory.
    """

    # Each microbatch's gradients arrive as pieces.
    of_sums = False

    def __init__(
        self, *given: Any, model: nn.Module, chunks: Sequence[Tensor], orders: dict[str, tuple[int, ...]]
    ) -> None:
        self._model, self._chunks, self._orders = model, list(chunks), orders
        self._lies: dict[str, tuple[torch.Size, tuple[int, ...]]] = {}
        self._largest: dict[str, Tensor] = {}
        self._nothing: dict[torch.dtype, Tensor] = {}
        super().__init__(*given)

    def _is_lent(self, bucket: Bucket) -> bool:
        return True

    def _like(self, name: str, dtype: torch.dtype) -> Tensor:
        size, stride = self._lies[name]
        return torch.empty_strided(size, stride, dtype=dtype, device=self._chunks[0].device)

    def _order_of(self, whose: Tensor) -> tuple[int, ...]:
        name = next(name for name, held in self.parameters.items() if held is whose)
        return self._orders[name]

    def _make_buffers(self) -> None:
        """The rank's pieces: of FP32 shares, which graphs read where they read masters; else low copies beside them."""
        self._lies = {name: (held.shape, held.stride()) for name, held in self.parameters.items()}
        self.named, self.low_of = {}, {}
        self._masters, self._low = [], []
        for number, (bucket, chunk) in enumerate(zip(self.layout.buckets, self._chunks, strict=True)):
            master = chunk if bucket.whole else torch.zeros_like(chunk, dtype=torch.float32)
            self._masters.append(master)
            self._low.append(None if bucket.whole else chunk)
            for piece in self.layout.of_bucket(number):
                self.named[piece.name] = at(master, piece)
                if not bucket.whole:
                    self.low_of[piece.name] = at(chunk, piece)
        if not self.named:
            self.named[""] = torch.zeros(self.layout.pieces[0].length, device=self._chunks[0].device)
        self._spread = Spread([], [], [], [], [], [])

    # ------------------------------------------------------------------------------------------------- for an update

    def spread(self) -> None:
        """Nothing: the graphs gather."""

    def spreading(self) -> tuple[Callable[..., None], list[Tensor]]:
        return lambda: None, []

    def written(self) -> list[Tensor]:
        return self._chunks

    # ---------------------------------------------------------------------------------------------- edits from outside

    def _narrow(self) -> None:
        with torch.no_grad():
            for piece in self.layout.pieces:
                self._put(piece)
            self._largest = {name: held.detach().abs().amax() for name, held in self.parameters.items() if held.numel()}
        self._empty()

    def _put(self, piece: Piece) -> None:
        if not piece.name:
            return
        self.named[piece.name].copy_(self._cut_here(self.parameters[piece.name], piece))
        if piece.name in self.low_of:
            self.low_of[piece.name].copy_(self.named[piece.name])

    def _empty(self) -> None:
        """Let parameters and shadows be names of nothing."""
        held = self._shadow_set
        self._shadows = {id(m): s for m, s in zip(held.masters, held.shadows, strict=True)}
        for name, parameter in self.parameters.items():
            shadow = self._shadows.get(id(parameter))
            size, _ = self._lies[name]
            if shadow is None:
                parameter.data = self._none(torch.float32).expand(size)
                continue
            shadow.data = self._none(shadow.dtype).expand(size)
            parameter.data = shadow
        self._open = False
        held.lend(set(map(id, self.parameters.values())))
        SHARED_OUT.add(self._model)
        self.note()

    def _none(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._nothing:
            self._nothing[dtype] = torch.full((), float("nan"), dtype=dtype, device=self._chunks[0].device)
        return self._nothing[dtype]

    def _widen(self) -> None:
        super()._widen()
        for name, parameter in self.parameters.items():
            shadow = self._shadows.get(id(parameter))
            if shadow is not None:
                shadow.data = self._like(name, shadow.dtype).copy_(parameter.detach())
        self._let_read()

    def _let_read(self) -> None:
        self._shadow_set.lend(None)
        SHARED_OUT.discard(self._model)

    def readable(self) -> contextlib.AbstractContextManager[None]:
        """What graphs read is there inside. A call of all ranks."""
        return self.joined("looking at a batch again")

    @contextlib.contextmanager
    def widened(self) -> Iterator[None]:
        """The parameters lie as when they are whole inside, every number the largest of theirs. No collective."""
        if self._open:
            yield
            return
        for name, parameter in self.parameters.items():
            largest = self._largest.get(name)
            whole = self._like(name, torch.float32)
            parameter.data = whole if largest is None else whole.copy_(largest)
        self._let_read()
        try:
            yield
        finally:
            self._empty()


__all__ = ["FullShares"]
