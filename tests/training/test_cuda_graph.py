"""When a step is recorded, replayed and recorded again; on a CPU, with a recorder that only remembers the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import destroy_process_group

from mpcompile import LossScale, mpcompile
from mpcompile.errors import TrainingError
from mpcompile.training.cuda_graph import WARM, Replays

CPU = torch.device("cpu")


@dataclass
class Remembered:
    run: Callable[[], tuple[Tensor, ...]]
    results: tuple[Tensor, ...]

    def replay(self) -> None:
        for mine, new in zip(self.results, self.run(), strict=True):
            mine.copy_(new)


class Bench:
    """A step that adds its batch to a weight and gives the sum, and a count of how it was run."""

    def __init__(self, wanted: bool | str = "auto") -> None:
        self.weight, self.direct, self.recorded = torch.zeros(3), 0, 0
        self.replays = Replays(wanted, CPU, self.record)  # type: ignore[arg-type]

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Remembered, tuple[Tensor, ...]]:
        self.recorded += 1
        before, direct = self.weight.clone(), self.direct
        results = run()
        # A recording does not run anything.
        self.weight.copy_(before)
        self.direct = direct
        return Remembered(run, results), results

    def run(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.direct += 1
        self.weight += tensors[0]
        return (self.weight.sum(),)

    def step(self, x: Tensor, key: object = "k") -> Tensor:
        call = self.replays.find(key, self.run, [x], lambda: [self.weight])
        return call([x])[0]


def test_a_warm_step_is_recorded_once_and_gives_the_same() -> None:
    bench, expected = Bench(), torch.zeros(3)
    results = []
    for i in range(WARM + 4):
        x = torch.full((3,), float(i))
        expected = expected + x
        results.append((bench.step(x), expected.sum()))
    assert bench.recorded == 1
    for got, want in results:
        assert torch.equal(got, want), "an earlier result must not change when the step runs again"


def test_another_signature_is_another_recording() -> None:
    bench = Bench()
    for key in ("a", "b"):
        for _ in range(WARM + 2):
            bench.step(torch.ones(3), key)
    assert bench.recorded == 2


def test_a_moved_parameter_is_recorded_again() -> None:
    bench = Bench()
    for _ in range(WARM + 2):
        bench.step(torch.ones(3))
    kept, bench.weight = bench.weight, bench.weight.clone()
    total = bench.step(torch.ones(3))
    assert bench.recorded == 2
    assert total == (WARM + 3) * 3
    assert kept.sum() == (WARM + 2) * 3


def test_what_cannot_be_recorded_runs_all_the_same() -> None:
    bench = Bench()

    def refuse(run: object) -> object:
        raise RuntimeError("operation not permitted when stream is capturing")

    bench.replays._record = refuse  # type: ignore[assignment]
    for _ in range(WARM + 3):
        bench.step(torch.ones(3))
    assert bench.direct == WARM + 3
    assert not bench.replays.on


def test_asked_for_and_impossible_is_an_error() -> None:
    with pytest.raises(TrainingError, match="MP543"):
        Replays(True, CPU)
    assert not Replays("auto", CPU).on
    assert not Replays(False, CPU).on


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_replayed_windows_are_the_step_bit_for_bit(accumulate: int) -> None:
    """First batch, later batch and update are recorded once each; a skipped update and a schedule happen outside."""
    curves, recorded = [], []
    for replayed in (False, True):
        module = model()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
        step = mpcompile(module, "bf16", low=["*"], backend="eager").train_step(
            optimizer,
            lambda m, x: m(x).square().mean(),
            accumulate=accumulate,
            scale=LossScale.dynamic(8.0, interval=3),
        )

        def everything(step: Any = step, optimizer: Any = optimizer, module: nn.Module = module) -> list[Tensor]:
            states = [t for state in optimizer.state.values() for t in state.values()]
            held = [*module.parameters(), *states, *step.accumulator.sums.values(), *step.context.shadows.shadows]
            counts = [t for one in step.monitor.counters[0]._classes for pair in one.states.values() for t in pair]
            return [*held, *step.state, step.context.seed, *counts]

        def record(run: Any, everything: Any = everything) -> tuple[Remembered, tuple[Tensor, ...]]:
            """A recording runs nothing: what the run did is undone."""
            tensors = everything()
            before = [t.detach().clone() for t in tensors]
            results = run()
            recorded.append(len(results))
            with torch.no_grad():
                for tensor, was in zip(tensors, before, strict=True):
                    tensor.copy_(was)
            return Remembered(run, results), results

        step.updates.replays = Replays("auto" if replayed else False, CPU, record)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
        curve = []
        for turn in range(accumulate * (WARM + 4)):
            torch.manual_seed(turn)
            x = torch.randn(4, 6)
            result = step(x * float("inf") if turn == accumulate * (WARM + 2) else x)
            curve.append((result.loss.item(), result.scale.item(), bool(result.stepped)))
            if turn % accumulate == accumulate - 1:
                schedule.step()
        curves.append((repr(curve), [p.detach().clone() for p in module.parameters()]))
    # Results: (loss, finite, norm, scale) of a whole step; (loss) of a batch and (finite, norm, scale) of an update.
    assert sorted(recorded) == ([4] if accumulate == 1 else [1, 1, 3])
    assert curves[0][0] == curves[1][0]
    torch.testing.assert_close(curves[0][1], curves[1][1], rtol=0, atol=0)


class Remembering:
    """A real step of a CPU, replayed by a recorder that runs it again and restores what the recording run changed."""

    def __init__(self, accumulate: int = 1, task: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        self.module, self.recorded = model(), 0
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.05, weight_decay=0.0)
        self.step = mpcompile(self.module, "bf16", low=["*"], backend="eager").train_step(
            self.optimizer, task or (lambda m, x: m(x).square().mean()), accumulate=accumulate, scale=1.0
        )
        self.step.updates.replays = Replays("auto", CPU, self.record)

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Remembered, tuple[Tensor, ...]]:
        self.recorded += 1
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        held = [
            *self.module.parameters(),
            *states,
            *self.step.accumulator.sums.values(),
            *self.step.context.shadows.shadows,
        ]
        before = [t.detach().clone() for t in held]
        results = run()
        with torch.no_grad():
            for tensor, was in zip(held, before, strict=True):
                tensor.copy_(was)
        return Remembered(run, results), results

    def run(self, windows: int, rows: tuple[int, ...] = (4,)) -> None:
        for _ in range(windows):
            for count in rows:
                self.step(torch.randn(count, 6))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_master_that_moved_is_recorded_again(accumulate: int) -> None:
    """The forward reads its shadow, which stays where it is; the recorded update would write the old master."""
    bench = Remembering(accumulate)
    bench.run(WARM + 2, (4,) * accumulate)
    recorded = bench.recorded
    bench.run(1, (4,) * accumulate)
    assert bench.recorded == recorded
    weight = bench.module[0].weight
    weight.data = weight.data.clone()
    bench.run(1, (4,) * accumulate)
    assert bench.recorded == recorded + 1


def test_an_update_is_recorded_once_whatever_batch_ends_the_window() -> None:
    """The two batches read different parameters; the update writes those of both."""
    bench = Remembering(accumulate=2, task=lambda m, x: (m(x) if len(x) == 4 else m[0](x)).square().mean())
    bench.run(2 * WARM, (4, 5, 5, 4))
    assert len(bench.step.specializations) == 2
    recorded = bench.recorded
    bench.run(4, (4, 5, 5, 4))
    assert bench.recorded == recorded


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_replaced_update_recorded_is_dropped(accumulate: int) -> None:
    """Another update may get its id, and would be given its recording: the weight decay of long ago."""
    bench = Remembering(accumulate)
    for turn in range(4):
        bench.optimizer.param_groups[0]["weight_decay"] = 0.1 * (turn % 2)
        bench.run(WARM + 2, (4,) * accumulate)
    parts = {part for key in bench.step.updates.replays._runs for part in key if isinstance(part, int) and part > 1}
    alive = [*bench.step.updates, *bench.step.specializations]
    assert parts == set(map(id, alive))
    assert bench.recorded > WARM


@pytest.mark.parametrize("whole", [True, False])
def test_a_process_group_that_ends_takes_the_recordings_of_its_collectives_with_it(whole: bool, tmp_path: Path) -> None:
    """NCCL would wait for them for ever."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    ends = destroy_process_group  # imported by name, before anything was recorded
    shutdown = vars(distributed.ProcessGroup)["shutdown"]
    other = distributed.new_group([0])
    replays = [Replays("auto", CPU, lambda run: (Remembered(run, run()), run()), group=group)
               for group in (distributed.group.WORLD, other)]  # fmt: skip
    for one in replays:
        for _ in range(WARM + 1):
            one.find("key", lambda tensors: (tensors[0] + 1,), [torch.ones(2)], list)
        assert one._steps
    if whole:
        ends()
        assert not any(one._steps for one in replays)
    else:
        ends(other)
        assert replays[0]._steps
        assert not replays[1]._steps
        replays[0].clear()
        distributed.destroy_process_group()
    assert vars(distributed.ProcessGroup)["shutdown"] is shutdown


def test_a_closed_step_lets_go_of_its_recordings_and_records_anew() -> None:
    bench = Remembering()
    with bench.step as step:
        bench.run(WARM + 2)
        assert step.updates.replays._steps
    assert not step.updates.replays._steps
    bench.run(WARM + 2)
    assert bench.recorded == 2
