"""Products whose rows tensor cores cannot read: padded, with the same losses and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcompile import mpcompile
from mpcompile.frontends import align
from mpcompile.training import loss_region

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
