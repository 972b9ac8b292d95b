"""The update of all parameters in two passes and three launches: 30 bytes a parameter with low gradients.

Pass one reads the gradients (2 bytes), pass two reads gradient, master and moments and writes master, moments and
shadow (28); between them one program moves what is a number.  Nothing asks the device anything, and everything can be
captured in a CUDA graph.  AdamW, Adam and SGD; other optimizers keep their ways.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpcompile.runtime.kernels.table import (
    FIRST_SCALES,
    GRAD,
    OTHER,
    SECOND_SCALES,
    AddressTable,
    Rows,
    chunks,
    dense,
    fits,
)
from mpcompile.runtime.state_codes import BLOCK

# FP64 numbers of a group and of the rule, FP32 pairs of a parameter.
NUMBERS = 8
# How moments are held (`states_of`).
CODES = 2
# Programs of the first pass, a multiprocessor.
RESIDENT = 16


@functools.cache
def available(device: str) -> bool:
    """Whether Triton can run there: on CUDA, or (for tests) anywhere under its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


@dataclass(frozen=True)
class Shape:
    """How the kernels are cut: elements a program and warps of each pass; FP64 between load and store (`wide`).

    On an H200 1024 elements in FP32 take 0.946 ms for GPT-2 124M, 512 take 0.979, 1024 in FP64 1.092.
    """

    chunk: int = 1024
    warps: int = 4
    look_chunk: int = 4096
    look_warps: int = 8
    wide: bool = False


class Rule(NamedTuple):
    """A loss scale's rule, as numbers (see `mpcompile.training.loss_scale.scale.LossScale`); `off`: the loss is never scaled."""

    dynamic: bool = False
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    floor: float = 1.0
    cap: float = math.inf
    hysteresis: int = 1
    refill_always: bool = False
    off: bool = False


class Scale(NamedTuple):
    """A loss scale's state on the device, as `mpcompile.training.loss_scale.scale.ScaleState`, and the next backward's seed."""

    scale: Tensor
    growth_tracker: Tensor
    hysteresis_left: Tensor
    steps: Tensor
    skipped: Tensor
    floor_hits: Tensor
    seed: Tensor


class Result(NamedTuple):
    """finite: 0-dim bool; norm: 0-dim FP32, of the unscaled gradients before clipping; scale: 0-dim FP32, the next."""

    finite: Tensor
    norm: Tensor
    scale: Tensor


def adam_numbers(group: dict[str, Any], decoupled: bool) -> list[float]:
    """A group of Adam or AdamW as the kernels read it."""
    decay = float(group["weight_decay"])
    sign = -1.0 if group.get("maximize") else 1.0
    betas = [float(beta) for beta in group["betas"]]
    return [float(group["lr"]), *betas, float(group["eps"]), decay * decoupled, decay * (not decoupled), sign, 0.0]


def sgd_numbers(group: dict[str, Any]) -> list[float]:
    """A group of SGD as the kernels read it."""
    sign = -1.0 if group.get("maximize") else 1.0
    numbers = [float(group[key]) for key in ("lr", "momentum", "dampening", "nesterov", "weight_decay")]
    return [*numbers, sign, 0.0, 0.0]


def serves(rows: Rows, low: torch.dtype | None) -> bool:
    """True when the kernels can update these rows: FP32 in and out, laid out alike, one low type.

    Args:
      low: the low type of the shadows.
    """
    for cell, row, column in rows.cells():
        beside = not cell.dim() or column in (FIRST_SCALES, SECOND_SCALES)
        if cell.device != rows.masters[0].device or not (beside or fits(rows.masters[row], cell)):
            return False
    others = [*rows.counters, *rows.first_scales, *rows.second_scales]
    split = [lower is not None for lower in rows.lowers]
    masters = [torch.bfloat16 if halved else torch.float32 for halved in split]
    return (
        all(dense(master) for master in rows.masters)
        and all(t.dtype == torch.float32 for t in others if t is not None)
        and states_of(rows) >= 0
        and all(master.dtype == dtype for master, dtype in zip(rows.masters, masters, strict=True))
        and all(shadow is None or shadow.dtype == low for shadow in rows.shadows)
        and len({first is None for first in rows.firsts}) == 1
    )


def states_of(rows: Rows) -> int:
    """How moments are held: 0 FP32, 1 BF16, 2 codes; -1 where it is no one way."""
    firsts = {first.dtype for first in rows.firsts if first is not None}
    seconds = {second.dtype for second in rows.seconds if second is not None}
    ways = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.int8, torch.uint8)]
    return next((n for n, (first, second) in enumerate(ways) if firsts <= {first} and seconds <= {second}), -1)


