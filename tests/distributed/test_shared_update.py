"""The update in shares: what one process makes of the whole batch, held in parts, and saved as one process saves it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from ranks import own_part, together
from ranks_net import ONE, Net, batches, loss_of, made
from ranks_shares import (
    goes_on_as_it_was,
    one_decision,
    others,
    running_the_graph_is_a_step,
    small_buckets,
    trains_as_one,
)
from torch import distributed, nn

from mpcompile import mpcompile
from mpcompile.errors import TrainingError


def first_things(rank: int) -> None:
    small_buckets()
    trains_as_one(rank, "fp32", "ddp", 1, None)
    trains_as_one(rank, "bf16,reduce=low", "group", 1, 0.1)


def test_two_ranks_with_shares_train_as_one() -> None:
    together(first_things)


def other_ways(rank: int) -> None:
    small_buckets()
    step, *_ = trains_as_one(rank, "fp32", "group", 2, 0.1)
    assert {"reduce_scatter", "all_gather"} <= collectives(step)
    trains_as_one(rank, "bf16", "mesh", 2, None)
    step, model, _ = trains_as_one(rank, "low=bf16,reduce=low", "group", 1, None)
    report = step.report().to_dict()["nodes"]
    assert {"backward", "optimizer"} <= {node["phase"] for node in report if "c10d" in node["op"]}
    held_in_shares(step, model)
    running_the_graph_is_a_step(rank)


def collectives(step: Any) -> set[str]:
    names = " ".join(str(node.target) for node in step.graph.graph.nodes)
    return {name for name in ("reduce_scatter", "all_gather", "all_reduce") if name in names}


def held_in_shares(step: Any, model: nn.Module) -> None:
    """FP32 of a low weight, and moments, are held for this rank's share."""
    shares = step.context.shares
    assert model.up.weight.dtype == torch.bfloat16
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = [t for s in step.optimizer.state.values() for k, t in s.items() if k == "exp_avg"]
    assert sum(t.numel() for t in moments) <= 0.6 * total
    assert sum(shares.named[p.name].numel() for p in shares.layout.pieces) <= 0.6 * total
    with step.full_masters():
        assert model.up.weight.dtype == torch.float32
        assert not torch.equal(model.up.weight, model.up.weight.bfloat16().float())


@pytest.mark.slow
def test_shares_in_windows_over_a_mesh_and_in_the_emitted_graph() -> None:
    together(other_ways)


def second_things(rank: int) -> None:
    one_decision(rank)
    goes_on_as_it_was(rank)
    refusals(rank)


@pytest.mark.slow
def test_shares_are_one_decision_are_saved_and_say_what_they_cannot() -> None:
    together(second_things)


def refusals(rank: int) -> None:
    x, y = (own_part(t, rank) for t in batches()[0])
    model, optimizer, step, mp = made("bf16", "group", shard="update")
    step(x, y, ONE)
    with pytest.raises(TrainingError, match=r"MP549(.|\n)*optimizer\.step"):
        optimizer.step()
    with torch.no_grad():
        model.up.weight.mul_(2)
    with pytest.raises(TrainingError, match=r"MP549(.|\n)*up\.weight"):
        step(x, y, ONE)
    with pytest.raises(TrainingError, match="MP541"):
        mp.train_step(optimizer, loss_of, process_group=distributed.group.WORLD, shard="update", masters="split")
    with pytest.raises(TrainingError, match="MP541"):
        mp.train_step(optimizer, loss_of, process_group=distributed.group.WORLD, shard="all")
    with pytest.raises(TrainingError, match="MP541"):
        mp.train_step(optimizer, loss_of, shard="update")
    net = Net()
    with pytest.raises(TrainingError, match=r"MP549(.|\n)*Adafactor"):
        mpcompile(net, "fp32").train_step(
            torch.optim.Adafactor(net.parameters()), loss_of, process_group=distributed.group.WORLD, shard="update"
        )
    # One rank alone asks for a state dict.
    model, optimizer, step, mp = made("bf16", "group", shard="update")
    step(x, y, ONE)
    step._meeting.patience = timedelta(seconds=3)
    if rank == 0:
        with pytest.raises(TrainingError, match=r"MP548(.|\n)*model\.state_dict"):
            model.state_dict()
    distributed.barrier()


def four(rank: int) -> None:
    small_buckets()
    trains_as_one(rank, "fp32", "group", 1, 0.1)
    trains_as_one(rank, "bf16,reduce=low", "group", 2, 0.1)


@pytest.mark.slow
def test_four_ranks_with_shares_train_as_one() -> None:
    together(four, size=4)


@pytest.mark.slow
def test_every_optimizer_that_goes_by_element_is_shared_out() -> None:
    together(others)
