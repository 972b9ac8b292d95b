"""Checkpoints of torch.distributed.checkpoint: saved by two ranks, loaded by one, and the other way round."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_own_process, own_part, same_everywhere, together
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mpcompile import LossScale, mpcompile

WIDTH = 16


class Everything(checkpoint.stateful.Stateful):
    """Model and optimizer by torch's own helpers, and the step as it is."""

    def __init__(self, model: nn.Module, optimizer: Any, step: Any) -> None:
        self.model, self.optimizer, self.step = model, optimizer, step

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        self.step.load_state_dict(saved["step"])


def made(rank: int) -> tuple[Everything, Any]:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        for p in model.parameters():
            distributed.broadcast(p, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = mpcompile(model, "bf16", low=["*"], backend="eager").train_step(
        optimizer, lambda m, x: m(x).square().mean(), process_group=distributed.group.WORLD,
        scale=LossScale.dynamic(init=64.0, interval=2),
    )  # fmt: skip
    return Everything(model, optimizer, step), step


def batch(number: int) -> torch.Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))


def save(rank: int, folder: str) -> None:
    everything, step = made(rank)
    for number in range(3):
        step(own_part(batch(number), rank))
    checkpoint.save({"all": everything}, checkpoint_id=folder)
    step(own_part(batch(3), rank))
    if rank == 0:
        torch.save(everything.state_dict(), Path(folder) / "after.pt")


def load(rank: int, folder: str) -> None:
    everything, step = made(rank)
    checkpoint.load({"all": everything}, checkpoint_id=folder)
    step(own_part(batch(3), rank))
    now, wanted = everything.state_dict(), torch.load(Path(folder) / "after.pt", weights_only=False)
    assert now["step"]["scale"] == wanted["step"]["scale"] == 256.0
    assert now["step"]["steps"] == wanted["step"]["steps"] == 4
    for name, value in now["model"].items():
        assert same_everywhere(value)
        # Other halves of the batch are rounded otherwise.
        torch.testing.assert_close(value, wanted["model"][name], rtol=1e-2, atol=2e-3)
    for name, state in now["optimizer"]["state"].items():
        assert float(state["step"]) == float(wanted["optimizer"]["state"][name]["step"]) == 4


@pytest.mark.slow
def test_saved_by_two_loaded_by_one_and_the_other_way_round() -> None:
    with tempfile.TemporaryDirectory() as folder:
        together(save, folder)
        in_own_process(load, folder)
    with tempfile.TemporaryDirectory() as folder:
        in_own_process(save, folder)
        together(load, folder)
