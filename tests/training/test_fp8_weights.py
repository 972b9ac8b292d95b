"""FP8 copies of weights in the step: made once an update, and right whoever writes the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcompile import mpcompile
from mpcompile.runtime import quantise as made_by
from mpcompile.runtime import weight_copies
from tests.training.test_fp8 import Model, made


def step_of(model: nn.Module, fp8: Any = ("blocks",), lr: float = 0.1, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return mpcompile(model, "bf16", fp8=list(fp8), backend="eager").train_step(optimizer, **options)


def right(step: Any, batch: tuple[Tensor, ...]) -> None:
    """The copies that the graphs read are those of the weights as they are."""
    copies = step.context.copies
    copies.bring_up_to_date()
    assert len(copies) == 3
    for (_, wanted), (shadow, held) in copies._held.items():
        fresh = made_by.quantise(shadow, wanted.form, wanted.lies, wanted.transposed)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(held, fresh, strict=True))
    masters = {id(s): m for m, s in zip(step.context.shadows.masters, step.context.shadows.shadows, strict=True)}
    assert all(torch.equal(masters[id(s)].bfloat16(), s) for s, _ in copies._held.values())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A weight's copies -> one more entry."""
    calls: list[int] = []

    def quantise(x: Tensor, *given: Any) -> Any:
        calls.append(id(x))
        return made_by.quantise(x, *given)

    monkeypatch.setattr(weight_copies, "quantise", quantise)
    return calls


@pytest.mark.parametrize("accumulate", [1, 3])
def test_they_are_made_once_an_update(accumulate: int, counted: list[int]) -> None:
    model, batch = made(blocks=1)
    step = step_of(model, accumulate=accumulate)
    for _ in range(accumulate):
        step(*batch)
    assert len(counted) == 3 + 3  # before the first forward, and after the update
    for _ in range(2 * accumulate):
        step(*batch)
    assert len(counted) == 3 * 4
    (specialization,) = step.specializations
    made_in_graph = specialization.joint.module.graph.find_nodes(
        op="call_function", target=torch.ops.mpcompile.quantise.default
    )
    # Of inputs (one of a and b, one of out) and of three gradients.
    assert len(made_in_graph) == 2 + 3
    right(step, batch)


def test_the_emitted_graph_makes_them_of_the_shadows() -> None:
    model, batch = made(blocks=1)
    step = step_of(model)
    step(*batch)
    graph = step.graph.graph
    assert len(graph.find_nodes(op="call_function", target=torch.ops.mpcompile.quantise.default)) == 3 + 2 + 3


def _load(model: Model, step: Any) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def _edit(model: Model, step: Any) -> None:
    with torch.no_grad():
        model.blocks[0].a.weight.mul_(3.0)


def _data(model: Model, step: Any) -> None:
    model.blocks[0].a.weight.data.mul_(3.0)


def _other_step(model: Model, step: Any) -> None:
    _, batch = made(blocks=1)
    step_of(model, lr=1.0)(*batch)


def _drop_in(model: Model, step: Any) -> None:
    """Its forward casts the shadows again, so that the step finds them right."""
    _, batch = made(blocks=1)
    _edit(model, step)
    with torch.no_grad():
        mpcompile(model, "bf16", backend="eager")(*batch)


@pytest.mark.parametrize(
    ("change", "accumulate"), [(_load, 1), (_edit, 2), (_data, 1), (_other_step, 1), (_drop_in, 1)]
)
def test_whoever_writes_the_weights_they_follow(change: Any, accumulate: int) -> None:
    model, batch = made(blocks=1)
    step = step_of(model, accumulate=accumulate)
    for _ in range(2 * accumulate):
        step(*batch)
    change(model, step)
    twin, _ = made(blocks=1)
    twin.load_state_dict(model.state_dict())
    fresh = step_of(twin, accumulate=accumulate)
    found, wanted = [[one(*batch).loss.item() for _ in range(2 * accumulate)] for one in (step, fresh)]
    assert found == wanted
    right(step, batch)


def test_a_skipped_step_leaves_them() -> None:
    model, (x, y) = made(blocks=1)
    step = step_of(model)
    step(x, y)
    before = [one.clone().float() for one in step.context.copies.tensors()]
    assert not step(torch.full_like(x, float("inf")), y).stepped.item()
    assert all(torch.equal(a, b.float()) for a, b in zip(before, step.context.copies.tensors(), strict=True))


def test_a_second_batch_size_reads_the_same_ones() -> None:
    model, (x, y) = made(blocks=1)
    step = step_of(model)
    step(x, y)
    held = list(map(id, step.context.copies.tensors()))
    step(x[:2], y[:2])
    step(x, y)
    assert list(map(id, step.context.copies.tensors())) == held
    right(step, (x, y))


def test_split_masters_and_rows_keep_them_in_the_graph() -> None:
    model, batch = made(blocks=1)
    step = step_of(model, masters="split")
    losses = [step(*batch).loss.item() for _ in range(3)]
    assert len(step.context.copies) == 0
    plain, _ = made(blocks=1)
    other = step_of(plain)
    assert [other(*batch).loss.item() for _ in range(3)] == pytest.approx(losses, abs=1e-3)
    rowwise, _ = made(blocks=1)
    by_rows = mpcompile(rowwise, "bf16,fp8=rowwise", fp8=["blocks"], backend="eager").train_step(
        torch.optim.SGD(rowwise.parameters(), lr=0.1)
    )
    by_rows(*batch)
    assert len(by_rows.context.copies) == 0
