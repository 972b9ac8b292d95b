"""Measured ranges: what is noted, against values worked out by hand; what a plan makes of it; stale ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcompile.api import mpcompile
from mpcompile.errors import MPCompileError
from mpcompile.ranges import Call, Ranges
from mpcompile.training.numerics.calibrate import spread

FP16 = "low=fp16,device=free-low"


def test_a_spread_by_hand() -> None:
    one = spread(torch.tensor([0.0, 1.0, -1.5, 2.0, 0.25, float("inf"), 3e-8]))
    assert (one.least, one.most) == (-1.5, 2.0)
    assert one.sizes == {-25: 1, -2: 1, 0: 2, 1: 1}
    assert spread(torch.tensor([float("nan")])).sizes == {}


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False), nn.LayerNorm(8)
        with torch.no_grad():
            self.up.weight.mul_(1000)
            self.down.weight.mul_(1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(torch.relu(self.up(x)))).square().mean()


def test_values_and_gradients_are_those_of_autograd() -> None:
    model, x = Wide(), torch.randn(4, 8)
    found = mpcompile(model, FP16, backend="eager").calibrate([x])
    up = model.up(x)
    up.retain_grad()
    down = model.down(torch.relu(up))
    down.retain_grad()
    model.norm(down).square().mean().backward()
    for key, value in (("up|aten.linear.default|0", up), ("down|aten.linear.default|0", down)):
        assert found.values[key].most == pytest.approx(float(value.detach().max()), rel=1e-4)
        assert value.grad is not None
        assert found.gradients[key].largest == pytest.approx(float(value.grad.abs().max()), rel=1e-4)
    assert model.up.weight.grad is not None
    largest = float(model.up.weight.grad.abs().max())
    assert found.gradients["up|aten.linear.default|0|parameters"].largest == pytest.approx(largest, rel=1e-4)
    assert found.batches == 1
    assert found.parameters == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_a_plan_says_the_number(tmp_path: Path) -> None:
    model, x = Wide(), torch.randn(4, 8)
    free = mpcompile(model, FP16, backend="eager")
    assert {n.precision for n in free.plan(x).graph if n.kind == "matmul"} == {"fp16"}
    free.calibrate([x, Call((x * 2,))]).save(tmp_path / "ranges.json")
    known = mpcompile(model, FP16, backend="eager", ranges=tmp_path / "ranges.json")
    rows = {row.id: row for row in known.report(x).nodes}
    assert rows["linear_1"].precision == "fp32"
    assert rows["linear_1"].decided_by == "hazard"
    assert "beyond fp16's largest number, 65504" in rows["linear_1"].reason
    assert torch.isfinite(known(x * 2))
    assert not torch.isfinite(free(x * 2))
    assert any(plan.graph.nodes["linear_1"].precision == "fp32" for plan in known.plans)  # by way of Dynamo too


@pytest.mark.fp32_products
def test_bf16_takes_no_notice() -> None:
    model, x = Wide(), torch.randn(4, 8)
    found = mpcompile(model, FP16, backend="eager").calibrate([x])
    one = mpcompile(model, "low=bf16,device=free-low", ranges=found).plan(x).graph
    other = mpcompile(model, "low=bf16,device=free-low").plan(x).graph
    assert [n.precision for n in one] == [n.precision for n in other]


def test_a_step_goes_on_by_what_it_measured() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head, self.stiff = nn.Linear(8, 1), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).square().mean() + 1e8 * self.stiff(x).square().mean()

    x, results = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), []
    for calibrated in (False, True):
        model = Steep()
        step = mpcompile(model, FP16, backend="eager").train_step(torch.optim.Adam(model.parameters()))
        before = {name: p.clone() for name, p in model.named_parameters()}
        first = step(x)
        assert not first.stepped
        if calibrated:
            step.calibrate([(x,)])
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        results.append([bool(step(x).stepped) for _ in range(3)])
    assert results == [[False] * 3, [True] * 3]
    assert any("gradient" in row.reason and "loss scale" in row.reason for row in step.report().nodes)


def test_ranges_of_another_model_are_refused() -> None:
    x = torch.randn(4, 8)
    found = mpcompile(Wide(), FP16, backend="eager").calibrate([x])
    with pytest.raises(MPCompileError, match="MP207"):
        mpcompile(nn.Linear(8, 8), FP16, ranges=found)

    class Other(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))  # the same parameters, another graph

    with pytest.raises(MPCompileError, match="MP207"):
        mpcompile(Other(), FP16, ranges=found).plan(x)
    with pytest.raises(MPCompileError, match="MP208"):
        mpcompile(Wide(), FP16, ranges="no/such/file")


class Loose(nn.Module):
    """Two layers, and what `between` computes in the model's own forward."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x))).square().mean()


