"""`mp.compare`: errors against values worked out by hand, FP32's lane against the model itself, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcompile.api import mpcompile
from mpcompile.compiler import settings_of
from mpcompile.errors import MPCompileError
from mpcompile.ranges import Call
from mpcompile.report.comparison import Comparison, ErrorRow, headroom, mark_noise
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.numerics.compare import Rows, compare
from mpcompile.training.numerics.lockstep import Lockstep
from mpcompile.training.numerics.subject import Differentiable, subject

FREE = "device=free-low"


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def compared(model: nn.Module, low: str, *batch: Any, **options: Any) -> Comparison:
    return mpcompile(model, f"low={low},{FREE}", backend="eager").compare(*batch, **options)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(32, 48, bias=False), nn.Linear(48, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_errors_of_two_products_by_hand() -> None:
    model, low = Two(), torch.bfloat16
    x = torch.randn(8, 32)
    first, second = model.a.weight.detach(), model.b.weight.detach()
    rounded = x.to(low).float() @ first.to(low).float().T
    plan_a, full_a = rounded.to(low).float(), x @ first.T
    fed_b = (full_a.to(low).float() @ second.to(low).float().T).to(low).float()
    plan_b, full_b = (plan_a @ second.to(low).float().T).to(low).float(), full_a @ second.T
    found = compared(model, "bf16", x)
    a, b = found.row("linear"), found.row("linear_1")
    assert (a.dtype, b.dtype) == ("bf16", "bf16")
    assert a.error == pytest.approx(off(plan_a, full_a), rel=0.02)
    assert a.own == a.error
    assert a.inherited == 0
    assert b.error == pytest.approx(off(plan_b, full_b), rel=0.02)
    assert b.own == pytest.approx(off(fed_b, full_b), rel=0.02)
    assert b.inherited == pytest.approx(float((plan_b - fed_b).double().norm() / full_b.double().norm()), rel=0.02)
    assert (a.module, b.module) == ("a", "b")
    assert a.elements == 8 * 48
    assert a.largest == pytest.approx(float(full_a.abs().max()), rel=1e-5)


def test_a_gradient_by_hand() -> None:
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]))
    x = torch.tensor([[1.0 + 2**-9, 1, 1, 1]])  # BF16 has 8 bits: it reads 1
    found = compared(model, "bf16", x, loss_fn=lambda m, x: m(x).sum())
    # d/dW = ones ⊗ x: FP32 has (1 + 2^-9, 1, 1, 1) in both rows, the plan (1, 1, 1, 1).
    full = x.repeat(2, 1)
    assert found.row("weight").error == pytest.approx(off(torch.ones(2, 4), full), rel=1e-4)
    assert found.loss_is == "loss_fn"
    assert found.loss[1] == pytest.approx(float(model(x).sum().detach()), rel=1e-6)


def test_what_overflows_and_what_vanishes_is_counted() -> None:
    def scaled(factor: float, x: Tensor) -> Comparison:
        model = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.eye(4) * factor)
        return compared(model, "fp16", x, gradients=False)

    x = torch.tensor([[60000.0, 30000, 1, 2**-20], [1e-7, 2e-8, 0, 1]])
    found = scaled(2.0, x)
    row = found.row("linear")
    assert row.overflow == 1  # 120,000 alone: 60,000 is a number of FP16
    assert row.error == math.inf
    assert row.underflow == 0  # 4e-8 rounds to 2^-24
    assert row.headroom == pytest.approx(math.log2(65504 / 120000))
    assert not found.finite
    assert found.loss_is == ""
    assert scaled(1.0, x).row("linear").underflow == 1  # 2e-8 is below 2^-25


class Everything(nn.Module):
    """Norms, attention, dropout, a convolution, an embedding, a loss: with numbers that FP32 needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.qkv = nn.Embedding(20, 32), nn.Linear(32, 96)
        self.norm, self.drop, self.out = nn.LayerNorm(32), nn.Dropout(0.3), nn.Linear(32, 20)
        self.conv, self.bn = nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm1d(6)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.table(tokens)
        q, k, v = self.qkv(self.norm(x)).view(4, 6, 3, 2, 16).permute(2, 0, 3, 1, 4)
        x = x + self.drop(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, 6, 32))
        x = self.bn(self.conv(x))
        return nn.functional.cross_entropy(self.out(x).flatten(0, 1), labels.flatten())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.out = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0]).square().mean()


