"""The table of cases: a builder gives a small model, a maker of batches and a loss; one builder may stand for several cases."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# (what the model reads, what the loss reads beside the model's output)
Batch = tuple[tuple[Any, ...], tuple[Any, ...]]
Built = tuple[nn.Module, Callable[[], Batch], Callable[..., Tensor]]

# What a case may stand for.
STATE = "a state that is integrated"
RAW = "a norm of a raw input"
SUM = "a returned sum with the input"
AREA = "a box's width times its height"
HAND = "distances by hand"
COORDINATES = "pixel coordinates and a flow"
SHRINK = "differences of parameters"
IDS = "integer ids scaled by a parameter"
TABLE = "an indexed table"
LARGE = "raw inputs of 1e5"
MASK = "an additive mask of -1e9"
BUFFER = "a buffer of 70,000"
DEIT = "DeiT in FP16"
ROWS = (STATE, RAW, SUM, AREA, HAND, COORDINATES, SHRINK, IDS, TABLE, LARGE, MASK, BUFFER, DEIT)


@dataclass(frozen=True)
class Case:
    """One model of the suite.

    Fields:
      name: "domain/builder" or "domain/builder[variant]".
      build: makes the model, a maker of batches and the loss; called under a seed of the case's own.
      row: the kind of loss that it stands for, where it stands for one (see `ROWS`).
      scale: the loss scale in FP16, for both sides.
      lows: the low types that it is for.
      draw: number of the weights and the batch that are drawn for it.
    """

    name: str
    build: Callable[[], Built]
    row: str = ""
    scale: float = 1024.0
    lows: tuple[str, ...] = ("bf16", "fp16")
    draw: int = 0

    @property
    def domain(self) -> str:
        return self.name.partition("/")[0]

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode()) + 100_003 * self.draw

    def make(self) -> tuple[nn.Module, Batch, Callable[..., Tensor]]:
        """The model, one batch, and the loss: the same ones at every call."""
        torch.manual_seed(self.seed)
        model, batch, loss = self.build()
        torch.manual_seed(self.seed + 1)
        return model, batch(), loss


CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Domain:
    """Registers the builders of one file under one domain."""

    name: str

    def __call__(
        self, *variants: Any, row: str = "", scale: float = 1024.0, lows: tuple[str, ...] = ("bf16", "fp16")
    ) -> Callable[[Callable[..., Built]], Callable[..., Built]]:
        """A case, or one per variant: the builder is called with it (a tuple is spread, a mapping's values are named)."""

        def register(builder: Callable[..., Built]) -> Callable[..., Built]:
            for label, args in _calls(variants):
                name = f"{self.name}/{builder.__name__}{label}"
                assert name not in CASES, name
                CASES[name] = Case(name, lambda args=args: builder(*args), row, scale, lows)
            return builder

        return register


def _calls(variants: tuple[Any, ...]) -> list[tuple[str, tuple[Any, ...]]]:
    if not variants:
        return [("", ())]
    found = []
    for one in variants:
        args = one if isinstance(one, tuple) else (one,)
        found.append((f"[{'-'.join(getattr(a, '__name__', str(a)) for a in args)}]", args))
    return found


class Net(nn.Module):
    """Submodules and parameters by name, and a forward as a function of them: a model in a line or two."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self._function(self, *args)


def mse(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])
