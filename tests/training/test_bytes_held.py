"""What is held between two steps, in bytes a parameter: all tensors that Python knows."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from mpcompile import mpcompile

WIDTH = 256


def storages() -> dict[int, int]:
    """Address -> bytes of every storage."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
    held = [one.untyped_storage() for one in found if one.layout == torch.strided and one.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def held(options: dict[str, Any] | None) -> float:
    """Bytes a parameter between steps, of torch's autocast (no options) or ours."""
    before = storages()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    mp = mpcompile(model, "bf16", low=["*"], backend="eager")
    step: Any = None if options is None else mp.train_step(optimizer, lambda m, x: m(x).square().mean(), **options)
    for _ in range(3):
        x = torch.randn(8, WIDTH)
        if step is not None:
            assert step(x).stepped.item()
            continue
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    del x
    after = storages()
    count = sum(p.numel() for p in model.parameters())
    return sum(size for address, size in after.items() if before.get(address) != size) / count


# FP32 masters and two moments; ours with BF16 shadows; halves of masters (4), two codes, and their scales.
KINDS = [
    (None, 12.0, 12.1),
    ({}, 14.0, 14.2),
    ({"masters": "split"}, 12.0, 12.2),
    ({"masters": "split", "states": "bf16"}, 8.0, 8.2),
    ({"masters": "split", "states": "8bit"}, 6.0, 6.25),
]


@pytest.mark.parametrize(("options", "least", "most"), KINDS)
def test_bytes_a_parameter(options: dict[str, Any] | None, least: float, most: float) -> None:
    assert least <= held(options) <= most


def test_the_least_is_little_more_than_half_of_autocasts() -> None:
    assert held({"masters": "split", "states": "8bit"}) / held(None) <= 0.55
