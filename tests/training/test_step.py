"""The emitted step against plain torch: scale, clip, windows, sizes, syncs, state."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from mpcompile.api import mpcompile
from mpcompile.errors import TrainingError
from mpcompile.training.checkpoint_file import save_checkpoint
from mpcompile.training.loss_scale.scale import LossScale
from mpcompile.training.options import Options, StepOptions


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.body, self.batch_norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.drop(torch.relu(self.body(self.norm(self.embed(x)))))
        return self.head(self.batch_norm(h.flatten(0, 1)))


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y.flatten())


def batches(count, rows=6):
    return [(torch.randint(0, 20, (rows, 5)), torch.randint(0, 20, (rows, 5))) for _ in range(count)]


def make(policy="fp32", dropout=0.0, lr=0.01, backend="eager", **options):
    torch.manual_seed(0)
    model = Net(dropout)
    optimizer = optim.AdamW(model.parameters(), lr=lr)
    return model, optimizer, mpcompile(model, policy, backend=backend).train_step(optimizer, loss_of, **options)


def plain(model, optimizer, data, scaler, max_norm=None, accumulate=1):
    """What the step replaces: torch's own loop with GradScaler."""
    losses, norms = [], []
    for turn, (x, y) in enumerate(data):
        loss = loss_of(model, x, y)
        scaler.scale(loss / accumulate).backward()
        losses.append(loss.item())
        if (turn + 1) % accumulate:
            continue
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf")).item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses, norms


def close(model, twin, tolerance=2e-6):
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_equals_grad_scaler_with_clipping_and_windows(max_norm, accumulate):
    model, _, step = make(scale=LossScale.dynamic(1024.0, interval=2), max_grad_norm=max_norm, accumulate=accumulate)
    twin = copy.deepcopy(model)
    data = batches(6)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    losses, norms = plain(twin, optim.AdamW(twin.parameters(), lr=0.01), data, scaler, max_norm, accumulate)
    results = [step(*batch) for batch in data]
    # AdamW makes more of the last bit, which depends on how many threads sum.
    torch.testing.assert_close([r.loss.item() for r in results], losses, rtol=5e-5, atol=1e-5)
    assert [bool(r.stepped) for r in results] == [(i + 1) % accumulate == 0 for i in range(6)]
    found = [r.grad_norm.item() for r in results if r.stepped]
    torch.testing.assert_close(found, norms, rtol=5e-5, atol=1e-5)
    assert results[-1].scale.item() == scaler.get_scale()
    close(model, twin)


def test_a_window_equals_one_big_batch():
    model, _, step = make(accumulate=4)
    twin, _, whole = make()
    model.batch_norm, twin.batch_norm = nn.Identity(), nn.Identity()
    data = batches(4)
    for batch in data:
        last = step(*batch)
    big = whole(*(torch.cat(part) for part in zip(*data, strict=True)))
    torch.testing.assert_close(last.grad_norm, big.grad_norm, rtol=1e-5, atol=1e-6)
    close(model, twin, 1e-5)


def test_one_bad_microbatch_skips_its_whole_window_and_the_scale_holds_inside():
    model, optimizer, step = make(scale=LossScale.dynamic(64.0), accumulate=3)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        kept = model.norm.weight.clone()
        step(*batches(1)[0])
        model.norm.weight.fill_(float("nan"))
        middle = step(*batches(1)[0])
        model.norm.weight.copy_(kept)
    last = step(*batches(1)[0])
    assert middle.scale == 64
    assert not last.stepped
    assert last.scale == 32
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(v["step"] == 0 for v in optimizer.state_dict()["state"].values())
    assert [bool(step(*b).stepped) for b in batches(3)] == [False, False, True]


def test_overflow_backs_off_and_result_scales_are_kept_apart():
    _, _, step = make(scale=2.0**127)
    first, second = (step(*b) for b in batches(2))
    assert not first.stepped
    assert step.state_dict()["skipped"] == 2
    _, _, step = make(scale=LossScale.dynamic(2.0**127, cap=2.0**127))
    first, second = (step(*b) for b in batches(2))
    assert (first.scale.item(), second.scale.item()) == (2.0**126, 2.0**125)


@pytest.mark.parametrize("at_floor", ["keep", "warn", "raise"])
def test_at_the_floor(at_floor):
    model, _, step = make(scale=LossScale.dynamic(1.0, floor=1.0, at_floor=at_floor))
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    batch = batches(1)[0]
    if at_floor == "keep":
        assert step(*batch).scale == 1
    elif at_floor == "warn":
        with pytest.warns(UserWarning, match="MP502"):
            step(*batch)
    else:
        with pytest.raises(TrainingError, match="MP502"):
            step(*batch)


