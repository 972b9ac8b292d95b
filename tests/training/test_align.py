"""Products whose rows tensor cores cannot read: padded, with the same losses and gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcompile import mpcompile
from mpcompile.aten.rewrites import align
from mpcompile.aten.rewrites import chunked_loss as loss_region

CLASSES = 37


class Tied(nn.Module):
    """An embedding whose weight is the classifier's too, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(CLASSES, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(F.gelu(self.body(self.table(ids)))).flatten(0, 1), ids.flatten())


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align, "DEVICES", {"cpu"})
    monkeypatch.setattr(align, "WIDE", 8)


def test_only_wide_unaligned_products_on_a_gpu_are_padded() -> None:
    assert align.padding(50257, "cuda") == 50304 - 50257
    assert align.padding(30522, "cuda") == 6
    for columns, device in ((50264, "cuda"), (50304, "cuda"), (10, "cuda"), (0, "cuda"), (50257, "cpu")):
        assert align.padding(columns, device) == 0


@pytest.mark.usefixtures("on_cpu")
def test_a_padded_forward_and_backward_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, CLASSES, (4, 9))
    made, model = [], Tied()
    rewrite = align.align_linears
    monkeypatch.setattr("mpcompile.runtime.dynamo.align_linears", lambda *given: made.append(rewrite(*given)))
    padded = copy.deepcopy(model)
    loss = mpcompile(padded, "bf16", low=["*"])(ids)
    loss.backward()
    assert made == [1]  # the head; the body's 16 columns are aligned
    monkeypatch.setattr("mpcompile.runtime.dynamo.align_linears", lambda *given: 0)
    expected = mpcompile(model, "bf16", low=["*"])(ids)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(padded.parameters(), model.parameters(), strict=True):
        assert mine.grad.shape == mine.shape
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.05, atol=1e-3)


class Head(nn.Module):
    """The classifier of a body, with what may follow it."""

    def __init__(self, bias: bool, after: Callable[[torch.Tensor], torch.Tensor], smoothing: float = 0.0) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES, bias=bias)
        self.after, self.smoothing = after, smoothing

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.after(self.head(F.gelu(self.body(x))))
        return F.cross_entropy(logits.flatten(0, 1), y[:, : logits.shape[1]].flatten(), label_smoothing=self.smoothing)


class Positions(Head):
    """A loss over the second dimension, which is not the classifier's."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.body(x)), y)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("compiled", [True, False])
def test_classes_that_are_not_the_last_dimension_are_left_alone(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_region, "WORTH_BYTES", 1)
    monkeypatch.setattr("mpcompile.runtime.dynamo.compile_inductor", lambda module, *_, **__: module)
    torch.manual_seed(0)
    model, x, y = Positions(True, lambda t: t), torch.randn(4, 9, 16), torch.randint(0, 9, (4, CLASSES))
    expected = model(x, y).item()
    mp = mpcompile(model, "bf16", low=["*"], backend="inductor" if compiled else "eager")
    step = mp.train_step(torch.optim.SGD(model.parameters(), lr=0.1), backend="eager")
    assert mp(x, y).item() == pytest.approx(expected, rel=0.01)
    assert step(x, y).loss.item() == pytest.approx(expected, rel=0.01)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("model", "pieces"),
    [
        (Head(True, lambda t: t.float()), "closed"),
        (Head(False, lambda t: t[:, :-1].contiguous().float().view(4, -1, CLASSES)), "closed"),
        (Head(False, lambda t: t, smoothing=0.1), "slice"),
        (Head(True, lambda t: t[..., :-5]), "slice"),
        (Head(True, lambda t: torch.tanh(t)), "slice"),
    ],
)
def test_readers_see_the_columns_that_there_were(model: Head, pieces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that alone reads the logits sees the others too, at the lowest number, and gives the same gradients."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 9, 16), torch.randint(0, CLASSES - 5, (4, 9))
    written: list[str] = []

    def seen(module: torch.fx.GraphModule, *rest: Any) -> int:
        done = align.align_linears(module, *rest)
        written.extend(node.name for node in module.graph.nodes)
        return done

    monkeypatch.setattr("mpcompile.runtime.dynamo.align_linears", seen)
    monkeypatch.setattr("mpcompile.runtime.dynamo.compile_inductor", lambda module, *_, **__: module)
    twin = copy.deepcopy(model)
    mpcompile(model, "bf16", low=["*"])(x, y).backward()
    assert ("closed" in written) == (pieces == "closed")
    assert "padded" in written
    monkeypatch.setattr(align, "DEVICES", set())
    mpcompile(twin, "bf16", low=["*"])(x, y).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.02, atol=1e-3)


def test_a_loss_of_some_of_the_classes_is_not_taken_for_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken in chunks, the slice of the classes was lost, and the loss was one over all of them."""
    monkeypatch.setattr(loss_region, "WORTH_BYTES", 1)
    torch.manual_seed(0)
    model = Head(True, lambda t: t[..., :-5])
    x, y = torch.randn(4, 9, 16), torch.randint(0, CLASSES - 5, (4, 9))
    expected = model(x, y).item()
    step = mpcompile(model, "fp32", backend="eager").train_step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert step(x, y).loss.item() == pytest.approx(expected, rel=1e-5)


