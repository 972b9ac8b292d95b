"""`mpcompile.optim`: torch's optimizers that read low gradients, write shadows and clip."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpcompile
from mpcompile import MPCompileError
from mpcompile.runtime import dynamo
from mpcompile.runtime.kernels.update import available
from mpcompile.shadows.low_gradients import READERS, use_shadows
from mpcompile.shadows.table import SHADOWS
from mpcompile.training.optimizer import reading_low

OPTIONS = {
    "AdamW": [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True, "weight_decay": 0.1, "maximize": True}],
    "Adam": [{"betas": (0.8, 0.9), "weight_decay": 0.1}, {"fused": True}],
    "SGD": [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}],
}
CASES = [(name, options) for name, each in OPTIONS.items() for options in each]


def net(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": weights, "lr": 0.05}, {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.02}]


class Pair:
    """torch's optimizer and ours, on equal models."""

    def __init__(self, name: str, options: dict[str, Any], norm: float | None = None) -> None:
        self.norm, self.models = norm, [net(), net()]
        self.theirs = getattr(torch.optim, name)(groups(self.models[0]), **options)
        self.ours = getattr(mpcompile.optim, name)(groups(self.models[1]), **options, max_grad_norm=norm)

    def give(self, seed: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> None:
        """Both get the same gradients; ours in `dtype`, torch's in FP32."""
        torch.manual_seed(seed)
        for theirs, ours in zip(*map(nn.Module.parameters, self.models), strict=True):
            grad = torch.randn(theirs.shape) * scale
            ours.grad = grad if dtype is None else grad.to(dtype)
            theirs.grad = ours.grad.float().clone()

    def step(self) -> None:
        if self.norm is not None:
            nn.utils.clip_grad_norm_(self.models[0].parameters(), self.norm)
        self.theirs.step()
        self.ours.step()

    def same(self) -> None:
        for theirs, ours in zip(*map(nn.Module.parameters, self.models), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert list(self.ours.state[ours]) == list(self.theirs.state[theirs])
            for key, value in self.theirs.state[theirs].items():
                torch.testing.assert_close(self.ours.state[ours][key], value, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [None, 0.7])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_they_are_torchs_bit_for_bit(
    name: str, options: dict[str, Any], dtype: torch.dtype | None, norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_low, "TOGETHER", {"cpu": 40})
    pair = Pair(name, options, norm)
    for seed in range(4):
        pair.give(seed, dtype)
        kept = [p.grad for p in pair.models[1].parameters()]
        pair.step()
        assert all(p.grad is grad for p, grad in zip(pair.models[1].parameters(), kept, strict=True))
        assert (pair.ours.grad_norm is None) == (norm is None)
    pair.same()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("norm", [None, 0.7])
def test_a_grad_scaler_divides_and_skips(name: str, norm: float | None) -> None:
    pair = Pair(name, {}, norm)
    scalers = [torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2) for _ in range(2)]
    for seed in range(5):
        for one in scalers:
            one.scale(torch.zeros(1))
        pair.give(seed, torch.float16, 64.0 if seed != 2 else float("inf"))
        scalers[0].unscale_(pair.theirs)
        if norm is not None:
            nn.utils.clip_grad_norm_(pair.models[0].parameters(), norm)
        for scaler, optimizer in zip(scalers, (pair.theirs, pair.ours), strict=True):
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert not {"grad_scale", "found_inf"} & set(vars(pair.ours))
        if seed != 2:
            pair.same()
    assert scalers[0].get_scale() < 2048.0


def test_a_norm_that_is_not_finite_changes_nothing() -> None:
    pair = Pair("AdamW", {}, 1.0)
    pair.give(0)
    pair.step()
    before = copy.deepcopy(pair.models[1].state_dict())
    pair.give(1, torch.bfloat16, float("nan"))
    pair.ours.step()
    torch.testing.assert_close(pair.models[1].state_dict(), before, rtol=0, atol=0)
    assert not pair.ours.grad_norm.isfinite()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_states_go_to_torch_and_back(name: str, options: dict[str, Any]) -> None:
    pair = Pair(name, options)
    for seed in range(6):
        if seed == 2:
            mine, others = pair.ours.state_dict(), pair.theirs.state_dict()
            assert mine["param_groups"] == others["param_groups"]
            pair.ours.load_state_dict(others)
            pair.theirs.load_state_dict(mine)
        pair.give(seed, torch.bfloat16)
        pair.step()
    pair.same()


def test_copies_clip_and_read_low_as_well() -> None:
    model = net()
    optimizer = mpcompile.optim.AdamW(model.parameters(), max_grad_norm=2.0)
    for made in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert made.max_grad_norm == 2.0
        assert all(READERS.reads_low(p) for p in made.param_groups[0]["params"])
    with pytest.raises(MPCompileError, match="MP541"):
        mpcompile.optim.SGD(model.parameters(), 0.1, max_grad_norm=0.0)


def test_hooks_run_once_and_schedulers_see_the_step() -> None:
    model, calls = net(), list[str]()
    optimizer = mpcompile.optim.SGD(model.parameters(), 0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for p in model.parameters():
        p.grad = torch.ones_like(p).bfloat16()
    assert optimizer.step(lambda: 3.0) == 3.0
    scheduler.step()
    assert calls == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


# What reaches a master.


def read(master: nn.Parameter) -> Tensor:
    (used,) = use_shadows([master], [master.detach().bfloat16()], low=True)
    return used


@pytest.fixture
def reader() -> tuple[nn.Parameter, Any]:
    torch.manual_seed(0)
    master = nn.Parameter(torch.randn(64))
    return master, mpcompile.optim.SGD([master], 0.1)


A, B = 1.0 + 2.0**-7, 2.0**-8 + 2.0**-14


def test_one_gradient_stays_low(reader: tuple[nn.Parameter, Any]) -> None:
    master, _ = reader
    read(master).sum().mul(A).backward()
    assert master.grad.dtype == torch.bfloat16
    master.grad = None
    read(master).sum().mul(A).backward()
    assert master.grad.dtype == torch.bfloat16
    assert not READERS.owed[id(master)]


def twice(master: nn.Parameter) -> None:
    (read(master) * A).sum().backward()
    (read(master) * B).sum().backward()


def both_forwards_first(master: nn.Parameter) -> None:
    first, second = (read(master) * A).sum(), (read(master) * B).sum()
    first.backward()
    second.backward()


def one_backward(master: nn.Parameter) -> None:
    ((read(master) * A).sum() + (read(master) * B).sum()).backward()


def kept_graph(master: nn.Parameter) -> None:
    used = read(master)
    (used * A).sum().backward(retain_graph=True)
    (used * B).sum().backward()


def zeroed_in_place(master: nn.Parameter) -> None:
    read(master).sum().backward()
    master.grad.zero_()
    twice(master)


@pytest.mark.parametrize("way", [twice, both_forwards_first, one_backward, kept_graph, zeroed_in_place])
def test_sums_are_fp32(reader: tuple[nn.Parameter, Any], way: Callable[[nn.Parameter], None]) -> None:
    """A + B needs 15 bits: no low sum holds it."""
    master, _ = reader
    way(master)
    assert master.grad.dtype == torch.float32
    want = torch.tensor(A).bfloat16().float() + torch.tensor(B).bfloat16().float()
    assert torch.equal(master.grad, want.expand(64))
    assert not READERS.owed[id(master)]


def test_a_forward_without_backward_is_forgotten(reader: tuple[nn.Parameter, Any]) -> None:
    master, _ = reader
    used = read(master)
    assert READERS.owed[id(master)] == 1
    del used
    gc.collect()
    read(master).sum().backward()
    assert master.grad.dtype == torch.bfloat16


def test_who_does_not_read_low_gets_fp32() -> None:
    master = nn.Parameter(torch.randn(8))
    optimizer = mpcompile.optim.SGD([master], 0.1)
    (used,) = use_shadows([master], [master.detach().bfloat16()], low=False)
    used.sum().backward()
    assert master.grad.dtype == torch.float32
    del optimizer
    gc.collect()
    master.grad = None
    read(master).sum().backward()
    assert master.grad.dtype == torch.float32
    other = nn.Parameter(torch.randn(8))
    torch.optim.SGD([other], 0.1)
    read(other).sum().backward()
    assert other.grad.dtype == torch.float32


# In training.


def trained(kind: str, microbatches: int = 1, **options: Any) -> tuple[list[float], nn.Module, set[torch.dtype]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 64))
    module = mpcompile.optim if kind == "ours" else torch.optim
    optimizer = module.AdamW(model.parameters(), lr=1e-2, **options)
    mp = mpcompile.mpcompile(model, "bf16", low=["*"])
    losses, seen = [], set[torch.dtype]()
    for step in range(4):
        torch.manual_seed(step)
        for _ in range(microbatches):
            loss = mp(torch.randn(32, 64)).square().mean()
            loss.backward()
            losses.append(loss.item())
        seen |= {model[2].weight.grad.dtype}
        optimizer.step()
        optimizer.zero_grad()
    return losses, model, seen


@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_drop_in_trains_the_same_bit_for_bit(microbatches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's optimizer reads what a low gradient is in FP32."""
    monkeypatch.setattr(dynamo, "LARGE", 1 << 12)
    losses, model, seen = trained("torch", microbatches)
    mine, same, low = trained("ours", microbatches)
    assert mine == losses
    torch.testing.assert_close(same.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert seen == {torch.float32}
    assert low == {torch.bfloat16 if microbatches == 1 else torch.float32}


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_the_step_takes_them_for_torchs() -> None:
    results = []
    for module, norms in ((torch.optim, (None, 0.1)), (mpcompile.optim, (0.1, None))):
        model = net()
        options = {} if norms[0] is None else {"max_grad_norm": norms[0]}
        optimizer = module.AdamW(model.parameters(), lr=1e-2, **options)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        mp = mpcompile.mpcompile(model, "bf16", low=["*"], backend="eager")
        step = mp.train_step(optimizer, loss_fn, max_grad_norm=norms[1])
        torch.manual_seed(1)
        results.append([*(step(torch.randn(4, 8)).grad_norm.item() for _ in range(3)), model.state_dict()])
    assert results[0][:3] == results[1][:3]
    torch.testing.assert_close(results[0][3], results[1][3], rtol=0, atol=0)
    with pytest.raises(MPCompileError, match="MP541"):
        mp.train_step(optimizer, loss_fn, max_grad_norm=0.2)


# The kernels, in Triton's interpreter.


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not available("cpu"):
        pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)")
    monkeypatch.setattr(reading_low, "DEVICES", {"cpu"})


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_write_shadows_that_are_not_stale(name: str) -> None:
    pair = Pair(name, {"momentum": 0.9} if name == "SGD" else {"fused": True}, 0.7)
    masters = list(pair.models[1].parameters())
    # FP16: the interpreter cuts BF16 off.
    shadows = [SHADOWS.get(p, torch.float16) for p in masters]
    for seed in range(4):
        pair.give(seed, torch.float16)
        casts = SHADOWS.casts
        pair.step()
        assert [SHADOWS.get(p, torch.float16) is s for p, s in zip(masters, shadows, strict=True)] == [True] * 4
        assert SHADOWS.casts == casts
        for p, shadow in zip(masters, shadows, strict=True):
            assert torch.equal(shadow, p.half())
        for theirs, ours in zip(*map(nn.Module.parameters, pair.models), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.usefixtures("kernels")
def test_a_skipped_step_and_an_edit_after_it_leave_no_shadow_stale() -> None:
    pair = Pair("AdamW", {"fused": True}, 1.0)
    masters = list(pair.models[1].parameters())
    before = [SHADOWS.get(p, torch.float16).clone() for p in masters]
    with torch.no_grad():
        masters[0].mul_(2.0)
    pair.give(0, torch.float16, float("nan"))
    pair.ours.step()
    for p in masters:
        assert torch.equal(SHADOWS.get(p, torch.float16), p.half())
    assert not torch.equal(before[0], masters[0].half())

    def doubled(*_: Any) -> None:
        with torch.no_grad():
            masters[2].mul_(2.0)

    pair.ours.register_step_post_hook(doubled)
    pair.give(1, torch.float16)
    pair.ours.step()
    casts = SHADOWS.casts
    for p in masters:
        assert torch.equal(SHADOWS.get(p, torch.float16), p.half())
    assert SHADOWS.casts == casts + 1
