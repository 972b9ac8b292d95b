"""Factories as users write them, good and bad."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 256)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(256, 32)

    def forward(self, tokens: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return torch.exp(self.head(x) * scale)


def make() -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return Net(), (torch.zeros(64, 32, dtype=torch.int64),)


def make_with_keywords() -> tuple[nn.Module, tuple[torch.Tensor], dict[str, float]]:
    return (*make(), {"scale": 0.5})


def number() -> int:
    return 3


def wrong_parts() -> tuple[str, int]:
    return "model", 3


def fails() -> None:
    raise KeyError("no weights here")


def make_too_short() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return nn.Linear(8, 8), (torch.zeros(2, 7),)


def make_index_beyond() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Net(), (torch.full((4, 4), 32),)


def make_bad_keyword() -> tuple[nn.Module, tuple[torch.Tensor], dict[str, float]]:
    return (*make(), {"scael": 0.5})


def make_int_input() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return nn.Linear(8, 8), (torch.zeros(2, 8, dtype=torch.int64),)


class Statistics(nn.BatchNorm1d):
    """It writes to its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.add_(1))


def make_with_statistics() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Statistics(4), (torch.ones(2, 4),)
