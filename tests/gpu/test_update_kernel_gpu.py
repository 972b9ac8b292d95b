"""The update kernels on a CUDA device: captured in graphs, without a sync, at sizes beyond one chunk."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcompile import mpcompile
from mpcompile.runtime.kernels.table import Rows
from mpcompile.runtime.kernels.update import Rule, Scale, UpdateKernel, adam_numbers
from mpcompile.runtime.state_codes import phase
from mpcompile.training.loss_scale.scale import LossScale
from mpcompile.training.optimizer import kernel_update
from mpcompile.training.optimizer.fused_update import FusedUpdate
from mpcompile.training.optimizer.kernel_update import KernelUpdate
from mpcompile.training.optimizer.low_states import decode, encode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(1000, 513), (513,), (64, 3, 7, 7), (1 << 20,), ()]


def state() -> tuple[Rows, list[Tensor], Any]:
    torch.manual_seed(0)
    params = [torch.randn(shape, device="cuda") for shape in SHAPES]
    params[2] = params[2].contiguous(memory_format=torch.channels_last)
    grads = [torch.randn_like(p).to(torch.bfloat16 if i else torch.float32) for i, p in enumerate(params)]
    none: list[Any] = [None] * len(params)
    moments = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    counters = list(torch.zeros(len(params), device="cuda").unbind())
    shadows = [p.bfloat16() for p in params]
    scale = LossScale.dynamic(init=8.0).initial("cuda")
    rows = Rows(params, [*moments[0]], [*moments[1]], [*shadows], none, [*counters], [0] * len(none))
    return rows, grads, Scale(*scale, scale.scale.clone())


def made(rows: Rows, grads: list[Tensor], scale: Any) -> UpdateKernel:
    group = torch.optim.AdamW([torch.zeros(1)], lr=1e-3).param_groups[0]
    return UpdateKernel(rows, [(i,) for i in range(len(grads))], grads, adam=True, groups=[adam_numbers(group, True)],
                        low=torch.bfloat16, max_norm=1.0, rule=Rule(True), scale=scale)  # fmt: skip


def test_nothing_waits_for_the_device(no_sync: Any) -> None:
    rows, grads, scale = state()
    kernel = made(rows, grads, scale)
    kernel(grads)
    others = [[g.clone() for g in grads] for _ in range(3)]
    torch.cuda.synchronize()
    no_sync()
    for i, other in enumerate(others):
        kernel.set_groups([[1e-3 / (i + 2), 0.9, 0.999, 1e-8, 0.01, 0.0, 1.0, 0.0]])
        kernel(other)


def test_the_same_in_a_graph() -> None:
    rows, grads, scale = state()
    other_rows, other_grads, other_scale = copy.deepcopy((rows, grads, scale))
    eager, captured = made(rows, grads, scale), made(other_rows, other_grads, other_scale)
    eager(grads)
    captured(other_grads)
    for _ in range(3):
        eager([g.clone() for g in grads])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = captured(other_grads)
    # Something else sends the table in between.
    captured([g.clone() for g in other_grads])
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert result.finite.item() is True
    for (mine, _, _), (theirs, _, _) in zip(rows.cells(), other_rows.cells(), strict=True):
        assert torch.equal(mine, theirs)
    other_grads[1][0] = float("nan")
    before = [t.clone() for t, _, _ in other_rows.cells()]
    graph.replay()
    assert result.finite.item() is False
    assert all(map(torch.equal, before, [t for t, _, _ in other_rows.cells()]))
    assert other_scale.scale.item() == 4.0


@pytest.mark.parametrize("masters", ["full", "split"])
@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_low_states_learn_as_fp32_ones_and_take_fewer_bytes(states: str, masters: str) -> None:
    """Replayed from the third step on; saved and loaded in between, where the run goes on bit for bit."""
    ends, held = [], []
    for kind in ("fp32", states, states):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 64)
        ).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = mpcompile(model, "bf16", low=["*"]).train_step(optimizer, distance, masters=masters, states=kind)
        rng = torch.Generator("cuda").manual_seed(1)
        losses = []
        for turn in range(120):
            x = torch.randn(64, 256, device="cuda", generator=rng)
            if turn == 60:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            losses.append(step(x, x[:, :64].tanh()).loss)
        assert all(isinstance(one, KernelUpdate) for one in step.updates)
        assert step.updates.replays._steps
        assert {v.dtype for s in optimizer.state_dict()["state"].values() for v in s.values()} == {torch.float32}
        ends.append(torch.stack(losses))
        held.append(sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values()))
    assert ends[0][-10:].mean() < 0.5 * ends[0][:5].mean()
    assert abs(ends[1][-10:].mean() - ends[0][-10:].mean()) < 0.05 * ends[0][-10:].mean()
    assert torch.equal(ends[1], ends[2])
    assert held[1] < (0.51 if states == "bf16" else 0.27) * held[0]


def distance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).float() - y).square().mean()


@pytest.mark.parametrize("kind", ["bf16", "8bit"])
def test_low_moments_in_a_graph_are_what_the_library_rounds_them_to(kind: str) -> None:
    rows, grads, scale = state()
    first = [torch.randn_like(p) for p in rows.masters]
    second = [torch.randn_like(p).square() for p in rows.masters]
    lows = [encode(m, True, kind) for m in first], [encode(v, False, kind) for v in second]
    rows = replace(rows, firsts=[m for m, _ in lows[0]], seconds=[v for v, _ in lows[1]],
                   first_scales=[s for _, s in lows[0]], second_scales=[s for _, s in lows[1]])  # fmt: skip
    first, second = [decode(*m) for m in lows[0]], [decode(*v) for v in lows[1]]
    kernel = made(rows, grads, scale)
    at = scale.steps.clone()
    kernel(grads)
    factor = kernel._factors[0]
    for i, grad in enumerate(grads):
        fresh = grad.float() * factor
        m = first[i].double() * 0.9 + fresh.double() * (1 - 0.9)
        v = second[i].double() * 0.999 + fresh.double() ** 2 * (1 - 0.999)
        for low, signed, value in ((rows.firsts[i], True, m), (rows.seconds[i], False, v)):
            want, _ = encode(value.float(), signed, kind, phase(at, signed))
            apart = (low.float() - want.float()).abs()
            assert (apart <= (1.0 if kind == "8bit" else want.float().abs() * 2.0**-7)).all()
            assert (apart > 0).sum() <= 1e-3 * apart.numel() + 1


def test_shadows_are_rounded_to_nearest() -> None:
    rows, grads, scale = state()
    kernel = made(rows, grads, scale)
    for _ in range(3):
        kernel(grads)
    for shadow, master in zip(rows.shadows, rows.masters, strict=True):
        assert shadow is not None
        assert torch.equal(shadow, master.bfloat16())


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"masters": "split"}], ids=str)
def test_a_replayed_step_is_as_atens(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, one by kernels, from the same state each time; replayed from the fourth step on."""
    torch.manual_seed(0)
    layers = (nn.Linear(512, 1024), nn.GELU(), nn.LayerNorm(1024), nn.Linear(1024, 1024), nn.Linear(1024, 64))
    models = [nn.Sequential(*layers).cuda()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1) for m in models]
    steps = [mpcompile(m, "bf16", low=["*"]).train_step(o, mean_square, max_grad_norm=0.01, **options)
             for m, o in zip(models, optimizers, strict=True)]  # fmt: skip
    for turn in range(12):
        x = torch.randn(64, 512, device="cuda")
        for step, devices in zip(steps, ({"cuda"}, set[str]()), strict=True):
            monkeypatch.setattr(kernel_update, "DEVICES", devices)
            result = step(x if turn != 7 else x * float("inf"))
            assert result.finite.item() is (turn != 7)
        mine, theirs = (m.state_dict() for m in models)
        for name, want in theirs.items():
            torch.testing.assert_close(mine[name], want, rtol=1e-6, atol=1e-7, msg=f"{turn}: {name}")
        with torch.no_grad():
            models[0].load_state_dict(theirs)
            for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
                for key in ("exp_avg", "exp_avg_sq") if q in optimizers[1].state else ():
                    optimizers[0].state[p][key].copy_(optimizers[1].state[q][key])
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.9
    assert all(isinstance(one, KernelUpdate) for one in steps[0].updates)
    assert not any(isinstance(one, KernelUpdate) for one in steps[1].updates)
    assert steps[0].updates.replays._steps
    if not options:
        assert all(isinstance(one, FusedUpdate) for one in steps[1].updates)
