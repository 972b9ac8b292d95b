"""When a step is recorded, replayed and recorded again; on a CPU, with a recorder that only remembers the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

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

    bench.replays.record = refuse  # type: ignore[assignment]
    for _ in range(WARM + 3):
        bench.step(torch.ones(3))
    assert bench.direct == WARM + 3
    assert not bench.replays.on


def test_asked_for_and_impossible_is_an_error() -> None:
    with pytest.raises(TrainingError, match="MP543"):
        Replays(True, CPU)
    assert not Replays("auto", CPU).on
    assert not Replays(False, CPU).on
