"""After a skipped step: which node, where, in what range, and what would help."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn, optim

from mpcompile.api import mpcompile
from mpcompile.training.scaler import LossScale


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x, y):
        h = self.up(x)
        h = h * h  # overflows FP16 past 255
        return nn.functional.mse_loss(self.down(h), y)


def make(scale, backend="eager"):
    torch.manual_seed(0)
    model = Squares()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    low = ["up", "down", lambda node: node.op == "aten.mul.Tensor"]
    return model, mpcompile(model, "fp16", backend=backend, low=low).train_step(optimizer, scale=scale)


def test_a_forward_overflow_is_named_with_its_line_and_range():
    model, step = make(LossScale.dynamic(1.0, floor=1.0))
    x, y = torch.randn(32, 16), torch.randn(32, 16)
    assert step.explain_overflow(x, y) is None
    assert not step(1e3 * x, y).stepped
    before = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    found = step.explain_overflow(1e3 * x, y)
    assert (found.phase, found.op, found.made, found.dtype) == ("forward", "aten.mul.Tensor", "inf", "float16")
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "overflows FP16" in text)
    assert found.source == f"test_overflow.py:{line}"
    assert max(high for *_, high in found.inputs) > 255
    assert f"test_overflow.py:{line}" in str(found)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_backward_overflow_is_named_with_its_module_and_override():
    _, step = make(LossScale.dynamic(2.0**24))
    x, y = torch.randn(256, 16), torch.randn(256, 16)
    assert not step(x, y).stepped
    found = step.explain_overflow(x, y)
    assert (found.phase, found.made, found.scale) == ("backward", "inf", 2.0**24)
    assert found.module in ("up", "down")
    assert found.override == f'mpcompile(model, …, keep_fp32=["{found.module}"])'


@pytest.mark.parametrize("masked", [True, False])
def test_infinities_that_are_meant_are_not_blamed(masked):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            scores = self.inner(x)
            if masked:
                scores = scores.masked_fill(torch.eye(8, dtype=torch.bool), float("-inf"))
            return scores.softmax(-1).log().neg().clamp(max=9.0).sum() if masked else (1.0 / (scores - scores)).sum()

    model = Masked()
    step = mpcompile(model, "bf16", backend="eager").train_step(optim.SGD(model.parameters(), lr=0.1))
    step(torch.randn(8, 8))
    found = step.explain_overflow(torch.randn(8, 8))
    assert found is None or "masked_fill" not in found.op
    if not masked:
        assert found.op in ("aten.reciprocal.default", "aten.div.Tensor")
