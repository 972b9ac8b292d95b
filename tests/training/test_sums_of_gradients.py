"""Gradients add up in FP32: over the uses of a weight, over repeated rows, over broadcast dimensions, in both ways."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from lowness import assert_low_products
from rounding.measure import FORCED
from torch import Tensor, nn

from mpcompile import mpcompile

USES = 24


class Unrolled(nn.Module):
    """A layer that is used many times, beside a stream: each use adds a gradient of its own to one weight.

    Args:
      hoisted: its transpose is taken once, before the loop.
    """

    def __init__(self, *, hoisted: bool = False, size: int = 32) -> None:
        super().__init__()
        self.layer, self.hoisted = nn.Linear(size, size), hoisted

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight.t()
        total = 0.0
        for step in range(USES):
            given = x[step % len(x)]
            total = total + (given @ weight if self.hoisted else self.layer(given)).float().square().mean()
        return total


def _batch(size: int = 32) -> Tensor:
    return torch.randn(20, 16, size, generator=torch.Generator().manual_seed(1))


def _distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def _wanted(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    twin = copy.deepcopy(model)
    twin(x).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def _dropped_in(model: nn.Module, x: Tensor, backend: str) -> dict[str, Tensor]:
    wrapped = mpcompile(model, f"low=bf16,device={FORCED}", backend=backend)
    wrapped(x).backward()
    assert_low_products(wrapped)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _stepped(model: nn.Module, x: Tensor, backend: str) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    step = mpcompile(model, f"low=bf16,device={FORCED}", backend=backend).train_step(optimizer)
    step(x)
    assert any(n.precision == "bf16" and n.kind == "matmul" for n in step.report().nodes)
    return {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters() if p in optimizer.state}


WAYS: dict[str, Callable[[nn.Module, Tensor, str], dict[str, Tensor]]] = {"drop-in": _dropped_in, "step": _stepped}


@pytest.mark.parametrize("hoisted", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_used_often_has_its_gradients_added_up_in_fp32(way: str, hoisted: bool) -> None:
    """A low sum rounds once per use; an FP32 one has the roundings of its parts alone."""
    model, x = Unrolled(hoisted=hoisted), _batch()
    wanted = _wanted(model, x)
    got = WAYS[way](model, x, "eager")
    assert wanted.keys() == got.keys()
    assert max(_distance(got[name], wanted[name]) for name in wanted) < 0.75 * 2.0**-8


def test_low_sums_are_far_off() -> None:
    """The same sums in BF16, as torch.autocast and its cache of weights have them."""
    model, x = Unrolled(), _batch()
    wanted = _wanted(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).backward()
    assert _distance(model.layer.weight.grad, wanted["layer.weight"]) > 1.2 * 2.0**-8


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 520])
@pytest.mark.parametrize("way", WAYS)
def test_so_it_is_when_compiled(way: str, size: int) -> None:
    """520 x 520 elements are a large shadow, whose gradient leaves the compiled backward low where one reads it."""
    model, x = Unrolled(size=size), _batch(size)
    wanted = _wanted(model, x)
    got = WAYS[way](model, x, "inductor")
    assert max(_distance(got[name], wanted[name]) for name in wanted) < 2.0**-8


class Sums(nn.Module):
    """Rows by index with repeats, rows of an embedding, a broadcast bias, a broadcast factor."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.table = nn.Embedding(4, 16), nn.Parameter(torch.randn(4, 16))
        self.layer, self.gain = nn.Linear(16, 16), nn.Parameter(torch.ones(16))

    def forward(self, ids: Tensor) -> Tensor:
        return (self.layer(self.rows(ids) + self.table[ids]) * self.gain).float().square().mean()


@pytest.mark.parametrize("low", [(), ("*",)])
def test_every_sum_of_gradients_is_fp32_and_says_so(low: tuple[str, ...]) -> None:
    model, ids = Sums(), torch.randint(0, 4, (512,))
    step = mpcompile(model, f"low=bf16,device={FORCED}", backend="eager", low=low).train_step(
        torch.optim.SGD(model.parameters(), lr=0.0)
    )
    step(ids)
    rows = [row for row in step.report().nodes if row.phase == "backward"]
    sums = [row for row in rows if row.op.startswith(("aten.sum.", "aten.embedding_dense_backward", "aten.index_put"))]
    assert len(sums) >= 4
    if not low:
        assert {(row.precision, row.verdict) for row in sums} == {("fp32", "fp32")}
        assert all("add up" in row.reason or "adds up" in row.reason for row in sums)
    # What `low=` makes low may add up low; a verdict never says otherwise than the precision.
    assert all(row.verdict != "fp32" or row.precision in ("fp32", "keep") for row in rows)


@pytest.mark.parametrize("grads", ["fp32", "low"])
def test_sums_of_microbatches_say_how_they_round(grads: str) -> None:
    model, x = nn.Linear(16, 16), torch.randn(8, 16)
    wrapped = mpcompile(model, f"low=bf16,grads={grads},device={FORCED}", backend="eager")
    step = wrapped.train_step(
        torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x).square().mean(), accumulate=2
    )
    for _ in range(2):
        step(x)
    sums = [row for row in step.report().nodes if "microbatches" in row.reason]
    assert {(row.precision, row.verdict, row.decided_by) for row in sums} == {
        ("fp32", "fp32", "rule") if grads == "fp32" else ("bf16", "low", "override")
    }


def test_every_value_of_a_step_has_its_origin_in_the_report() -> None:
    model, ids = Sums(), torch.randint(0, 4, (512,))
    step = mpcompile(model, f"low=bf16,device={FORCED}", backend="eager").train_step(
        torch.optim.AdamW(model.parameters(), lr=0.1)
    )
    step(ids)
    report = step.report()
    data = report.to_dict()
    assert {data["origins"][name] for name in ("layer.weight", "table", "gain", "rows.weight")} == {"weight"}
    assert data["origins"]["layer.weight.shadow"] == "rounded"
    assert data["origins"]["table.exp_avg"] == data["origins"]["seed"] == "full"
    values = {name: origin for row in data["nodes"] for name, origin in row.get("origins", {}).items()}
    values |= data["origins"]
    graph = report.graph
    low = {
        n for n, v in graph.values.items() if v.dtype == "bf16" and not (v.producer and graph.nodes[v.producer].is_cast)
    }
    assert low
    assert {values[name] for name in low} <= {"rounded"}
    sums = [row for row in data["nodes"] if "adds up gradients" in row["reason"] and row["precision"] == "fp32"]
    assert {origin for row in sums for origin in row["origins"].values()} <= {"full", "rounded"}