class NoSync(TorchDispatchMode):
    """Fails on what would wait for the device, and counts what runs."""

    BANNED = ("_local_scalar_dense", "nonzero", "equal.default", "_to_cpu")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        assert not any(word in str(func) for word in self.BANNED), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_steady_state_never_asks_the_device(backend, accumulate):
    _, optimizer, step = make(
        scale=LossScale.dynamic(8.0, interval=1), max_grad_norm=1.0, accumulate=accumulate, backend=backend
    )
    schedule = optim.lr_scheduler.LinearLR(optimizer, total_iters=50)
    data = batches(4)
    for batch in data[: 2 * accumulate]:
        step(*batch)
    with NoSync() as watch:
        for batch in data:
            step(*batch)
            schedule.step()
    # BatchNorm's buffers, the numbers of the schedule, the sums of the window: not one op per parameter. Low products are
    # the model's own, which the compiler calls from a library.
    if backend == "inductor":
        ours = [op for op in watch.seen if not op.startswith(("aten.mm.", "aten.addmm."))]
        assert len(ours) < 12 * len(data), ours


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_changing_sizes_cost_one_more_compilation(backend):
    model, _, step = make(backend=backend)
    twin = copy.deepcopy(model)
    other = optim.AdamW(twin.parameters(), lr=0.01)
    for rows in (6, 4, 9, 3, 12):
        data = batches(1, rows)
        torch.testing.assert_close(step(*data[0]).loss.item(), step_plain(twin, other, data[0]), rtol=1e-4, atol=1e-5)
    assert len(step.specializations) == 2


