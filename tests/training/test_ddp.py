"""DistributedDataParallel around a wrapper, and a wrapper around it: two processes train as one does on the whole batch."""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from mpcompile import mpcompile

WIDTH, STEPS = 32, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


def train(rank: int, folder: str, outside: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Net()
    reference, x = copy.deepcopy(model), torch.randn(16, WIDTH)
    if outside:
        mp = mpcompile(model, "bf16", low=["*"])
        call: nn.Module = DistributedDataParallel(mp)
    else:
        call = mp = mpcompile(DistributedDataParallel(model), "bf16", low=["*"])
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for _ in range(STEPS):
            for one, module, batch in ((optimizer, call, x[rank * 8 : rank * 8 + 8]), (plain, reference, x)):
                module(batch).square().mean().backward()
                one.step()
                one.zero_grad()
    low = {n.precision for plan in mp.plans for n in plan.graph if n.kind == "matmul"}
    weights = [torch.zeros(WIDTH, WIDTH) for _ in range(2)]
    distributed.all_gather(weights, model.first.weight.detach())
    assert low == {"bf16"}
    assert torch.equal(*weights)
    torch.testing.assert_close(model.first.weight, reference.first.weight, rtol=0.01, atol=1e-3)
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("outside", [True, False])
def test_two_processes_train_as_one(outside: bool, tmp_path: os.PathLike[str]) -> None:
    multiprocessing.spawn(train, (os.fspath(tmp_path), outside), nprocs=2)