def test_chunks_on_a_gpu_differ_in_size() -> None:
    """Inductor joins the losses of chunks of one size in one kernel, and so holds all their logits at once."""
    for rows, chunks in ((16384, 7), (8192, 3), (16383, 4), (65536, 16)):
        ends = loss_region.bounds(rows, chunks, "cuda")
        sizes = [b - a for a, b in itertools.pairwise(ends)]
        assert (ends[0], ends[-1], len(set(sizes)), min(sizes) > 0) == (0, rows, chunks, True)
        assert max(sizes) < 2 * rows / chunks
    assert loss_region.bounds(100, 3, "cuda") == loss_region.bounds(100, 3, "cpu") == [0, 33, 66, 100]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("bias", [True, False])
def test_padding_inside_the_chunks_of_a_loss_changes_nothing(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_region, "WORTH_BYTES", 1)
    torch.manual_seed(0)
    ids = torch.randint(0, CLASSES, (4, 9))
    curves = []
    model = Tied()
    if not bias:
        model.head.bias = None
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(align, "DEVICES", devices)
        twin = copy.deepcopy(model)
        step = mpcompile(twin, "bf16", low=["*"], backend="eager").train_step(
            torch.optim.SGD(twin.parameters(), lr=0.5)
        )
        curves.append([step(ids).loss.item() for _ in range(4)])
        assert ("constant_pad_nd" in str(step.graph.graph)) == bool(devices)
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)
    assert curves[0][-1] < curves[0][0]


class Broadcast(nn.Module):
    """A bias that is broadcast: over the classes, or an element for each row too."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(CLASSES, 16)), nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x.flatten(0, 1), self.weight, self.bias), y.flatten())


class Parts(nn.Module):
    """The classifier reads a part of what was split, among parts of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 40), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first, second, third = torch.tanh(self.body(x)).split([11, 16, 13], -1)
        low, high = F.gelu(first).split([4, 7], -1)
        rest = sum(part.float().square().mean() for part in (low, high, third))
        return F.cross_entropy(self.head(second).flatten(0, 1), y.flatten()) + rest


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Broadcast(1),
        lambda: Broadcast(),
        lambda: Broadcast(1, CLASSES),
        lambda: Broadcast(36, CLASSES),
        Parts,
    ],
)
def test_unusual_classifiers_give_their_loss(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """They failed: padded where a bias has no element for each class, or asked for the shape of a tuple."""
    monkeypatch.setattr(loss_region, "WORTH_BYTES", 1)
    monkeypatch.setattr("mpcompile.runtime.dynamo.compile_inductor", lambda module, *_, **__: module)
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(4, 9, 16), torch.randint(0, CLASSES, (4, 9))
    expected = model(x, y).item()
    mp = mpcompile(model, "bf16", low=["aten.linear*"])
    assert mp(x, y).item() == pytest.approx(expected, rel=0.01)
    step = mp.train_step(torch.optim.SGD(model.parameters(), lr=0.1), backend="eager")
    assert step(x, y).loss.item() == pytest.approx(expected, rel=0.01)