def step_plain(model, optimizer, batch):
    loss = loss_of(model, *batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_train_and_eval_are_two_graphs_and_masters_edited_by_hand_are_seen():
    model, _, step = make(dropout=0.5)
    batch = batches(1)[0]
    step(*batch)
    model.eval()
    a = step(*batch).loss
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.zero_()
        model.body.bias.zero_()
    b = step(*batch).loss
    assert len(step.specializations) == 2
    assert not torch.equal(a, b)


@pytest.mark.parametrize("answer", ["loss", "dict", "attribute", "wrong"])
def test_where_the_loss_is(answer):
    class Model(nn.Linear):
        def forward(self, x):
            loss = super().forward(x).square().mean()
            if answer == "attribute":
                return nn.modules.module.namedtuple("Out", "loss logits")(loss, x)
            return {"loss": loss, "dict": {"loss": loss}, "wrong": {"logits": x}}[answer]

    model = Model(3, 3)
    step = mpcompile(model, "fp32", backend="eager").train_step(optim.SGD(model.parameters(), 0.1))
    if answer == "wrong":
        with pytest.raises(Exception, match="MP531"):
            step(torch.randn(2, 3))
    else:
        assert step(torch.randn(2, 3)).stepped


def test_keyword_arguments_and_constants():
    class Model(nn.Linear):
        def forward(self, x, *, power=1, target=None):
            return (super().forward(x) ** power - (0 if target is None else target["a"])).square().mean()

    model = Model(3, 3)
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    step = mpcompile(model, "fp32", backend="eager").train_step(optim.SGD(model.parameters(), 0.0))
    for options in ({}, {"power": 3}, {"target": {"a": y}}):
        torch.testing.assert_close(step(x, **options).loss, model(x, **options).detach())
    assert len(step.specializations) == 3


@given(st.lists(st.booleans(), max_size=6), st.integers(1, 3), st.sampled_from(["growth", "clean-step"]))
@settings(max_examples=8)
def test_state_dict_round_trips_every_field(outcomes, accumulate, refill):
    model, optimizer, step = make(
        scale=LossScale.dynamic(64.0, interval=2, hysteresis=2, refill=refill), accumulate=accumulate
    )
    data = batches(len(outcomes))
    for (x, y), finite in zip(data, outcomes, strict=True):
        with torch.no_grad():
            kept = model.norm.weight.clone()
            model.norm.weight.mul_(1.0 if finite else float("nan"))
            step(x, y)
            if not finite:
                model.norm.weight.copy_(kept)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), step.state_dict()))
    twin, other, again = make(scale=LossScale.dynamic(1.0), accumulate=accumulate)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    found, expected = again.state_dict(), saved[2]
    sums = found["window"].pop("sums"), expected["window"].pop("sums")
    assert found == expected
    assert all(torch.equal(sums[0][k].nan_to_num(7), v.nan_to_num(7)) for k, v in sums[1].items())
    for batch in batches(2 * accumulate):
        a, b = step(*batch), again(*batch)
        assert all(torch.equal(p.nan_to_num(7), q.nan_to_num(7)) for p, q in zip(a, b, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


RESUME = """
import sys, torch
sys.path[:0] = [sys.argv[1]]
from mpcompile.training.checkpoint_file import load_checkpoint
from tests.training.test_step import batches, make
model, optimizer, step = make(sys.argv[4], dropout=0.3, backend=sys.argv[3], scale=8.0)
extra = load_checkpoint(sys.argv[2], model=model, optimizer=optimizer, step=step)
for x, y in extra["data"]:
    print(step(x, y).loss.item())
print(sum(p.double().sum().item() for p in model.parameters()))
"""


def resumed(path, backend, policy):
    root = __file__.rsplit("/tests/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", RESUME, root, str(path), backend, policy], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_resume_in_a_new_process_is_bit_equal_dropout_included(tmp_path, backend):
    model, optimizer, step = make(dropout=0.3, backend=backend, scale=8.0)
    data = batches(5)
    for batch in data[:2]:
        step(*batch)
    save_checkpoint(tmp_path / "a", model=model, optimizer=optimizer, step=step, extra={"data": data[2:]})
    losses = [step(*batch).loss.item() for batch in data[2:]]
    assert resumed(tmp_path / "a", backend, "fp32") == [
        *losses,
        sum(p.double().sum().item() for p in model.parameters()),
    ]


def test_options_that_do_not_exist():
    _, optimizer, step = make()
    wrong = {"accumulate": 0, "masters": "half", "backend": "tpu", "recompute": "always", "cuda_graph": "yes"}
    for options in ({name: value} for name, value in wrong.items()):
        with pytest.raises(TrainingError, match="MP541"):
            mpcompile(step.model, "fp32", backend="eager").train_step(optimizer, **options)


def test_an_option_of_before_the_release_names_the_one_of_now() -> None:
    _, optimizer, step = make()
    with pytest.raises(TrainingError, match=r"'remake' is now 'recompute'\n.*recompute=True"):
        mpcompile(step.model, "fp32", backend="eager").train_step(optimizer, remake=True)  # type: ignore[call-overload]


def test_the_typed_options_are_those_of_the_step() -> None:
    assert {*StepOptions.__annotations__} == {one.name for one in dataclasses.fields(Options)} - {"backend"}


def test_a_tensor_that_the_model_makes_no_buffer_of_is_a_constant() -> None:
    """Captured from outside, inside a module of its own: exporters lift it under the module's path."""
    rows = torch.tensor([0, 2, 2, 1])

    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)[rows]

    model = Picks()
    step = mpcompile(model, "bf16", backend="eager").train_step(
        torch.optim.SGD(model.parameters(), lr=0.0), lambda m, x: m(x).square().mean()
    )
    x = torch.randn(3, 4)
    torch.testing.assert_close(step(x).loss, model(x).square().mean().detach(), rtol=1e-2, atol=1e-3)


def test_a_short_window_is_what_a_loop_makes_that_divides_by_the_whole():
    """`end_window` after two of three microbatches, after none, and after the state was loaded in the middle."""
    model, plain = nn.Linear(4, 2), nn.Linear(4, 2)
    plain.load_state_dict(model.state_dict())
    made = [torch.optim.AdamW(one.parameters(), 0.05) for one in (model, plain)]

    def step_of(optimizer):
        mp = mpcompile(model, "fp32", backend="eager")
        return mp.train_step(optimizer, lambda m, x: m(x).square().mean(), accumulate=3, max_grad_norm=0.2)

    step = step_of(made[0])
    for short in (True, False, True):
        assert not step.end_window().stepped
        for _ in range(2 if short else 3):
            x = torch.randn(5, 4)
            result = step(x)
            (plain(x).square().mean() / 3).backward()
        assert step.pending == (2 if short else 0)
        if short:
            saved = step.state_dict()
            step = step_of(made[0])
            step.load_state_dict(saved)
            result = step.end_window()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.2)
        made[1].step()
        made[1].zero_grad()
        assert result.stepped
        assert step.pending == 0
        torch.testing.assert_close(result.grad_norm, norm)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