class UpdateKernel:
    """One update, bound to the tensors that it writes.

    Args:
      rows: those tensors; every one is checked by address at each call and may move.
      parts: per parameter, the positions among the gradients that are summed.
      grads: examples of them (dtype and layout count); FP32 or of one low type.
      adam: Adam's arithmetic, else SGD's.
      groups: the numbers of each group (`adam_numbers`, `sgd_numbers`).
      low: the low type of shadows and gradients.
      max_norm: clip to this global norm.
      together: gives, of 0-dim tensors (whether a gradient here is not finite; the norm of those here), the same of all
        ranks among whom gradients are shared out, one element a rank.
      rule, scale, accumulate: the step's own loss scale, which the update moves; without it `found_inf` and
        `grad_scale` of a call are a GradScaler's.
    """

    def __init__(
        self,
        rows: Rows,
        parts: Sequence[Sequence[int]],
        grads: Sequence[Tensor],
        *,
        adam: bool,
        groups: Sequence[Sequence[float]],
        low: torch.dtype,
        max_norm: float | None = None,
        rule: Rule | None = None,
        scale: Scale | None = None,
        accumulate: int = 1,
        together: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        shape: Shape | None = None,
    ) -> None:
        self.rows, self.parts, self.adam, self.low, self.shape = rows, parts, adam, low, shape or Shape()
        self.device = rows.masters[0].device
        self.scale, self.rule, self.clips = scale, rule or Rule(), max_norm is not None
        self._together = together
        self._gather = _Gather.of(rows.masters, parts, grads)
        dtypes = {each.dtype for each in self._gather.like}
        if not dtypes <= {low, torch.float32}:
            raise ValueError(f"gradients are FP32 or {low}, not {dtypes}")
        if states_of(rows) == CODES and self.shape.chunk % BLOCK:
            raise ValueError(f"a chunk of {self.shape.chunk} is no number of blocks of {BLOCK}")
        if states_of(rows) and scale is None:
            raise ValueError("low moments are rounded by the count of steps in the loss scale's state")
        self._flags = _Flags(
            low if dtypes != {torch.float32} else torch.float32,
            len(dtypes) > 1,
            any(column == OTHER for _, column, _ in self._gather.places(low)),
            any(shadow is not None for shadow in rows.shadows),
            any(lower is not None for lower in rows.lowers),
            rows.firsts[0] is not None,
            states_of(rows),
        )
        self._table = AddressTable(rows, self._gather.places(low), self.device)
        counts = [master.numel() for master in rows.masters]
        self._chunks = chunks(counts, self.shape.chunk, self.device)
        self._looks = chunks(counts, self.shape.look_chunk, self.device)
        self._programs = max(1, min(len(self._looks[0]), RESIDENT * _multiprocessors(self.device)))
        fresh = functools.partial(torch.empty, device=self.device)
        self._partials = fresh(2 * self._programs, dtype=torch.float32)
        self._factors = torch.zeros(4, device=self.device)
        self._numbers = fresh(len(counts), 2 * NUMBERS, dtype=torch.float32)
        self._groups = torch.zeros(len(groups), NUMBERS, dtype=torch.float64, device=self.device)
        self._seen: list[list[float]] = []
        self.set_groups(groups)
        self._compile_for()
        self._rule = torch.tensor([*map(float, self.rule[:NUMBERS])], dtype=torch.float64, device=self.device)
        limits = [math.inf if max_norm is None else float(max_norm), 1.0 / accumulate]
        self._limits = torch.tensor(limits, dtype=torch.float64, device=self.device)

    def _compile_for(self) -> None:
        """What the kernels are compiled for, as they take it."""
        flags, shape = self._flags, self.shape
        self._read = {"LOW": _type(flags.low), "MIXED": flags.mixed, "TWO": flags.two}
        self._looked = {**self._read, "CHUNK": shape.look_chunk, "num_warps": shape.look_warps}
        self._moved = {**self._read, "SHADOWS": _type(self.low) if flags.shadows else None, "SPLIT": flags.split,
                       "ADAM": self.adam, "MOMENTUM": flags.momentum, "WIDE": shape.wide, "STATES": flags.states,
                       "CHUNK": shape.chunk, "num_warps": shape.warps}  # fmt: skip
        owned = self.scale is not None
        self._advance_options = {"LOOKED": self.clips or owned, "OWNED": owned, "ADAM": self.adam, "num_warps": 4}

    def prepare(self) -> None:
        """Call this now and then while nothing is captured: a capture needs pinned memory that lies ready."""
        self._table.fill_spare()

    def set_groups(self, groups: Sequence[Sequence[float]]) -> None:
        """Take in the groups' numbers; the device hears of it only when one changed. Not while a graph is captured."""
        now = [list(group) for group in groups]
        if now == self._seen:
            return
        # From a fresh pinned tensor: the copy then waits for nothing.
        staged = torch.tensor(now, dtype=torch.float64, pin_memory=self.device.type == "cuda")
        self._groups.copy_(staged, non_blocking=True)
        self._seen = now

    def __call__(
        self, grads: Sequence[Tensor], found_inf: Tensor | None = None, grad_scale: Tensor | None = None
    ) -> Result:
        """Update everything in place.

        Args:
          grads: as the examples were; still scaled.
          found_inf, grad_scale: 0-dim or of one element, FP32, where a GradScaler keeps the scale.
        """
        grads = self._gather(grads)
        with _on(self.device):
            table = self._table.now(grads)
            if self._advance_options["LOOKED"]:
                self._look(table)
            result = self._advance_scale(table, found_inf, grad_scale)
            self._move(table)
        return result

    def _look(self, table: Tensor) -> None:
        from mpcompile.runtime.kernels import update_triton

        update_triton.look[(self._programs,)](table, *self._looks, self._partials, len(self._looks[0]), **self._looked)

    def _advance_scale(self, table: Tensor, found_inf: Tensor | None, grad_scale: Tensor | None) -> Result:
        from mpcompile.runtime.kernels import update_triton

        finite = torch.empty((), dtype=torch.uint8, device=self.device)
        norm, after = torch.empty(2, device=self.device).unbind()
        unscale = grad_scale is not None or (self.scale is not None and not self.rule.off)
        update_triton.advance_scale[(1,)](
            *self._looked_at(), table, len(self.rows.masters), self._groups, self._numbers, self._rule,
            self._limits, self._factors, *(self.scale or (None,) * 7), found_inf, grad_scale, finite, norm, after,
            FOUND=found_inf is not None, UNSCALE=unscale, **self._advance_options,
        )  # fmt: skip
        return Result(finite.view(torch.bool), norm, after)

    def _looked_at(self) -> tuple[Tensor, int]:
        """What `look` found: (sums of squares, then as many times 0 or NaN; how many of each). Of all ranks, one of each."""
        if self._together is None:
            return self._partials, self._programs
        squares, broken = self._partials.view(2, -1).double().sum(1).unbind()
        others, norms = self._together(~broken.isfinite(), squares.sqrt())
        return torch.cat([norms * norms, others.masked_fill(others > 0, math.nan)]), len(norms)

    def _move(self, table: Tensor) -> None:
        from mpcompile.runtime.kernels import move_triton

        if len(self._chunks[0]):
            move_triton.move[(len(self._chunks[0]),)](table, *self._chunks, self._numbers, self._factors, **self._moved)


