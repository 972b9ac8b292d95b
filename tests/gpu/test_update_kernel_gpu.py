"""The update kernels on a CUDA device: captured in graphs, without a sync, at sizes beyond one chunk."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mpcompile.runtime.kernels.table import Rows
from mpcompile.runtime.kernels.update import Rule, Scale, UpdateKernel, adam_numbers
from mpcompile.training.loss_scale.scale import LossScale

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(1000, 513), (513,), (64, 3, 7, 7), (1 << 20,), ()]


@pytest.fixture
def no_sync() -> Iterator[Any]:
    """Call it, and whatever waits for the device is an error until the test ends."""

    def refuse() -> None:
        with warnings.catch_warnings():
            # torch says that the mode is a prototype.
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")

    before = torch.cuda.get_sync_debug_mode()
    yield refuse
    torch.cuda.set_sync_debug_mode(before)


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


def test_shadows_are_rounded_to_nearest() -> None:
    rows, grads, scale = state()
    kernel = made(rows, grads, scale)
    for _ in range(3):
        kernel(grads)
    for shadow, master in zip(rows.shadows, rows.masters, strict=True):
        assert shadow is not None
        assert torch.equal(shadow, master.bfloat16())
