"""The update kernels, in Triton's interpreter on a CPU, against FP64: FP32 arithmetic with a bound, FP64 rounded once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are Triton's; torch's CUDA builds bring it")

from mpcompile.runtime.kernels.table import Rows
from mpcompile.runtime.kernels.update import (
    Rule,
    Scale,
    Shape,
    UpdateKernel,
    adam_numbers,
    available,
    serves,
    sgd_numbers,
)
from mpcompile.runtime.state_codes import flat, phase
from mpcompile.training.loss_scale.scale import LossScale, ScaleState, transition
from mpcompile.training.optimizer.low_states import decode, encode
from mpcompile.training.optimizer.split import join, split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not available(DEVICE), reason="needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)"),
    # The interpreter is NumPy, which warns of infinity times 0.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
SHAPE = Shape(chunk=64, look_chunk=128)
SIZES = [(13, 7), (64,), (), (128,), (3, 5, 2, 2), (0, 3)]


EXACT = Shape(chunk=64, look_chunk=128, wide=True)


def step_at(value: Tensor) -> Tensor:
    """One unit in the last place of FP32 numbers of this size."""
    near = value.abs().float()
    return (torch.nextafter(near, torch.full_like(near, float("inf"))) - near).double()


def off(got: Tensor, exact: Tensor, before: Tensor, change: float = 0.0) -> float:
    """The greatest distance from `exact`, as a part of what is allowed.

    Allowed is one unit in the last place of the numbers that the result is a sum of: where they cancel, the result is
    small and its own last place says nothing.  `change` of its own units are allowed to what was added, a quotient with
    a root in it, which FP32 rounds several times.
    """
    assert torch.isfinite(got).all()
    if not got.numel():
        return 0.0
    allowed = step_at(exact.abs() + before.abs()) + change * step_at(exact - before)
    return float(((got.double() - exact).abs() / allowed).max())


def worst(got: Any, exact: Any, before: Any, change: float = 4.0) -> float:
    return max(off(*each, change) for each in zip(got, exact, before, strict=True))


def copies(*lists: list[Tensor]) -> list[list[Tensor]]:
    return [[t.clone() for t in each] for each in lists]


def stored(master: Tensor, low: torch.dtype) -> Tensor:
    """A shadow of `master`; Triton's interpreter, unlike its compiler, cuts BF16 off instead of rounding it."""
    if DEVICE == "cuda" or low != torch.bfloat16:
        return master.to(low)
    return (master.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@dataclasses.dataclass
class Case:
    """Parameters with gradients and moments in the middle of training, and the same for an FP64 optimizer."""

    params: list[Tensor]
    grads: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]

    @classmethod
    def make(cls, low: torch.dtype = torch.bfloat16, wide: tuple[int, ...] = (), begun: float = 3.0) -> Case:
        torch.manual_seed(0)
        make: Any = lambda size: torch.randn(size, device=DEVICE)  # noqa: E731
        params = [make(size) * 0.02 for size in SIZES]
        params[4] = params[4].contiguous(memory_format=torch.channels_last)
        grads = [make(size).to(torch.float32 if i in wide else low) for i, size in enumerate(SIZES)]
        grads[4] = grads[4].contiguous(memory_format=torch.channels_last)
        keep = begun > 0
        first = [torch.randn_like(p) * 0.1 * keep for p in params]
        second = [torch.rand_like(p) * 0.01 * keep for p in params]
        return cls(params, grads, first, second, [torch.full((), begun, device=DEVICE) for _ in params])

    def rows(self, low: torch.dtype = torch.bfloat16, **changes: Any) -> Rows:
        shadows = [p.to(low) if i % 2 == 0 else None for i, p in enumerate(self.params)]
        empty: list[Any] = [None] * len(self.params)
        rows = Rows(self.params, [*self.first], [*self.second], shadows, empty, [*self.steps], [0] * len(self.params))
        return dataclasses.replace(rows, **changes)


