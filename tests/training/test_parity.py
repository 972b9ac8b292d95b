"""Whole trainings against FP32, on real architectures: the curves must lie on each other within low-precision noise."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, loss_of
from torch import nn

from mpcompile import mpcompile

STEPS = 12


def curve(
    model: nn.Module, call: nn.Module, batch: dict[str, torch.Tensor], scaler: torch.amp.GradScaler | None
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(call(**batch))
        (scaler.scale(loss) if scaler else loss).backward()
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(name: str, policy: str, backend: str) -> None:
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[name]()
    plain = copy.deepcopy(model)
    # Every product low: at these sizes the cost model would leave many of them FP32.
    mp = mpcompile(
        model, policy, backend=backend, low=[lambda node: node.kind in ("matmul", "convolution", "attention", "rnn")]
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if policy == "fp16" else None
    got, expected = curve(model, mp, batch, scaler), curve(plain, plain, batch, None)
    assert expected[-1] < 0.95 * expected[0], "the reference must learn, or nothing is compared"
    worst = max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True) if abs(b) > 0.1)
    assert worst < 0.05, f"losses differ by {worst:.1%}: {got} against {expected}"
    low = [n for plan in mp.plans for n in plan.graph if n.precision == policy and not n.is_cast]
    assert any(n.kind in ("matmul", "convolution") for n in low)


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_follows_fp32(name: str, policy: str) -> None:
    compare(name, policy, "eager")


@pytest.mark.parametrize(
    "name", [pytest.param("gpt2", marks=pytest.mark.slow), "bert", pytest.param("resnet", marks=pytest.mark.slow)]
)
def test_compiled_training_follows_fp32(name: str) -> None:
    compare(name, "bf16", "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "t5", "vit", "convnext", "lstm"])
def test_more_compiled_trainings_follow_fp32(name: str, policy: str) -> None:
    compare(name, policy, "inductor")