class _Flags(NamedTuple):
    """What the kernels are compiled for.

    Fields:
      low: the gradients' type, the low one where both are there (`mixed`); two: some parameter has two gradients.
      shadows, split, momentum: some row has a shadow, a lower half; all have a first moment.
      states: how moments are held: 0 FP32, 1 BF16, 2 codes.
    """

    low: torch.dtype
    mixed: bool
    two: bool
    shadows: bool
    split: bool
    momentum: bool
    states: int


class _Way(NamedTuple):
    """How a gradient reaches the kernels.

    Fields:
      row, column: its place in the table; positions: the gradients that it is the sum of.
      master: what it must lie as, where it does not (None: it is taken as it is).
    """

    row: int
    column: int
    positions: tuple[int, ...]
    master: Tensor | None
    like: Tensor

    def ready(self, grads: Sequence[Tensor]) -> Tensor:
        first, *more = (grads[i] for i in self.positions)
        if self.master is None:
            return first
        made = torch.empty_like(self.master, dtype=self.like.dtype, requires_grad=False).copy_(first)
        for each in more:
            made.add_(each)
        return made


@dataclass(frozen=True)
class _Gather:
    """The gradients as the kernels read them: as they are; copied where one lies otherwise than its master.

    Fields:
      strides: how the examples lay.
    """

    ways: list[_Way]
    order: list[int]
    strides: list[tuple[int, ...]]

    @classmethod
    def of(cls, masters: Sequence[Tensor], parts: Sequence[Sequence[int]], grads: Sequence[Tensor]) -> _Gather:
        ways = list[_Way]()
        for row, (master, part) in enumerate(zip(masters, parts, strict=True)):
            # Beyond two, the later ones are summed in FP32 before.
            for column, positions in zip((GRAD, OTHER), (part[:1], part[1:]), strict=True):
                if positions:
                    ways.append(_way(row, column, tuple(positions), master, grads))
        order = [] if any(way.master is not None for way in ways) else [way.positions[0] for way in ways]
        return cls(ways, order, list(map(Tensor.stride, grads)))

    @property
    def like(self) -> list[Tensor]:
        return [way.like for way in self.ways]

    def places(self, low: torch.dtype) -> list[tuple[int, int, bool]]:
        return [(way.row, way.column, way.like.dtype == low) for way in self.ways]

    def __call__(self, grads: Sequence[Tensor]) -> list[Tensor]:
        if list(map(Tensor.stride, grads)) != self.strides:
            # Op by op, a gradient may lie otherwise at one call than at another.
            grads = list(map(_laid, grads, self.strides))
        return [grads[i] for i in self.order] if self.order else [way.ready(grads) for way in self.ways]


def _laid(grad: Tensor, strides: tuple[int, ...]) -> Tensor:
    if grad.stride() == strides:
        return grad
    if 0 in strides:
        # An expanded example is copied in any case, from whatever there is.
        return grad
    return torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)


def _way(row: int, column: int, positions: tuple[int, ...], master: Tensor, grads: Sequence[Tensor]) -> _Way:
    first = grads[positions[0]]
    plain = len(positions) == 1 and fits(master, first)
    dtype = first.dtype if len(positions) == 1 else torch.float32
    return _Way(row, column, positions, None if plain else master, torch.empty((), dtype=dtype, device="meta"))


def _type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
