"""Sharded parameters on two processes: FSDP2 trains as one process does; tensor parallelism and FSDP1 are refused by code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import own_part, same_everywhere, together
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from mpcompile import mpcompile
from mpcompile.errors import CaptureError
from mpcompile.shadows.table import SHADOWS

WIDTH, STEPS = 32, 4
LOW_GATHERS = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def sharded(model: Any, mesh: Any, **options: Any) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def step(call: Any, optimizer: Any, x: torch.Tensor) -> float:
    loss = call(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def train(rank: int, policy: str, mesh: Any, *, first: bool, backend: str = "eager", **options: Any) -> Any:
    """Beside one process in FP32; `first` wraps before the model is sharded."""
    model, plain = net(), net()
    mp = mpcompile(model, policy, low=["*"] if policy == "bf16" else (), backend=backend) if first else None
    sharded(model, mesh, **options)
    mp = mp or mpcompile(model, policy, low=["*"] if policy == "bf16" else (), backend=backend)
    before = SHADOWS.casts
    one, two = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, plain))
    torch.manual_seed(1)
    mine, wanted = [], []
    for _ in range(STEPS):
        x = torch.randn(8, WIDTH)
        wanted.append(step(plain, two, x))
        mine.append(torch.tensor(step(mp, one, own_part(x, rank))))
        torch.distributed.all_reduce(mine[-1])
    assert SHADOWS.casts == before
    exact = policy == "fp32" and "mp_policy" not in options
    torch.testing.assert_close(
        torch.stack(mine) / mesh.size(), torch.tensor(wanted), rtol=1e-5 if exact else 0.02, atol=1e-6
    )
    low = {n.precision for plan in mp.plans for n in plan.graph if n.kind == "matmul"}
    assert low == ({"bf16"} if policy == "bf16" else {"fp32"})
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        whole = p.full_tensor()
        assert p.dtype == torch.float32
        assert same_everywhere(whole)
        torch.testing.assert_close(whole, q, rtol=1e-4 if exact else 0.05, atol=1e-6 if exact else 0.01)
    return mp


def gathered(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    train(rank, "fp32", mesh, first=False)
    train(rank, "bf16", mesh, first=True, reshard_after_forward=False)
    mp = train(rank, "bf16", mesh, first=False, mp_policy=LOW_GATHERS)
    casts = [n for plan in mp.plans for n in plan.graph.casts() if plan.graph.values[n.inputs[0]].role == "parameter"]
    # Norms read their weights in FP32; no matrix is cast.
    assert all("norm" in n.inputs[0] or "bias" in n.inputs[0] for n in casts), casts
    optimizer, group = torch.optim.SGD(mp.model.parameters(), lr=0.1), torch.distributed.group.WORLD
    whole = mp.train_step(optimizer, lambda m, x: m(x).mean(), process_group=group)
    with pytest.raises(CaptureError, match="MP107"):
        whole(torch.ones(2, WIDTH))


def gathered_or_refused(rank: int) -> None:
    """In one pair of processes: their start costs more than the work."""
    gathered(rank)
    refuse_all(rank)


def test_fsdp2_trains_as_one_process_and_other_shards_are_refused() -> None:
    together(gathered_or_refused)


def compiled(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for options in ({}, {"mp_policy": LOW_GATHERS}):
        train(rank, "bf16", mesh, first=False, backend="inductor", **options)


@pytest.mark.slow
def test_fsdp2_trains_compiled() -> None:
    together(compiled)


def hybrid(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    train(rank, "fp32", mesh, first=False)
    train(rank, "bf16", mesh, first=True)


@pytest.mark.slow
def test_hybrid_sharding_over_four_processes() -> None:
    together(hybrid, size=4)


def columns(model: Any, mesh: Any) -> None:
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})


def refuse_all(rank: int) -> None:
    mesh, x = init_device_mesh("cpu", (2,)), torch.randn(4, WIDTH)
    one = net()
    one.head.weight = nn.Parameter(DTensor.from_local(one.head.weight.detach(), mesh, [Replicate()]))
    with pytest.raises(CaptureError, match=r"MP107(.|\n)*head\.weight"):
        mpcompile(one, "bf16", backend="eager")
    parallel = net()
    columns(parallel, mesh)
    with pytest.raises(CaptureError, match="MP107"):
        mpcompile(parallel, "bf16", backend="eager")
    model = net()
    fresh, used = (mpcompile(model, "bf16", backend="eager", low=["*"]) for _ in range(2))
    used(x)
    columns(model, mesh)
    for mp in (fresh, used):
        with pytest.raises(CaptureError, match="MP107"):
            mp(x)
    with pytest.raises(CaptureError, match="MP107"):
        mpcompile(FullyShardedDataParallel(copy.deepcopy(net()), device_id=torch.device("cpu")), "bf16")