class Rounds(nn.Module):
    """The program rounds by itself: FP32 keeps that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).bfloat16().float()).square().sum()


TOKENS = torch.arange(24).reshape(4, 6) % 20
CASES = {
    "everything": (Everything, (TOKENS, TOKENS.flip(0))),
    "recurrent": (Recurrent, (torch.linspace(-1, 1, 80).reshape(2, 5, 8),)),
    "rounds": (Rounds, (torch.linspace(-2, 2, 64).reshape(4, 16),)),
}


@pytest.mark.parametrize(
    ("name", "low"),
    [("everything", "bf16"), ("everything", "fp16"), ("recurrent", "bf16"), ("recurrent", "fp16"), ("rounds", "fp16")],
)
def test_the_fp32_lane_is_the_model_itself(name: str, low: str) -> None:
    """Loss and gradients of the raised graph are those of the model run eagerly in FP32, with the same mask."""
    kind, batch = CASES[name]
    model = kind()
    model.eval() if low == "bf16" else model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    found = subject(model, Differentiable(), Batch(batch, {}), settings_of(f"low={low},{FREE}", inner="eager"))
    rows = Rows(found, low)
    seed = torch.ones(())
    outputs = Lockstep(found.module, found.group, found.rounded, rows).compare([*found.inputs, seed],
                                                                               [*found.full, seed])  # fmt: skip
    loss = model(*batch)
    loss.backward()
    torch.testing.assert_close(outputs[found.loss_at].full, loss.detach(), rtol=1e-5, atol=1e-6)
    grads = dict[str, Tensor]()
    for place, key in found.gradients:
        grads[key] = grads.get(key, 0) + outputs[place].full
    assert grads.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-4, atol=2e-6, msg=key)
    assert any(
        lanes.plan.dtype != torch.float32 or off(lanes.plan, lanes.full) for lanes in outputs[found.loss_at + 1 :]
    )


def test_the_masks_are_the_same_in_both_runs() -> None:
    model = Everything()
    found = compared(model, "bf16", *CASES["everything"][1])
    assert found.row("dropout").error < 0.02  # with masks of its own it would be above 0.5
    assert found.loss_is == "the model's loss"
    noisy = compared(Noisy(), "bf16", torch.ones(4, 8))
    assert noisy.row("linear").error < 0.02


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x + torch.randn_like(x)).square().mean()


def test_nothing_of_the_users_is_changed() -> None:
    model = Everything()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    one = compared(model, "fp16", *CASES["everything"][1], autocast=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    two = compared(model, "fp16", *CASES["everything"][1])
    assert [row.to_dict() for row in one.values] == [row.to_dict() for row in two.values]
    assert one.autocast is not None
    assert {row.id for row in one.autocast.parameters} == {row.id for row in one.parameters}
    assert "autocast" in str(one)
    assert json.loads(one.to_json())["autocast"]["policy"].startswith("low=fp16,plan=autocast")


def test_nothing_is_changed_by_values_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
    before = copy.deepcopy(model.state_dict())
    compared(model, "bf16", torch.randn(4, 8), gradients=False)
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())


def test_values_are_freed_after_their_last_reader() -> None:
    """A deep chain, forward alone: three values of each lane are alive, whatever the depth."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(20)))
    found = subject(model, Differentiable(), Batch((torch.ones(2, 8),), {}), settings_of(f"bf16,{FREE}", inner="eager"),
                    gradients=False)  # fmt: skip
    alive, most = list[Any](), 0

    def look(node: Any, lanes: Any) -> None:
        nonlocal most
        if node.op == "call_function":
            alive.append(weakref.ref(lanes.plan))
            most = max(most, sum(one() is not None for one in alive))

    with torch.no_grad():
        Lockstep(found.module, found.group, found.rounded, look).compare(found.inputs, found.full)
    assert len(alive) >= 40
    assert most <= 4


def test_a_model_without_a_loss_is_differentiated_through_all_its_outputs() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"one": self.a(x), "more": (self.b(x), x.sum().long())}

    found = compared(Several(), "bf16", torch.randn(4, 8))
    assert found.loss_is == "a projection of the outputs"
    assert {row.id for row in found.parameters} == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert all(row.largest > 0 for row in found.parameters)


def test_a_frozen_model_is_differentiated_by_all_of_it() -> None:
    model = Two().requires_grad_(False)
    assert {row.id for row in compared(model, "bf16", torch.randn(8, 32)).parameters} == {"a.weight", "b.weight"}
    assert all(not p.requires_grad for p in model.parameters())


