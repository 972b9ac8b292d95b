"""Buffers beyond 65,504 that arrive after a plan for FP16 was made: an error, not an infinity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from mpcompile import load_checkpoint, mpcompile, save_checkpoint
from mpcompile.errors import RuntimeFailure


class Scaled(nn.Module):
    """A buffer read as it is, one read through views, and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))
        self.register_buffer("table", torch.linspace(0.5, 1.5, 32).view(4, 8))
        self.plain = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x) * self.scale * self.table[: x.shape[0]].unsqueeze(0).squeeze(0)
        return self.two(h * self.plain).square().mean()


def made(how: str, policy: str = "fp16") -> tuple[nn.Module, Any, Callable[[], Tensor]]:
    """A model, what saves and loads, and one call of it."""
    torch.manual_seed(0)
    model = Scaled()
    mp, x = mpcompile(model, policy, backend="eager", low=["*"]), torch.randn(3, 8)
    if how == "drop-in":
        return model, mp, lambda: mp(x)
    step = mp.train_step(optim.SGD(model.parameters(), 1e-3), scale=1.0)
    return model, mp, lambda: step(x).loss


LARGE = 70_000.0


def loaded(model: Any, mp: Any, name: str, folder: Path) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state[name].fill_(LARGE)
    mp.load_state_dict(state)


def from_a_file(model: Any, mp: Any, name: str, folder: Path) -> None:
    kept = getattr(model, name).clone()
    getattr(model, name).fill_(LARGE)
    save_checkpoint(folder / "c", model=mp)
    getattr(model, name).copy_(kept)
    load_checkpoint(folder / "c", model=mp)


def one_number(model: Any, mp: Any, name: str, folder: Path) -> None:
    getattr(model, name).data[1] = LARGE


def in_place(model: Any, mp: Any, name: str, folder: Path) -> None:
    getattr(model, name).fill_(LARGE)


@pytest.mark.parametrize("how", ["drop-in", "step"])
@pytest.mark.parametrize("name", ["scale", "table"])
@pytest.mark.parametrize("edit", [loaded, from_a_file, one_number, in_place])
def test_a_buffer_beyond_fp16_is_an_error_when_it_arrives(edit: Any, name: str, how: str, tmp_path: Path) -> None:
    model, mp, call = made(how)
    assert call().isfinite()
    before = getattr(model, name).clone()
    edit(model, mp, name, tmp_path)
    for _ in range(2):
        with pytest.raises(RuntimeFailure, match=r"MP721: a buffer(.|\n)*70000"):
            call()
    getattr(model, name).copy_(before)
    assert call().isfinite()


def test_a_tensor_that_is_no_buffer_is_looked_at_in_the_step() -> None:
    model, mp, call = made("step")
    assert call().isfinite()
    in_place(model, mp, "plain", Path())
    with pytest.raises(RuntimeFailure, match="MP721"):
        call()


def test_an_infinity_of_the_users_own_is_none_of_ours() -> None:
    model, _, call = made("drop-in")
    assert call().isfinite()
    model.get_buffer("scale").fill_(float("inf"))
    assert not call().isfinite()


@pytest.mark.parametrize("policy", ["bf16", "fp32"])
def test_other_types_hold_it(policy: str) -> None:
    model, mp, call = made("drop-in", policy)
    call()
    in_place(model, mp, "scale", Path())
    assert call().isfinite()
