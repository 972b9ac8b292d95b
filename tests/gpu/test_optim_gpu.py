"""`mpcompile.optim` on a GPU: low gradients, shadows written by the update, no waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mpcompile
from mpcompile.shadows.table import SHADOWS

pytestmark = pytest.mark.gpu


def trained(kind: str, low: str, steps: int = 6, norm: float | None = None) -> tuple[list[float], nn.Module, Any, int]:
    """Losses; the model; the optimizer; casts of shadows after the first step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).cuda()
    ours = kind == "ours"
    options: dict[str, Any] = {"max_grad_norm": norm} if ours else {"fused": True}
    optimizer = (mpcompile.optim if ours else torch.optim).AdamW(model.parameters(), lr=1e-3, **options)
    mp = mpcompile.mpcompile(model, low, low=["*"])
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=low == "fp16")
    losses, casts = [], 0
    for step in range(steps):
        torch.manual_seed(step)
        loss = mp(torch.randn(64, 512, device="cuda")).square().mean()
        scaler.scale(loss * (float("inf") if low == "fp16" and step == 2 else 1.0)).backward()
        assert (model[0].weight.grad.dtype == torch.float32) == (not ours)
        if norm is not None and not ours:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        casts = SHADOWS.casts if step == 0 else casts
    return losses, model, optimizer, SHADOWS.casts - casts


@pytest.mark.parametrize(("low", "norm"), [("bf16", None), ("bf16", 0.05), ("fp16", None)])
def test_the_drop_in_trains_as_with_torchs(low: str, norm: float | None) -> None:
    losses, model, _, _ = trained("torch", low, norm=norm)
    mine, same, optimizer, casts = trained("ours", low, norm=norm)
    assert optimizer._reading._bound.kernel is not None
    assert casts == 0
    assert mine == pytest.approx(losses, rel=1e-3)
    assert sum(p.requires_grad for p in same.parameters()) == 4
    for got, want in zip(same.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def test_a_step_waits_for_nothing(no_sync: Callable[[], None]) -> None:
    _, model, optimizer, _ = trained("ours", "bf16", norm=1.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p).bfloat16() if p.dim() > 1 else torch.randn_like(p)
    torch.cuda.synchronize()
    no_sync()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert optimizer.grad_norm.isfinite()
