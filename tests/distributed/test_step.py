"""The training step on two ranks: what one process makes of the whole batch, one decision, and ranks equal bit for bit."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import own_part, same_everywhere, together
from ranks_net import ONE, WIDTH, Net, alone, batches, loss_of, made
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from mpcompile import LossScale, mpcompile
from mpcompile.errors import TrainingError
from mpcompile.training.distributed import reduce


def run(step: Any, rank: int, microbatches: int) -> list[float]:
    norms = []
    for x, y in batches():
        parts = zip(own_part(x, rank).chunk(microbatches), own_part(y, rank).chunk(microbatches), strict=True)
        results = [step(a, b, ONE) for a, b in parts]
        assert [bool(r.stepped) for r in results] == [False] * (microbatches - 1) + [True]
        norms.append(float(results[-1].grad_norm))
    return norms


def equal_everywhere(model: nn.Module, optimizer: Any) -> bool:
    states = [t for state in optimizer.state.values() for t in state.values()]
    return all(map(same_everywhere, [*model.state_dict().values(), *states]))


def trains_as_one(rank: int, policy: str, how: str, microbatches: int, clip: float | None, **options: Any) -> Any:
    model, optimizer, step, _ = made(policy, how, accumulate=microbatches, max_grad_norm=clip, **options)
    plain, other, wanted = alone(model, microbatches, clip)
    norms = run(step, rank, microbatches)
    exact = policy == "fp32"
    start = made(policy, "group")[0]
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(wanted), rtol=1e-4 if exact else 0.03, atol=0)
    pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
    far, moved = (
        float(sum((p - q).square().sum() for p, q in zip(one.parameters(), plain.parameters(), strict=True))) ** 0.5
        for one in (model, start)
    )
    assert far <= (1e-4 if exact else 0.15) * moved
    for p, q in pairs if exact else ():
        if q.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(optimizer.state[p][key], other.state[q][key], rtol=1e-4, atol=1e-7)
    assert equal_everywhere(model, optimizer)
    return step


def sent(step: Any) -> list[tuple[str, list[torch.dtype], str]]:
    """(operation, dtypes, phase) of each collective of the emitted graph."""
    return [
        (str(node.target), [n.meta["val"].dtype for n in node.args[0]], node.meta["mp_phase"])
        for node in step.graph.graph.nodes
        if "all_reduce" in str(node.target)
    ]


def all_ways(rank: int) -> None:
    reduce.FIRST, reduce.BUCKET, reduce.SMALL = 1 << 10, 1 << 12, 1 << 9
    step = trains_as_one(rank, "fp32", "ddp", 1, None)
    assert len(sent(step)) >= 2
    assert {phase for *_, phase in sent(step)} == {"backward"}
    # Sent before the backward ends: gradients are made behind the first collective.
    order = [str(n.target) for n in step.graph.graph.nodes if n.meta.get("mp_phase") == "backward"]
    assert "aten.mm.default" in order[next(i for i, t in enumerate(order) if "all_reduce" in t) :]
    low = trains_as_one(rank, "bf16,reduce=low", "ddp", 2, None)
    assert "bf16" in {node["precision"] for node in low.report().to_dict()["nodes"] if node["kind"] == "matmul"}
    assert any("all_reduce" in node["op"] for node in low.report().to_dict()["nodes"])


def first_things(rank: int) -> None:
    """In one pair of processes: their start costs more than the work."""
    all_ways(rank)
    one_decision(rank)


def test_two_ranks_train_as_one_and_an_overflow_on_one_skips_the_step_on_all() -> None:
    together(first_things)


def other_ways(rank: int) -> None:
    reduce.FIRST, reduce.BUCKET, reduce.SMALL = 1 << 10, 1 << 12, 1 << 9
    trains_as_one(rank, "fp32", "group", 4, 0.1)
    step = trains_as_one(rank, "bf16", "mesh", 1, 0.1)
    assert {d for _, dtypes, _ in sent(step) for d in dtypes} == {torch.float32}
    low = trains_as_one(rank, "bf16,reduce=low", "group", 1, None)
    assert torch.bfloat16 in {d for _, dtypes, _ in sent(low) for d in dtypes}


@pytest.mark.slow
def test_two_ranks_train_as_one_in_windows_and_over_a_mesh() -> None:
    together(other_ways)


def one_decision(rank: int) -> None:
    for bad, microbatches in ((float("inf"), 1), (float("nan"), 2)):
        model, optimizer, step, _ = made(
            "fp16", "group", accumulate=microbatches, scale=LossScale.dynamic(init=2.0**10)
        )
        x, y = (own_part(t, rank) for t in batches()[0])
        for _ in range(microbatches):
            step(x, y, ONE)
        before, scale = copy.deepcopy(model.state_dict()), float(step.state.scale)
        moments = copy.deepcopy(optimizer.state_dict()["state"])
        for number in range(microbatches):
            factor = torch.tensor(bad if rank == 1 and number == 0 else 1.0)
            result = step(x, y, factor)
        assert not bool(result.stepped)
        assert float(result.scale) == scale / 2
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
        now = optimizer.state_dict()["state"]
        assert all(torch.equal(t, now[i][k]) for i, s in moments.items() for k, t in s.items())
        for _ in range(microbatches):
            assert bool(step(x, y, ONE).finite)
        assert equal_everywhere(model, optimizer)
    found = step.explain_overflow(x, y, torch.tensor(float("inf") if rank == 1 else 1.0))
    assert found is not None
    assert found.rank == 1
    assert str(found).startswith("rank 1: ")
    assert step.explain_overflow(x, y, ONE) is None
    one_logs(rank, step, x, y)
    calibrated_by_all(rank)


def one_logs(rank: int, step: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """The first rank alone logs, and explains an overflow without waiting for the other."""
    said = list[str]()
    writer = SimpleNamespace(scalar=lambda *_: None, text=lambda _, text, __: said.append(text))
    if rank == 0:
        step.log_to(writer, every=1)
    for _ in range(2):
        step(x, y, torch.tensor(float("inf")))
    assert len(said) == (1 if rank == 0 else 0)


def calibrated_by_all(rank: int) -> None:
    """What one rank's batches overflow in is FP32 on both."""
    _, _, step, _ = made("low=fp16,device=free-low", "group")
    x, y = (own_part(t, rank) for t in batches()[0])
    step(x, y, ONE)
    found = step.calibrate([(x, y, torch.tensor(1e6 if rank == 1 else 1.0))])
    assert found.batches == 2
    assert bool(step(x, y, ONE).finite)
    seen: list[Any] = [None, None]
    distributed.all_gather_object(seen, (found.to_dict(), [n["precision"] for n in step.report().to_dict()["nodes"]]))
    assert seen[0] == seen[1]