BETWEEN = {
    "another operation": lambda h: torch.tanh(h) * 2.0,
    "another order": lambda h: torch.relu(h * 2.0),
    "another number": lambda h: torch.relu(h) * 1e6,
    "one less": lambda h: h * 2.0,
    "one more": lambda h: torch.relu(torch.relu(h)) * 2.0,
    "another shape": lambda h: torch.relu(h.unflatten(1, (2, 4)).flatten(1)) * 2.0,
}


def by(entrance: str, model: nn.Module, found: Ranges, x: Tensor) -> None:
    torch._dynamo.reset()
    mp = mpcompile(model, FP16, backend="eager", ranges=found)
    if entrance == "report":
        mp.report(x)
    elif entrance == "call":
        mp(x)
    else:
        mp.train_step(torch.optim.SGD(model.parameters(), lr=0.1), lambda model, x: torch.tanh(model(x)))(x)


@pytest.mark.parametrize("entrance", ["report", "call", "step"])
def test_other_lines_of_the_models_own_forward_are_refused(entrance: str) -> None:
    def between(h: Tensor) -> Tensor:
        return torch.relu(h) * 2.0

    x = torch.randn(4, 8)
    found = mpcompile(Loose(between), FP16, backend="eager").calibrate([x])
    for rows in (4, 6):  # other sizes of the batch are no other graph, nor is a loss around the model
        by(entrance, Loose(between), found, torch.randn(rows, 8))
    for other in BETWEEN.values():
        with pytest.raises(MPCompileError, match="MP207"):
            by(entrance, Loose(other), found, x)


def test_a_model_that_breaks_its_graph_takes_its_ranges() -> None:
    def broken(h: Tensor) -> Tensor:
        h = torch.relu(h) * 2.0
        torch._dynamo.graph_break()
        return torch.relu(h) * 2.0

    def otherwise(h: Tensor) -> Tensor:
        h = torch.relu(h) * 2.0
        torch._dynamo.graph_break()
        return torch.tanh(h) * 2.0

    x = torch.randn(4, 8)
    whole = Loose(lambda h: torch.relu(torch.relu(h) * 2.0) * 2.0)
    found = mpcompile(whole, FP16, backend="eager").calibrate([x])
    by("call", Loose(broken), found, x)
    with pytest.raises(MPCompileError, match="MP207"):
        by("call", Loose(otherwise), found, x)


def test_no_batch_is_refused() -> None:
    with pytest.raises(MPCompileError, match="MP561"):
        mpcompile(Wide(), FP16).calibrate([])


def test_keywords_and_changing_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpcompile.training.numerics import calibrate

    made = list[Any]()
    whole = calibrate.subject
    monkeypatch.setattr(calibrate, "subject", lambda *a, **k: made.append(1) or whole(*a, **k))
    mp = mpcompile(Wide(), FP16, backend="eager")
    found = mp.calibrate([{"x": torch.ones(4, 8)}, {"x": torch.zeros(4, 8)}, {"x": torch.ones(2, 8)}])
    assert found.batches == 3
    assert len(made) == 2
    assert isinstance(found, Ranges)
