"""Weights in shares too: what one process makes of the whole batch, and nothing whole on a rank between the calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import own_part, same_everywhere, together
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
from mpcompile.training.distributed.gathered_weights import prefetch

_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
_WAIT = torch.ops._c10d_functional.wait_tensor.default


def first_things(rank: int) -> None:
    small_buckets()
    step, model, _ = trains_as_one(rank, "fp32", "ddp", 1, None, "full")
    step, model, _ = trains_as_one(rank, "bf16,reduce=low", "group", 2, 0.1, "full")
    holds_a_share_alone(step, model)


def test_two_ranks_with_shares_of_weights_train_as_one() -> None:
    together(first_things)


def holds_a_share_alone(step: Any, model: nn.Module) -> None:
    """Of weights, masters, moments and sums a rank holds its half, and padding."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shares = step.context.shares
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (
        *model.parameters(), *step.context.shadows.shadows, *shares.named.values(), *shares.written(),
        *step.accumulator.sums.values(), *(t for s in step.optimizer.state.values() for t in s.values()),
    )}  # fmt: skip
    frozen = sum(p.numel() * 4 for p in model.parameters() if not p.requires_grad)
    # Low weights, FP32 masters, sums and two moments.
    assert sum(held.values()) <= (2 + 4 + 4 + 8) * trained * 0.6 + frozen * 1.5 + 256
    assert model.up.weight.isnan().all()
    with step.full_masters():
        assert model.up.weight.dtype == torch.float32
        assert not torch.equal(model.up.weight, model.up.weight.bfloat16().float())


def compiled(rank: int) -> None:
    """Under Inductor nothing whole is kept for the backward: what was gathered is gathered again."""
    small_buckets()
    step, model, _ = trains_as_one(rank, "bf16", "group", 1, None, "full", backend="inductor")
    _, _, other, _ = made("bf16", "group", shard="update", backend="inductor")
    x, y = (own_part(t, rank) for t in batches()[0])
    other(x, y, ONE)
    assert step.saved_bytes <= other.saved_bytes
    # Another batch size: its graph is made of weights that no rank has whole.
    assert bool(step(x[:2], y[:2], ONE).stepped)
    assert bool(step(x, y, ONE).stepped)
    assert all(map(same_everywhere, model.state_dict().values()))
    says_where(step, x, y, rank)


def says_where(step: Any, x: torch.Tensor, y: torch.Tensor, rank: int) -> None:
    before = {name: held.clone() for name, held in step.model.state_dict().items()}
    found = step.explain_overflow(x, y, torch.tensor(float("inf") if rank else 1.0))
    assert found.rank == 1
    assert all(torch.equal(held, before[name]) for name, held in step.model.state_dict().items())


@pytest.mark.slow
def test_what_is_gathered_is_not_kept() -> None:
    together(compiled)


def second_things(rank: int) -> None:
    small_buckets()
    one_decision(rank, "full")
    goes_on_as_it_was(rank, "full")
    running_the_graph_is_a_step(rank, "full")
    refusals(rank)


@pytest.mark.slow
def test_shares_of_weights_are_one_decision_and_are_saved() -> None:
    together(second_things)


def refusals(rank: int) -> None:
    x, y = (own_part(t, rank) for t in batches()[0])
    model, optimizer, step, mp = made("bf16", "group", shard="full")
    step(x, y, ONE)
    for call in (lambda: mp(x, ONE), mp.refresh, optimizer.step):
        with pytest.raises(TrainingError, match="MP549"):
            call()
    with step.full_masters():
        assert mp(x, ONE).isfinite().all()
        with torch.no_grad():
            model.up.weight.zero_()
    step(x, y, ONE)
    with step.full_masters():
        assert float(model.up.weight.abs().max()) <= 0.011  # zero, and one update of 0.01
    # An edit from outside of what is not there.
    with pytest.raises(RuntimeError):
        model.up.weight.data.mul_(2)
    model.up.weight.data = torch.zeros_like(model.up.weight)
    with pytest.raises(TrainingError, match=r"MP549(.|\n)*up\.weight"):
        step(x, y, ONE)
    net = Renormed()
    step = mpcompile(net, "fp32", backend="eager").train_step(
        torch.optim.SGD(net.parameters(), lr=0.1), loss_of, process_group=distributed.group.WORLD, shard="full"
    )
    with pytest.raises(TrainingError, match=r"MP549(.|\n)*writes to"):
        step(x, y, ONE)


class Renormed(Net):
    """Its forward writes to a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16, max_norm=1.0)


def four(rank: int) -> None:
    small_buckets()
    trains_as_one(rank, "fp32", "group", 1, 0.1, "full")
    trains_as_one(rank, "bf16,reduce=low", "group", 2, 0.1, "full")


@pytest.mark.slow
def test_four_ranks_with_shares_of_weights_train_as_one() -> None:
    together(four, size=4)


def every_optimizer(rank: int) -> None:
    others(rank, "full")


@pytest.mark.slow
def test_every_optimizer_that_goes_by_element_has_shares_of_weights() -> None:
    together(every_optimizer)


def test_a_gathering_begins_two_buckets_ahead() -> None:
    graph = torch.fx.Graph()
    shares = [graph.placeholder(f"share_{i}") for i in range(4)]
    for share in shares:
        sent = graph.call_function(_GATHER, (share, 2, "group"))
        graph.call_function(torch.ops.aten.relu.default, (graph.call_function(_WAIT, (sent,)),))
    graph.output(())
    module = torch.fx.GraphModule({}, graph)
    prefetch(module)
    graph.lint()
    order = [{_GATHER: "g", _WAIT: "w"}.get(n.target, "r") for n in graph.nodes if n.op == "call_function"]
    assert "".join(order) == "gggwrgwrwrwr"
