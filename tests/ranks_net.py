"""A small net, its batches, and what torch alone makes of them: for tests of the step among ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mpcompile import mpcompile

WORDS, WIDTH, STEPS = 32, 16, 4


class Net(nn.Module):
    """A table that is the output's weight too, and a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight
        self.up.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        x = self.table(x) * factor
        return self.head(x + self.down(torch.relu(self.up(x))))


def loss_of(model: Any, x: torch.Tensor, y: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x, factor).flatten(0, 1), y.flatten())


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randint(0, WORDS, (8, 8)), torch.randint(0, WORDS, (8, 8))) for _ in range(STEPS)]


ONE = torch.ones(())


def made(policy: str, how: str, backend: str = "eager", **options: Any) -> tuple[nn.Module, Any, Any, Any]:
    """(model, its optimizer, the step of all ranks, the wrapper); `how` the ranks are named."""
    torch.manual_seed(0)
    model = Net()
    given: Any = DistributedDataParallel(model) if how == "ddp" else model
    mesh = distributed.init_device_mesh("cpu", (2,)) if how == "mesh" else None
    low = ["*"] if "fp32" not in policy.split(",")[0] else ()
    mp = mpcompile(given, policy, low=low, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    group = distributed.group.WORLD if how == "group" else None
    return model, optimizer, mp.train_step(optimizer, loss_of, process_group=group, mesh=mesh, **options), mp


def alone(model: nn.Module, microbatches: int, clip: float | None) -> tuple[nn.Module, Any, list[float]]:
    """What torch alone makes of the whole batches in FP32: (model, optimizer, norms)."""
    plain = copy.deepcopy(model)
    optimizer, norms = torch.optim.AdamW(plain.parameters(), lr=0.01), []
    for x, y in batches():
        loss_of(plain, x, y, ONE).backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), clip or 1e9)))
        optimizer.step()
        optimizer.zero_grad()
    return plain, optimizer, norms
