"""Random numbers in an ONNX training step: out of a counter that is part of the state, so that a step can be repeated.

ONNX's own random operators have a seed per session and no state that could be saved.  Here draw number ``k`` of a step
is a hash of (counter, k, place of the element) in integers that every runtime computes exactly; the counter goes in
with the state and comes out one larger.

The hash is arithmetic modulo the prime P = 2**31 - 1, all of whose products fit 64 bits.  Rows and columns of the tensor
are hashed apart, with fifth powers (a permutation modulo P); an element is the product of its row's and its column's
number, which costs one multiplication and one division an element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
P = 2**31 - 1
# Draws that one step may make.
DRAWS = 4096
RANDOM = (aten.native_dropout.default, aten.bernoulli.p, aten.rand_like.default, aten.rand.default)


class Counter:
    """Draws from the counter that `begin` gives it; one for each translation of a step."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.draws = 0

    def begin(self, state: Tensor) -> None:
        self.state, self.draws = state, 0

    def draw(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Integers that are uniform in 1 … P - 1."""
        assert self.state is not None
        self.draws += 1
        columns = int(shape[-1]) if shape else 1
        rows = math.prod(int(n) for n in shape[:-1])
        # Two streams, for rows and for columns, of this draw of this step.
        place = (self.state * (2 * DRAWS) + 2 * self.draws) % P
        left = _mixed(torch.arange(1, rows + 1, device=device), place)
        right = _mixed(torch.arange(1, columns + 1, device=device), place + 1)
        return ((left.reshape(rows, 1) * right.reshape(1, columns)) % P).reshape(list(shape))

    def below(self, chance: float, like: Tensor) -> Tensor:
        """Bools that are true with probability `chance`."""
        return self.draw(like.shape, like.device) < round(chance * P)

    # ------------------------------------------------------------------------------------- what is decomposed with it

    def native_dropout(self, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        """A comparison with random numbers; the backward reads the same mask."""
        if not train or p == 0:
            return x, torch.ones_like(x, dtype=torch.bool)
        keep = self.below(1.0 - p, x)
        scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
        return torch.where(keep, x * scale, torch.zeros((), dtype=x.dtype, device=x.device)), keep

    def bernoulli(self, x: Tensor, p: float = 0.5, generator: Any = None) -> Tensor:
        return self.below(p, x).to(x.dtype)

    def rand_like(self, x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return self.uniform(x.shape, dtype or x.dtype, x.device)

    def rand(self, size: Sequence[int], *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        return self.uniform(size, dtype or torch.get_default_dtype(), device or torch.device("cpu"))

    def uniform(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        # 24 bits, as torch takes: FP32 holds them exactly, and 1.0 is never reached.
        return ((self.draw(shape, device) // 128).float() * 2.0**-24).to(dtype)

    def table(self) -> dict[Any, Any]:
        return dict(zip(RANDOM, (self.native_dropout, self.bernoulli, self.rand_like, self.rand), strict=True))


def _mixed(index: Tensor, place: Tensor) -> Tensor:
    """A number in 1 … P - 1 for each index, different for each place."""
    mixed = _fifth((index * 1_103_515_245 + place) % P)
    mixed = _fifth((mixed * 48_271 + place * 69_621 + 12_345) % P)
    return mixed + (mixed == 0)


def _fifth(x: Tensor) -> Tensor:
    square = (x * x) % P
    return (((square * square) % P) * x) % P


__all__ = ["RANDOM", "Counter", "P"]