def exact(
    optimizer: Any, case: Case, factor: float = 1.0, keys: tuple[str, str] | None = None, **numbers: Any
) -> tuple[list[Tensor], ...]:
    """Parameters and moments after torch's own optimizer in FP64, on the present values."""
    params = [p.double().requires_grad_() for p in case.params]
    made = optimizer(params, foreach=False, **numbers)
    for p, grad, m, v, count in zip(params, case.grads, case.first, case.second, case.steps, strict=True):
        p.grad = grad.double() * factor
        if keys:
            made.state[p] = {"step": count.cpu().double(), keys[0]: m.double(), keys[1]: v.double()}
        elif count:
            made.state[p] = {"momentum_buffer": m.double()}
    made.step()
    names = keys or ("momentum_buffer",)
    return ([p.detach() for p in params], *([made.state[p].get(n) for p in params] for n in names))


ADAMS = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01}),
    "adam without decay, maximized": (torch.optim.Adam, {"lr": 1e-3, "maximize": True}),
    "adam without memory": (torch.optim.Adam, {"lr": 1e-3, "betas": (0.0, 0.0)}),
}
KEYS = ("exp_avg", "exp_avg_sq")


LOW, MIXED, FP32 = (), (1, 2), tuple(range(6))
KINDS = [
    ("adamw", torch.bfloat16, LOW, SHAPE),
    ("adamw", torch.float16, LOW, SHAPE),
    ("adamw", torch.bfloat16, MIXED, SHAPE),
    ("adamw", torch.bfloat16, FP32, SHAPE),
    *((name, torch.bfloat16, MIXED, SHAPE) for name in ADAMS if name != "adamw"),
    *((name, torch.bfloat16, MIXED, EXACT) for name in ADAMS),
]


@pytest.mark.parametrize(("name", "low", "wide", "shape"), KINDS)
def test_adam_is_within_its_bound(name: str, low: torch.dtype, wide: tuple[int, ...], shape: Shape) -> None:
    optimizer, numbers = ADAMS[name]
    case = Case.make(low, wide)
    want = exact(optimizer, case, keys=KEYS, **numbers)
    before = copies(case.params, case.first, case.second)
    group = optimizer([torch.zeros(1)], **numbers).param_groups[0]
    rows = case.rows(low)
    assert serves(rows, low)
    groups = [adam_numbers(group, optimizer is torch.optim.AdamW)]
    kernel = UpdateKernel(rows, [(i,) for i in range(6)], case.grads, adam=True, groups=groups, low=low, shape=shape)
    kernel(case.grads)
    assert worst(case.params, want[0], before[0], 0.0 if shape.wide else 4.0) <= 1.0
    # Decay that is part of the gradient is a rounding of it more, which the second moment squares.
    coupled = 2.0 if numbers.get("weight_decay") and name != "adamw" and not shape.wide else 0.0
    for got, expected, old in zip((case.first, case.second), want[1:], before[1:], strict=True):
        assert worst(got, expected, old, coupled) <= 1.0
    assert [float(s) for s in case.steps] == [4.0] * 6
    for shadow, master in zip(rows.shadows, case.params, strict=True):
        assert shadow is None or torch.equal(shadow, stored(master, low))


@pytest.mark.parametrize("shape", [SHAPE, EXACT], ids=["fp32", "fp64"])
def test_infinite_moments_do_not_reach_the_masters(shape: Shape) -> None:
    case = Case.make(wide=FP32)
    case.grads[1][3] = 1e30  # the square of it is infinite: the quotient is 0, as ATen's
    case.second[1][5] = float("inf")
    before = case.params[1].clone()
    adamw(case, groups=[adam_numbers({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}, True)],
          shape=shape)(case.grads)  # fmt: skip
    if not shape.wide:
        assert case.second[1][3] == float("inf")
        assert case.params[1][3] == before[3]
    assert case.second[1][5] == float("inf")
    assert case.params[1][5] == before[5]
    assert torch.isfinite(case.params[1]).all()


SGDS = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
]


