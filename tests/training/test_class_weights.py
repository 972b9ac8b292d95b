"""A cross entropy with class weights, in chunks of rows: as torch has it, in FP64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile import mpcompile
from mpcompile.aten.rewrites import chunked_loss as loss_region


class Model(nn.Module):
    def __init__(self, smoothing: float, ignore: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.smoothing, self.ignore = smoothing, ignore
        self.register_buffer("weights", torch.rand(50) + 0.1)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(F.gelu(self.table(ids)))
        return F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), self.weights, ignore_index=self.ignore,
            label_smoothing=self.smoothing,
        )  # fmt: skip


@pytest.mark.parametrize(("smoothing", "ignore"), [(0.0, -100), (0.1, 3)])
def test_the_gradients_are_torchs(smoothing: float, ignore: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_region, "WORTH_BYTES", 1)
    torch.manual_seed(0)
    model, ids, labels = Model(smoothing, ignore), *torch.randint(0, 50, (2, 4, 33))
    labels[0, :9] = ignore
    exact = copy.deepcopy(model).double()
    loss = exact(ids, labels)
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    step = mpcompile(model, "fp32", backend="eager").train_step(optimizer)
    assert step(ids, labels).loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        got = optimizer.state[mine]["momentum_buffer"].double()
        torch.testing.assert_close(got, theirs.grad, rtol=1e-4, atol=1e-8)
    losses = [n for n in step.graph.graph.nodes if "nll_loss_forward" in str(n.target)]
    assert len(losses) > 1
