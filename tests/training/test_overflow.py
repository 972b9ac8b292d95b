"""After a skipped step: which node, where, in what range, and what would help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn, optim

from mpcompile.api import mpcompile
from mpcompile.training.loss_scale.scale import LossScale


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


def explained(model, batch, low, keep=(), loss=None):
    own = optim.SGD(model.parameters(), 1e-3)
    mp = mpcompile(model, "fp16", backend="eager", low=[one for one in low if one not in keep], keep_fp32=list(keep))
    step = mp.train_step(own, loss, scale=LossScale.static(1024.0))
    return step(*batch), step.explain_overflow(*batch)


class Scores(nn.Module):
    """Attention by hand, whose scores leave FP16's range."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x):
        scores = (self.q(x) * 200) @ (self.k(x) * 200).transpose(-1, -2)
        return self.out(scores.softmax(-1) @ x).float().mean()


def test_the_override_that_is_named_cures_an_attention():
    x = torch.randn(2, 16, 16) * 10
    low = ["q", "k", "out", "aten.matmul"]
    result, found = explained(Scores(), (x,), low)
    assert not result.stepped
    assert (found.phase, found.made, found.source.split(":")[0]) == ("forward", "inf", "test_overflow.py")
    assert "bmm" in found.node
    assert min(low for _, _, low, _ in found.inputs) < -100
    keep = json.loads(found.override.partition("keep_fp32=")[2].rstrip(")"))
    assert "matmul" in keep
    result, found = explained(Scores(), (x,), low, keep)
    assert result.stepped
    assert found is None


def test_a_batch_that_is_not_finite_is_named_and_so_is_the_loss_s_line():
    def logarithm(model, x):
        return (model(x) * 0).log().mean()

    x = torch.randn(4, 8)
    _, found = explained(nn.Linear(8, 2), (x,), [], loss=logarithm)
    line = logarithm.__code__.co_firstlineno
    assert (found.op, found.source) == ("aten.log.default", f"test_overflow.py:{line}")
    result, found = explained(nn.Linear(8, 2), (x * float("nan"),), [], loss=lambda model, x: model(x).mean())
    assert not result.stepped
    assert (found.op, found.made) == ("input", "nan")