@pytest.mark.parametrize("shape", [SHAPE, EXACT], ids=["fp32", "fp64"])
@pytest.mark.parametrize("begun", [0.0, 1.0])
@pytest.mark.parametrize("numbers", SGDS, ids=str)
def test_sgd_is_within_its_bound(numbers: dict[str, Any], begun: float, shape: Shape) -> None:
    case = Case.make(wide=(0,), begun=begun)
    want = exact(torch.optim.SGD, case, **numbers)
    # The step is a sum too.
    terms = [p.abs() + numbers["lr"] * m.abs() for p, m in zip(case.params, case.first, strict=True)]
    (first,) = copies(case.first)
    group = torch.optim.SGD([torch.zeros(1)], **numbers).param_groups[0]
    none: list[Any] = [None] * 6
    momentum = bool(numbers.get("momentum"))
    rows = case.rows(firsts=case.first if momentum else none, seconds=none)
    rows = dataclasses.replace(rows, counters=case.steps if numbers.get("dampening") else none)
    kernel = UpdateKernel(rows, [(i,) for i in range(6)], case.grads, adam=False, groups=[sgd_numbers(group)],
                          low=torch.bfloat16, shape=shape)  # fmt: skip
    kernel(case.grads)
    assert worst(case.params, want[0], terms, 0.0 if shape.wide else 4.0) <= 1.0
    if momentum:
        coupled = 2.0 if numbers.get("weight_decay") and not shape.wide else 0.0
        assert worst(case.first, want[1], first, coupled) <= 1.0


