"""FP8 on two ranks: the replicated step and the drop-in under DDP train as one process with FP8 does."""

from __future__ import annotations

from typing import Any

import torch
from ranks import own_part, same_everywhere, together
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mpcompile import mpcompile

WIDTH, STEPS = 64, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x), y)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(64, WIDTH), torch.randint(0, 8, (64,))) for _ in range(STEPS)]


def wrapped(model: nn.Module) -> Any:
    return mpcompile(model, "bf16", fp8=["*blocks*"], backend="eager")


def loop(call: Any, model: nn.Module, rank: int | None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for x, y in batches():
        x, y = (x, y) if rank is None else (own_part(x, rank), own_part(y, rank))
        call(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()


def near(model: nn.Module, other: nn.Module, start: nn.Module) -> None:
    """As far as two ranks' scales, each of its own part, let them be."""
    far, moved = (
        sum(float((p - q).detach().square().sum()) for p, q in zip(one.parameters(), other.parameters(), strict=True))
        ** 0.5
        for one in (model, start)
    )
    assert far <= 0.1 * moved, (far, moved)


def read(mp: Any) -> set[str]:
    return {node.module for plan in mp.plans for node in plan.graph if node.fp8}


def everything(rank: int) -> None:
    one = net()
    loop(wrapped(one), one, None)
    model = net()
    mp = wrapped(model)
    step = mp.train_step(torch.optim.SGD(model.parameters(), lr=0.2), process_group=distributed.group.WORLD)
    for x, y in batches():
        assert step(own_part(x, rank), own_part(y, rank)).stepped.item()
    assert len(step.context.copies) == 2
    near(model, one, net())
    assert all(map(same_everywhere, [*model.parameters(), *(c.float() for c in step.context.copies.tensors())]))

    model = net()
    parallel = DistributedDataParallel(model)
    mp = wrapped(parallel)
    loop(mp, model, rank)
    assert len(read(mp)) == 2
    near(model, one, net())
    assert all(map(same_everywhere, model.parameters()))


def test_two_ranks_read_fp8_as_one_does() -> None:
    together(everything)
