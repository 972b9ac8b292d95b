"""Two GPUs by NCCL: the step and the drop-in train as one GPU does on the whole batch, and ranks stay equal bit for bit."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from mpcompile import LossScale, mpcompile
from mpcompile.tools.bench_by_hand import GPT2

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
BATCH, TOKENS, STEPS = 8, 128, 8


def enter(rank: int, folder: str, work: Any, args: tuple[Any, ...]) -> None:
    torch.cuda.set_device(rank)
    distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        work(rank, *args)
    finally:
        distributed.destroy_process_group()


def model_and_data() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    # Some 20 MB of gradients a block: more than three buckets.
    model = GPT2(4096, TOKENS, 640, 10, 4).cuda()
    return model, *(torch.randint(0, 4096, (BATCH, TOKENS), device="cuda") for _ in range(2))


def same_everywhere(tensor: torch.Tensor) -> bool:
    held = tensor.detach().contiguous()
    found = [torch.empty_like(held) for _ in range(2)]
    distributed.all_gather(found, held)
    return torch.equal(*found)


def losses_alone(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Of a rank that trains by itself on the whole batch: a group of one, which all ranks make."""
    own = [distributed.new_group([rank]) for rank in range(2)][distributed.get_rank()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = mpcompile(model, "bf16").train_step(optimizer, process_group=own)
    return [float(step(x, y).loss) for _ in range(STEPS)]


def average(loss: torch.Tensor) -> float:
    loss = loss.detach().clone()
    distributed.all_reduce(loss)
    return float(loss) / 2


def whole_step(rank: int, policy: str, cuda_graph: bool, shard: str = "none") -> None:
    model, x, y = model_and_data()
    wanted = losses_alone(copy.deepcopy(model), x, y)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = mpcompile(model, policy).train_step(
        optimizer, process_group=distributed.group.WORLD, cuda_graph=cuda_graph, max_grad_norm=1e3, shard=shard
    )
    mine = x.chunk(2)[rank], y.chunk(2)[rank]
    found = [average(step(*mine).loss) for _ in range(STEPS)]
    assert found == pytest.approx(wanted, rel=0.02)
    saved = optimizer.state_dict()["state"]
    states = [t for state in saved.values() for t in state.values() if t.is_cuda]
    assert all(map(same_everywhere, [*model.state_dict().values(), *states]))
    sent = [
        n for n in step.graph.graph.nodes if ("all_reduce" if shard == "none" else "reduce_scatter") in str(n.target)
    ]
    assert len(sent) >= 3
    if shard == "update":
        held_in_shares(step, model, saved)


def held_in_shares(step: Any, model: nn.Module, saved: dict[int, Any]) -> None:
    """The kernels update this rank's pieces; what is held of masters and moments is half; all is had again, and goes on."""
    assert "KernelUpdate" in {type(one.inside).__name__ for one in step.updates}
    total = sum(p.numel() for p in model.parameters())
    held = sum(s["exp_avg"].numel() for s in step.optimizer.state.values())
    assert held <= 0.51 * total
    assert all(s["exp_avg"].shape == p.shape for s, p in zip(saved.values(), model.parameters(), strict=True))
    assert torch.bfloat16 in {p.dtype for p in model.parameters()}
    with step.full_masters():
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("policy", ["bf16", "bf16,reduce=low"])
def test_two_gpus_train_as_one(policy: str, cuda_graph: bool, tmp_path: os.PathLike[str]) -> None:
    multiprocessing.spawn(enter, (os.fspath(tmp_path), whole_step, (policy, cuda_graph)), nprocs=2)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_two_gpus_with_shares_train_as_one(cuda_graph: bool, tmp_path: os.PathLike[str]) -> None:
    given = ("bf16,reduce=low", cuda_graph, "update")
    multiprocessing.spawn(enter, (os.fspath(tmp_path), whole_step, given), nprocs=2)


class Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return (self.inside(x) * factor).square().mean()


def skipped(rank: int, shard: str) -> None:
    torch.manual_seed(0)
    model = Times().cuda()
    step = mpcompile(model, "fp16", low=["*"]).train_step(
        torch.optim.AdamW(model.parameters()),
        process_group=distributed.group.WORLD,
        scale=LossScale.dynamic(init=1024.0),
        shard=shard,
    )
    x, one = torch.randn(64, 256, device="cuda"), torch.ones((), device="cuda")
    for _ in range(5):  # replayed by then
        assert bool(step(x, one).stepped)
    before = model.state_dict()["inside.weight"].clone()
    result = step(x, one * (float("nan") if rank == 1 else 1.0))
    assert not bool(result.stepped)
    assert float(result.scale) == 512.0
    assert torch.equal(before, model.state_dict()["inside.weight"])
    assert bool(step(x, one).stepped)
    assert same_everywhere(model.inside.weight)


@pytest.mark.parametrize("shard", ["none", "update"])
def test_a_nan_on_one_gpu_skips_the_step_on_both(shard: str, tmp_path: os.PathLike[str]) -> None:
    multiprocessing.spawn(enter, (os.fspath(tmp_path), skipped, (shard,)), nprocs=2)


def drop_in(rank: int, outside: bool) -> None:
    model, x, y = model_and_data()
    wanted = losses_alone(copy.deepcopy(model), x, y)
    call: Any = (
        DistributedDataParallel(mpcompile(model, "bf16"), gradient_as_bucket_view=True)
        if outside
        else mpcompile(DistributedDataParallel(model, static_graph=True), "bf16")
    )
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), []
    for _ in range(STEPS):
        loss = call(x.chunk(2)[rank], y.chunk(2)[rank])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(average(loss))
    assert found == pytest.approx(wanted, rel=0.02)
    assert all(map(same_everywhere, model.parameters()))


@pytest.mark.parametrize("outside", [True, False])
def test_ddp_over_two_gpus(outside: bool, tmp_path: os.PathLike[str]) -> None:
    multiprocessing.spawn(enter, (os.fspath(tmp_path), drop_in, (outside,)), nprocs=2)