def test_it_agrees_with_atens_fused_kernel() -> None:
    case = Case.make(wide=tuple(range(6)))
    params = [p.clone() for p in case.params]
    aten = torch.optim.AdamW(params, lr=1e-3, fused=True)
    for p, grad, m, v, count in zip(params, case.grads, case.first, case.second, case.steps, strict=True):
        p.grad = grad
        aten.state[p] = {"step": count.clone(), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    aten.step()
    kernel = adamw(case)
    kernel(case.grads)
    for mine, theirs in zip(case.params, params, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def adamw(case: Case, rows: Rows | None = None, parts: Any = None, grads: Any = None, **options: Any) -> UpdateKernel:
    group = torch.optim.AdamW([torch.zeros(1)], lr=1e-3).param_groups[0]
    options = {"groups": [adam_numbers(group, True)], "low": torch.bfloat16, "shape": SHAPE, **options}
    parts = parts or [(i,) for i in range(len(case.params))]
    return UpdateKernel(rows or case.rows(), parts, grads or case.grads, adam=True, **options)


def owned(rule: LossScale, accumulate: int = 1, state: ScaleState | None = None) -> tuple[Rule, Scale, ScaleState]:
    state = state or rule.initial(DEVICE)
    seed = state.scale * (1.0 / accumulate)
    settings = Rule(rule.kind == "dynamic", rule.growth, rule.backoff, rule.interval, rule.floor, rule.cap,
                    rule.hysteresis, rule.refill == "clean-step", rule.is_off)  # fmt: skip
    return settings, Scale(*state, seed), state


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_gradients_are_unscaled_and_clipped(max_norm: float | None) -> None:
    case = Case.make()
    rule, scale, _ = owned(LossScale.static(8.0))
    norm = torch.cat([g.double().flatten() for g in case.grads]).norm() / 8
    clip = 1.0 if max_norm is None else min(1.0, max_norm / (float(norm) + 1e-6))
    kernel = adamw(case, max_norm=max_norm, rule=rule, scale=scale)
    factor = torch.tensor(clip).float() * torch.tensor(1 / 8).float()
    before = [p.clone() for p in case.params]
    want = exact(torch.optim.AdamW, case, float(factor), keys=KEYS, lr=1e-3)
    result = kernel(case.grads)
    assert result.finite.item() is True
    torch.testing.assert_close(result.norm.double(), norm, rtol=1e-6, atol=0)
    assert not torch.equal(case.params[0], before[0])
    for got, expected in zip((case.params, case.first, case.second), want, strict=True):
        # The kernel's factor is FP32: the last place of it may differ.
        torch.testing.assert_close(list(map(torch.Tensor.double, got)), expected, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_skipped_step_changes_nothing(bad: float) -> None:
    case = Case.make(wide=(1,))
    rule, scale, state = owned(LossScale.dynamic(init=1024.0))
    rows = case.rows()
    held = [t for t, _, _ in rows.cells()]
    kernel = adamw(case, rows, rule=rule, scale=scale)
    case.grads[4][2, 1, 1, 1] = bad
    for _ in range(2):
        before = [t.clone() for t in held]
        result = kernel(case.grads)
        assert result.finite.item() is False
        assert all(map(torch.equal, held, before))
    assert state.scale.item() == 256.0
    assert (state.steps.item(), state.skipped.item()) == (0, 2)


def test_large_finite_gradients_are_finite() -> None:
    case = Case.make(wide=(1,))
    case.grads[1][3] = 1e30  # its square is not
    rule, scale, _ = owned(LossScale.static(1.0))
    assert adamw(case, rule=rule, scale=scale)(case.grads).finite.item() is True


RULES = [
    LossScale.dynamic(init=4.0, interval=2, floor=1.0, cap=16.0),
    LossScale.dynamic(init=4.0, interval=3, growth=1.7, backoff=0.3, floor=0.5, hysteresis=2),
    LossScale.dynamic(init=3e38, interval=1, cap=float("inf"), floor=0.0),
    LossScale.dynamic(init=8.0, interval=2, hysteresis=3, refill="clean-step"),
    LossScale.static(2.0),
]


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_the_loss_scale_moves_as_the_rule_says(rule: LossScale) -> None:
    settings, scale, state = owned(rule, accumulate=3)
    want = rule.initial(DEVICE)
    grad, param = torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE)
    none: list[Any] = [None]
    rows = Rows([param], none, none, none, none, none, [0])
    groups = [sgd_numbers(torch.optim.SGD([torch.zeros(1)], lr=0.0).param_groups[0])]
    kernel = UpdateKernel(rows, [(0,)], [grad], adam=False, low=torch.bfloat16, rule=settings, scale=scale,
                          accumulate=3, shape=SHAPE, groups=groups)  # fmt: skip
    pattern = "ffbfbbbffbbffbf"
    for letter in pattern:
        grad.fill_(1.0 if letter == "f" else float("nan"))
        result = kernel([grad])
        want = transition(rule, want, torch.tensor(letter == "f", device=DEVICE))
        assert [t.item() for t in state] == [t.item() for t in want]
        assert result.scale.item() == want.scale.item()
        assert torch.equal(scale.seed, want.scale * (1.0 / 3))


def test_two_and_three_gradients_of_a_tied_weight_are_summed() -> None:
    case = Case.make(wide=(1,))
    extra = [torch.randn_like(case.grads[0]), torch.randn_like(case.params[0]), torch.randn_like(case.params[1])]
    grads = [*case.grads, *extra]
    parts = [(0, 6, 7), (1, 8), *((i,) for i in range(2, 6))]
    rule, scale, _ = owned(LossScale.static(1.0))
    kernel = adamw(case, parts=parts, grads=grads, rule=rule, scale=scale)
    # Sums are FP32.
    case.grads[0] = grads[0].float() + (grads[6].float() + grads[7])
    case.grads[1] = grads[1].float() + grads[8]
    norm = torch.cat([g.double().flatten() for g in case.grads]).norm()
    want = exact(torch.optim.AdamW, case, keys=KEYS, lr=1e-3)
    before = copies(case.params, case.first, case.second)
    result = kernel(grads)
    torch.testing.assert_close(result.norm.double(), norm, rtol=1e-6, atol=0)
    for got, expected, old in zip((case.params, case.first, case.second), want, before, strict=True):
        assert worst(got, expected, old) <= 1.0


def test_gradients_that_lie_otherwise_are_read_right() -> None:
    case = Case.make()
    want = exact(torch.optim.AdamW, case, keys=KEYS, lr=1e-3)
    grads = list(case.grads)
    grads[0] = grads[0].t().contiguous().t()
    grads[4] = grads[4].contiguous()
    kernel = adamw(case, grads=grads)
    (before,) = copies(case.params)
    kernel(grads)
    assert worst(case.params, want[0], before) <= 1.0


@pytest.mark.parametrize("offset", [1, 4])
def test_tensors_that_lie_on_no_boundary(offset: int) -> None:
    case = Case.make()
    case.params = [torch.empty(p.numel() + offset, device=DEVICE)[offset:].view(p.shape).copy_(p)
                   if i != 4 else p for i, p in enumerate(case.params)]  # fmt: skip
    want = exact(torch.optim.AdamW, case, keys=KEYS, lr=1e-3)
    (before,) = copies(case.params)
    adamw(case)(case.grads)
    assert worst(case.params, want[0], before) <= 1.0


def test_split_masters_are_read_and_written_whole() -> None:
    case = Case.make()
    want = exact(torch.optim.AdamW, case, keys=KEYS, lr=1e-3)
    halves = {i: split(case.params[i]) for i in (0, 3)}
    rows = case.rows()
    masters = [halves[i][0] if i in halves else p for i, p in enumerate(case.params)]
    lowers = [halves[i][1] if i in halves else None for i in range(6)]
    rows = dataclasses.replace(rows, masters=masters, lowers=lowers, shadows=[None] * 6)
    assert serves(rows, torch.bfloat16)
    (before,) = copies(case.params)
    adamw(case, rows)(case.grads)
    for i, (high, low) in halves.items():
        whole = join(high, low)
        assert off(whole, want[0][i], before[i], 4.0) <= 1.0
        assert all(map(torch.equal, split(whole), (high, low)))
    assert max(off(case.params[i], want[0][i], before[i], 4.0) for i in (1, 2, 4, 5)) <= 1.0


@pytest.mark.parametrize("wide", [False, True], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", ["bf16", "8bit"])
def test_low_moments_are_rounded_to_a_neighbour(kind: str, wide: bool) -> None:
    """Of what the stored moments are exactly moved to; the masters move by the moments before they are rounded."""
    case = Case.make(wide=MIXED)
    firsts = [encode(m, True, kind) for m in case.first]
    seconds = [encode(v, False, kind) for v in case.second]
    case.first, case.second = [decode(*m) for m in firsts], [decode(*v) for v in seconds]
    want = exact(torch.optim.AdamW, case, keys=KEYS, lr=1e-3)
    rows = case.rows(
        firsts=[m for m, _ in firsts], seconds=[v for v, _ in seconds],
        first_scales=[s for _, s in firsts], second_scales=[s for _, s in seconds],
    )  # fmt: skip
    assert serves(rows, torch.bfloat16)
    (before,) = copies(case.params)
    rule, scale, state = owned(LossScale.static(1.0))
    state.steps.fill_(41)
    kernel = adamw(case, rows, rule=rule, scale=scale, shape=Shape(chunk=512, look_chunk=128, wide=wide))
    kernel(case.grads)
    assert worst(case.params, want[0], before, 0.0 if wide else 4.0) <= 1.0
    for index, signed in ((1, True), (2, False)):
        stored = (rows.firsts, rows.seconds)[index - 1]
        scales = (rows.first_scales, rows.second_scales)[index - 1]
        for low, blocks, value in zip(stored, scales, want[index], strict=True):
            assert low is not None
            # What the library's own rounding makes of the exact value; where it stands between two codes by less than FP32
            # tells, one beside it.
            mine, theirs = encode(value.float(), signed, kind, phase(torch.tensor(41, device=DEVICE), signed))
            apart = (flat(low).view(mine.dtype).float() - flat(mine).float()).abs()
            step = 1.0 if kind == "8bit" else flat(mine).float().abs() * 2.0**-7
            assert (apart <= step).all()
            assert (apart > 0).sum() <= 0.02 * apart.numel() + 1
            if theirs is not None:
                assert blocks is not None
                torch.testing.assert_close(blocks, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["bf16", "8bit"])
def test_low_moments_of_a_skipped_step_stay(kind: str) -> None:
    case = Case.make()
    firsts, seconds = [encode(m, True, kind) for m in case.first], [encode(v, False, kind) for v in case.second]
    rows = case.rows(
        firsts=[m for m, _ in firsts], seconds=[v for v, _ in seconds],
        first_scales=[s for _, s in firsts], second_scales=[s for _, s in seconds],
    )  # fmt: skip
    rule, scale, _ = owned(LossScale.static(1.0))
    held = [t for t, _, _ in rows.cells()]
    before = [t.clone() for t in held]
    case.grads[4][2, 1, 1, 1] = float("nan")
    kernel = adamw(case, rows, rule=rule, scale=scale, shape=Shape(chunk=256, look_chunk=128))
    assert kernel(case.grads).finite.item() is False
    assert all(map(torch.equal, held, before))
    mixed = dataclasses.replace(rows, firsts=[*rows.firsts[:-1], torch.zeros_like(case.params[-1])])
    assert not serves(mixed, torch.bfloat16)
    with pytest.raises(ValueError, match="blocks of 256" if kind == "8bit" else "count of steps"):
        adamw(case, rows)


def test_groups_have_their_numbers_and_may_change_them() -> None:
    case = Case.make()
    numbers = [{"lr": 1e-3, "weight_decay": 0.5}, {"lr": 1e-1, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.0}]
    groups = [torch.optim.AdamW([torch.zeros(1)], **n).param_groups[0] for n in numbers]
    rows = dataclasses.replace(case.rows(), groups=[0, 1, 0, 1, 0, 1])
    kernel = adamw(case, rows, groups=[adam_numbers(g, True) for g in groups])
    for lr in (1e-3, 0.7):
        numbers[0]["lr"] = groups[0]["lr"] = lr
        wants = [exact(torch.optim.AdamW, case, keys=KEYS, **n) for n in numbers]
        kernel.set_groups([adam_numbers(g, True) for g in groups])
        (before,) = copies(case.params)
        kernel(case.grads)
        for i, want in enumerate(wants):
            assert worst(case.params[i::2], want[0][i::2], before[i::2]) <= 1.0


def test_tensors_that_moved_are_found() -> None:
    case = Case.make()
    rows = case.rows()
    kernel = adamw(case, rows)
    kernel(case.grads)
    old = [p.clone() for p in case.params]
    for p in case.params:
        p.data = p.data.clone()
    away = [p.clone() for p in case.params]
    case.grads = [g.clone() for g in case.grads]
    want = exact(torch.optim.AdamW, case, keys=KEYS, lr=1e-3)
    (before,) = copies(case.params)
    kernel(case.grads)
    assert all(map(torch.equal, old, away))
    assert worst(case.params, want[0], before) <= 1.0


def test_a_grad_scalers_tensors_are_honoured() -> None:
    case = Case.make()
    kernel = adamw(case, max_norm=0.5)
    found, scale = torch.zeros((), device=DEVICE), torch.full((), 4.0, device=DEVICE)
    norm = torch.cat([g.double().flatten() for g in case.grads]).norm() / 4
    want = exact(torch.optim.AdamW, case, 0.5 / (float(norm) + 1e-6) / 4, keys=KEYS, lr=1e-3)
    kernel(case.grads, found, scale)
    torch.testing.assert_close(list(map(torch.Tensor.double, case.params)), want[0], rtol=3e-7, atol=1e-9)
    before = [p.clone() for p in case.params]
    kernel(case.grads, found + 1, scale)
    assert all(map(torch.equal, case.params, before))


def test_what_the_kernels_cannot_update_is_refused() -> None:
    case = Case.make()
    assert not serves(case.rows(masters=[p.double() for p in case.params]), torch.bfloat16)
    assert not serves(case.rows(), torch.float16)
    turned = [*case.first]
    turned[4] = turned[4].contiguous()
    assert not serves(case.rows(firsts=turned), torch.bfloat16)
    holes = [*case.params]
    holes[0] = torch.zeros(13, 14, device=DEVICE)[:, ::2]
    assert not serves(case.rows(masters=holes), torch.bfloat16)
    with pytest.raises(ValueError, match="gradients are FP32 or"):
        adamw(case, low=torch.float16)
