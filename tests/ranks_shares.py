"""What a step in shares must do, whichever it is that ranks hold shares of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from ranks import own_part, same_everywhere
from ranks_net import ONE, Net, alone, batches, loss_of, made
from torch import distributed, nn

from mpcompile import LossScale, mpcompile
from mpcompile.training.distributed import reduce


def small_buckets() -> None:
    reduce.FIRST, reduce.BUCKET, reduce.SMALL = 1 << 10, 1 << 12, 1 << 9


def trains_as_one(
    rank: int, policy: str, how: str, microbatches: int, clip: float | None, shard: str = "update", **options: Any
) -> Any:
    model, optimizer, step, _ = made(policy, how, accumulate=microbatches, max_grad_norm=clip, shard=shard, **options)
    start = copy.deepcopy(model.state_dict())
    plain, other, wanted = alone(model, microbatches, clip)
    norms = []
    for x, y in batches():
        parts = zip(own_part(x, rank).chunk(microbatches), own_part(y, rank).chunk(microbatches), strict=True)
        results = [step(a, b, ONE) for a, b in parts]
        assert [bool(r.stepped) for r in results] == [False] * (microbatches - 1) + [True]
        norms.append(float(results[-1].grad_norm))
    exact = policy == "fp32"
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(wanted), rtol=1e-4 if exact else 0.03, atol=0)
    now, want = model.state_dict(), plain.state_dict()
    assert list(now) == list(want)
    assert all(value.dtype == torch.float32 for value in now.values())
    far = float(sum((now[k] - want[k]).square().sum() for k in want)) ** 0.5
    moved = float(sum((start[k] - want[k]).square().sum() for k in want)) ** 0.5
    assert far <= (1e-4 if exact else 0.15) * moved
    saved, wanted_state = optimizer.state_dict(), other.state_dict()
    assert saved["param_groups"] == wanted_state["param_groups"]
    assert saved["state"].keys() == wanted_state["state"].keys()
    for number, state in wanted_state["state"].items():
        assert saved["state"][number].keys() == state.keys()
        assert float(saved["state"][number]["step"]) == float(state["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert saved["state"][number][key].shape == state[key].shape
            if exact:
                torch.testing.assert_close(saved["state"][number][key], state[key], rtol=1e-4, atol=1e-7)
    tensors = [t for state in saved["state"].values() for t in state.values()]
    assert all(map(same_everywhere, [*now.values(), *tensors]))
    return step, model, optimizer


def running_the_graph_is_a_step(rank: int, shard: str = "update") -> None:
    """The emitted graph, with its collectives, does what a call does."""
    found = []
    for graph in (False, True):
        model, _, step, _ = made("bf16,reduce=low", "group", shard=shard, max_grad_norm=0.5)
        mine = [(own_part(x, rank), own_part(y, rank)) for x, y in batches()]
        step(*mine[0], ONE)
        step(*mine[1], ONE)
        if graph:
            emitted, _ = step.emitted()
            with torch.no_grad():
                emitted.module(*emitted.arguments([*mine[2], ONE]))
        else:
            step(*mine[2], ONE)
        shares = step.context.shares
        pieces = [shares.named[p.name].clone() for p in shares.layout.pieces]
        found.append([*model.state_dict().values(), *pieces])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def one_decision(rank: int, shard: str = "update") -> None:
    """An overflow in one rank's batch, or in one rank's share, skips the step on all, and changes nothing."""
    small_buckets()
    for bad, microbatches in ((float("inf"), 1), (float("nan"), 2)):
        model, optimizer, step, _ = made(
            "fp16", "group", accumulate=microbatches, scale=LossScale.dynamic(init=2.0**10), shard=shard
        )
        x, y = (own_part(t, rank) for t in batches()[0])
        for _ in range(microbatches):
            step(x, y, ONE)
        before, scale = copy.deepcopy(model.state_dict()), float(step.state.scale)
        moments = copy.deepcopy(optimizer.state_dict()["state"])
        for number in range(microbatches):
            result = step(x, y, torch.tensor(bad if rank == 1 and number == 0 else 1.0))
        assert not bool(result.stepped)
        assert float(result.scale) == scale / 2
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
        now = optimizer.state_dict()["state"]
        assert all(torch.equal(t, now[i][k]) for i, s in moments.items() for k, t in s.items())
        for _ in range(microbatches):
            assert bool(step(x, y, ONE).finite)
        assert all(map(same_everywhere, model.state_dict().values()))


def goes_on_as_it_was(rank: int, shard: str = "update") -> None:
    """Saved and loaded, in shares and alone, a run goes on as one that was never stopped."""
    small_buckets()
    mine = [(own_part(x, rank), own_part(y, rank)) for x, y in batches()]
    model, optimizer, step, _ = made("bf16,reduce=low", "group", shard=shard)
    for pair in mine[:2]:
        step(*pair, ONE)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), step.state_dict()))
    for pair in mine[2:]:
        step(*pair, ONE)
    wanted = model.state_dict()
    for before in (0, 2):
        again, other, second, _ = made("bf16,reduce=low", "group", shard=shard)
        for pair in mine[:before]:
            second(*pair, ONE)
        again.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
        second.load_state_dict(saved[2])
        for pair in mine[2:]:
            second(*pair, ONE)
        assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    # A scheduler's numbers arrive, and the step goes on whole after the shares were given back.
    other.param_groups[0]["lr"] = 0.0
    still = again.state_dict()
    second(*mine[0], ONE)
    assert all(torch.equal(value, still[name]) for name, value in again.state_dict().items())
    second.join_masters()
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert all(s["exp_avg"].shape == p.shape for p, s in other.state.items())
    other.param_groups[0]["lr"] = 0.01
    assert bool(second(*mine[0], ONE).stepped)
    twin = copy.deepcopy(second)
    assert bool(twin(*mine[1], ONE).stepped)
    assert all(map(same_everywhere, twin.model.state_dict().values()))


def others(rank: int, shard: str = "update") -> None:
    """Every optimizer that goes by element, and groups: what one process makes of the whole batch."""
    small_buckets()
    for kind, options in (
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.Adagrad, {"lr": 0.01}),
        (torch.optim.RMSprop, {"lr": 0.001, "momentum": 0.5}),
        (torch.optim.Adadelta, {}),
        (torch.optim.Adamax, {"lr": 0.01}),
        (torch.optim.NAdam, {"lr": 0.01}),
        (torch.optim.RAdam, {"lr": 0.01}),
        (torch.optim.ASGD, {"lr": 0.01}),
        (torch.optim.Rprop, {"lr": 0.01}),
        (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    ):
        torch.manual_seed(0)
        model = Net()
        plain = copy.deepcopy(model)

        def grouped(net: nn.Module) -> list[dict[str, Any]]:
            trained = [p for p in net.parameters() if p.requires_grad]
            return [{"params": trained[:2], "lr": 0.02}, {"params": trained[2:]}]

        optimizer, other = kind(grouped(model), **options), kind(grouped(plain), **options)
        step = mpcompile(model, "fp32", backend="eager").train_step(
            optimizer, loss_of, process_group=distributed.group.WORLD, shard=shard
        )
        for x, y in batches():
            step(own_part(x, rank), own_part(y, rank), ONE)
            loss_of(plain, x, y, ONE).backward()
            other.step()
            other.zero_grad()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=2e-3, atol=2e-4, msg=f"{kind} {name}")
        saved, wanted = optimizer.state_dict()["state"], other.state_dict()["state"]
        assert {i: list(s) for i, s in saved.items()} == {i: list(s) for i, s in wanted.items()}
        for number, state in wanted.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    assert saved[number][key].shape == value.shape