def test_a_loss_scale_backs_off_as_training_does() -> None:
    def steep(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sum() * 100.0

    model, x = Two(), torch.randn(8, 32) * 10
    found = compared(model, "fp16", x, loss_fn=steep)
    assert 1 <= found.scale < 65536
    assert any("overflow above a loss scale" in note for note in found.notes)
    assert found.finite
    assert not compared(model, "fp16", x, loss_fn=steep, scale=65536.0).finite


@pytest.mark.fp32_products
def test_fp32_has_nothing_to_compare() -> None:
    found = mpcompile(Two(), "fp32", backend="eager").compare(torch.randn(8, 32))
    assert {row.error for row in found.rows} == {0.0}
    assert any("nothing to compare" in note for note in found.notes)


def test_what_compares_nothing_says_so() -> None:
    model, bad = Two(), torch.full((8, 32), math.nan)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(MPCompileError, match="MP561"):
            compared(model, "bf16", torch.randn(8, 32), scale=scale)
    assert any("FP32's own loss is not finite" in note for note in compared(model, "bf16", bad).notes)
    with pytest.raises(MPCompileError, match="MP561"):
        mpcompile(model, f"low=fp16,{FREE}", backend="eager").calibrate([bad])


def test_no_batch_is_refused() -> None:
    with pytest.raises(MPCompileError, match="MP561"):
        compare(Two(), settings_of(f"bf16,{FREE}"), (), {})


class Scaled(nn.Module):
    """Its forward has keywords that `compare` has as options."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Two()

    def forward(self, x: Tensor, scale: float = 1.0, *, autocast: bool = False) -> Tensor:
        return self.inner(x) * (2.0 if autocast else scale)


def test_a_keyword_of_the_model_is_never_taken_for_an_option() -> None:
    mp, x = mpcompile(Scaled(), f"low=fp16,{FREE}", backend="eager"), torch.randn(8, 32)
    for name, value in (("scale", 3.0), ("autocast", True)):
        with pytest.raises(MPCompileError, match="MP562"):
            mp.compare(x, **{name: value})
    found = mp.compare(Call((x,), {"scale": 3.0}), scale=256.0)
    assert found.scale == 256.0
    plain = mp.compare(x, gradients=False)
    assert found.row("mul").largest == pytest.approx(3 * plain.row("linear_1").largest, rel=1e-5)
    twice = mp.compare(Call((x,), {"autocast": True}), autocast=True)
    assert twice.autocast is not None
    assert twice.row("mul").largest == pytest.approx(2 * plain.row("linear_1").largest, rel=1e-5)
    with pytest.raises(MPCompileError, match="MP562"):
        mp.compare(Call((x,)), mask=None)
    with pytest.raises(MPCompileError, match="MP562"):
        mp.compare(x, loss_fn=lambda model, x, gradients=1.0: model(x).sum(), gradients=False)


def test_batches_join_to_their_worst() -> None:
    model = Two()
    torch.manual_seed(1)
    one, two = (compared(model, "bf16", torch.randn(8, 32)) for _ in range(2))
    both = one.joined(two)
    assert both.batches == 2
    assert both.row("linear").error == max(one.row("linear").error, two.row("linear").error)
    assert both.row("linear").elements == 2 * one.row("linear").elements


def row(name: str, node: str, largest: float, own: float = 0.0) -> ErrorRow:
    return ErrorRow(name, node, "op", "backward", "m", "", "bf16", own, own, 0.0, 0, 0, 1, largest, 1.0)


def test_what_cancels_is_no_error() -> None:
    rows = mark_noise([row("w", "n", 1.0, 0.1), row("b", "n", 1e-8, 1.5), row("c", "m", 1e-8, 0.2)], lambda r: r.node)
    assert [one.noise for one in rows] == [False, True, False]
    found = Comparison("p", "bf16", "cpu", "x", (1.0, 1.0), 1.0, (), rows)
    assert [one.id for one in found.rows] == ["c", "w", "b"]
    assert found.by_module()[0].error == 0.2


def test_headroom_of_zeros_is_without_end() -> None:
    assert headroom(0.0, 65504.0) == math.inf
    assert headroom(math.inf, 65504.0) == -math.inf


class InPlace(nn.Module):
    """Writes through views, to casts and to what other lanes read, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.l, self.n = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x)
        h[:, :4].mul_(3.0)
        h.add_(x).mul_(0.5)
        return self.n(self.l(h.relu_())).tanh_().sum(1)


def test_a_write_in_place_without_a_backward_happens_once_in_each_run() -> None:
    model, x = InPlace(), torch.randn(16, 8)
    before = copy.deepcopy(model.state_dict())
    without, beside = compared(model, "bf16", x, gradients=False), compared(model, "bf16", x)
    # Where there is a backward, the norm is made of parts, and has other rows.
    sizes = {row.id: (row.largest, row.error) for row in beside.rows if row.phase == "forward" and "norm" not in row.op}
    shared = [row for row in without.rows if row.id in sizes]
    assert len(shared) >= 4, (list(sizes), [row.id for row in without.rows])
    for row in shared:
        assert row.largest == pytest.approx(sizes[row.id][0], rel=1e-5), row
        assert row.error == pytest.approx(sizes[row.id][1], rel=0.3, abs=1e-6), row
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
