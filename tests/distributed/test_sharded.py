"""Sharded parameters (FSDP2, FSDP1, tensor parallelism) on two processes: refused by code, before and after wrapping."""

from __future__ import annotations

import os

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from mpcompile import mpcompile
from mpcompile.errors import CaptureError, MPCompileError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


def layers_and_root(model: nn.Sequential, mesh: object) -> None:
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def one_layer(model: nn.Sequential, mesh: object) -> None:
    fully_shard(model[2], mesh=mesh)


def columns(model: nn.Sequential, mesh: object) -> None:
    parallelize_module(model, mesh, {"0": ColwiseParallel(output_layouts=Replicate())})


WAYS = {way.__name__: way for way in (columns, layers_and_root, one_layer)}


def refuse_all(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh, x = init_device_mesh("cpu", (2,)), torch.randn(4, 32)
    one = net()
    one[0].weight = nn.Parameter(DTensor.from_local(one[0].weight.detach(), mesh, [Replicate()]))
    with pytest.raises(CaptureError, match=r"MP107(.|\n)*0\.weight"):
        mpcompile(one, "bf16", backend="eager")
    for name, way in WAYS.items():
        sharded = net()
        way(sharded, mesh)
        with pytest.raises(CaptureError, match="MP107"):
            mpcompile(sharded, "bf16", backend="eager")
        model = net()
        fresh, used = (mpcompile(model, "bf16", backend="eager", low=["*"]) for _ in range(2))
        used(x)
        way(model, mesh)
        for mp in (fresh, used):
            with pytest.raises(CaptureError, match="MP107"):
                mp(x)
        # The step refuses a group of several ranks before it looks at what it is given.
        with pytest.raises(MPCompileError, match="MP535"):
            used.train_step(torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x).square().mean())
        print(name, "refused", flush=True)
    distributed.destroy_process_group()


def test_sharded_parameters_are_refused(tmp_path: os.PathLike[str]) -> None:
    multiprocessing.spawn(refuse_all, (os.fspath(tmp_path),), nprocs=2)