def statistics_and_copies(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpcompile(model, "bf16", low=["*"], backend="eager").train_step(
        optimizer, lambda m, x: (m(x) - x).square().mean(), process_group=distributed.group.WORLD
    )
    torch.manual_seed(rank)
    for _ in range(2):
        result = step(torch.randn(8, WIDTH))
    assert not same_everywhere(result.loss)
    assert equal_everywhere(model, optimizer)
    assert not torch.equal(model[1].running_mean, torch.zeros(WIDTH))
    twin = copy.deepcopy(step)
    assert bool(twin(torch.randn(8, WIDTH)).stepped)
    assert same_everywhere(twin.model[0].weight)
    with pytest.raises(TrainingError, match="MP512"):
        step.__reduce__()
    with pytest.raises(TrainingError, match="MP535"):
        step.export_onnx("nowhere.onnx")


def refusals(rank: int) -> None:
    statistics_and_copies(rank)
    x, y = (own_part(t, rank) for t in batches()[0])
    # Another weight on one rank.
    model, _, step, _ = made("fp32", "group")
    with torch.no_grad():
        model.up.weight[0, 0] += float(rank)
    with pytest.raises(TrainingError, match=r"MP546(.|\n)*up\.weight"):
        step(x, y, ONE)
    # Another learning rate.
    _, optimizer, step, _ = made("fp32", "group")
    optimizer.param_groups[0]["lr"] = 0.01 * (1 + rank)
    with pytest.raises(TrainingError, match=r"MP546(.|\n)*lr of group 0"):
        step(x, y, ONE)
    # Another moment.
    model, optimizer, step, _ = made("fp32", "group")
    made_state = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_of(model, *batches()[0], ONE).backward()
    made_state.step()
    made_state.zero_grad()
    saved = made_state.state_dict()
    if rank == 1:
        saved["state"][0]["exp_avg"][0, 0] += 1
    optimizer.load_state_dict(saved)
    with pytest.raises(TrainingError, match=r"MP546(.|\n)*exp_avg"):
        step(x, y, ONE)
    # A batch that reaches other parameters.
    heads = nn.ModuleList([nn.Linear(WIDTH, 1) for _ in range(2)])
    for head in heads:
        distributed.broadcast(head.weight.data, 0)
        distributed.broadcast(head.bias.data, 0)
    step = mpcompile(heads, "fp32", backend="eager").train_step(
        torch.optim.SGD(heads.parameters(), lr=0.1),
        lambda m, x, task: m[task](x).mean(),
        process_group=distributed.group.WORLD,
    )
    step(torch.ones(4, WIDTH), 0)
    with pytest.raises(TrainingError, match=r"MP546(.|\n)*\.bias"):
        step(torch.ones(4, WIDTH), 1)
    # Nobody said with whom.
    with pytest.raises(TrainingError, match="MP535"):
        made("fp32", "alone")
    with pytest.raises(TrainingError, match="MP541"):
        mpcompile(Net(), "fp32").train_step(
            torch.optim.SGD(Net().parameters(), lr=0.1), loss_of, process_group=distributed.group.WORLD,
            mesh=distributed.init_device_mesh("cpu", (2,)),
        )  # fmt: skip
    model = Net()
    with pytest.raises(TrainingError, match=r"MP547(.|\n)*2 dimensions"):
        mpcompile(model, "fp32").train_step(
            torch.optim.SGD(model.parameters(), lr=0.1), loss_of, mesh=distributed.init_device_mesh("cpu", (1, 2))
        )
    hooked = DistributedDataParallel(Net())
    hooked.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(TrainingError, match=r"MP535(.|\n)*communication hook"):
        mpcompile(hooked, "fp32").train_step(torch.optim.SGD(hooked.parameters(), lr=0.1), loss_of)
    part = nn.Sequential(DistributedDataParallel(nn.Linear(4, 4)), nn.Linear(4, 1))
    step = mpcompile(part, "fp32", backend="eager").train_step(
        torch.optim.SGD(part.parameters(), lr=0.1), lambda m, x: m(x).mean(), process_group=distributed.group.WORLD
    )
    with pytest.raises(TrainingError, match=r"MP535(.|\n)*reducer"):
        step(torch.ones(2, 4))
    own = distributed.new_group([0])
    if rank == 0:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        alone = mpcompile(model, "fp32", backend="eager").train_step(optimizer, loss_of, process_group=own)
        assert bool(alone(x, y, ONE).stepped)
    else:
        with pytest.raises(TrainingError, match="MP547"):
            mpcompile(model, "fp32").train_step(torch.optim.SGD(model.parameters(), lr=0.1), loss_of, process_group=own)


@pytest.mark.slow
def test_what_cannot_be_is_refused_by_name() -> None:
    together(refusals)


def compiled(rank: int) -> None:
    reduce.FIRST, reduce.BUCKET, reduce.SMALL = 1 << 10, 1 << 12, 1 << 9
    trains_as_one(rank, "fp32", "ddp", 1, 0.1, backend="inductor")
    trains_as_one(rank, "bf16,reduce=low", "group", 2, None, backend="inductor")
    trains_as_one(rank, "bf16", "group", 1, None, backend="inductor")


@pytest.mark.slow
def test_two_compiled_ranks_train_as_one() -> None:
    together(compiled)


def four(rank: int) -> None:
    trains_as_one(rank, "fp32", "group", 1, 0.1)


@pytest.mark.slow
def test_four_ranks_train_as_one() -> None:
    together(four, size=4)
