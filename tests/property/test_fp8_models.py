"""The bench models at their true widths and batches: FP8 is planned in a Llama's inner blocks and in none of the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mpcompile import fp8, mpcompile
from mpcompile.tools.bench_by_hand import BERT, GPT2, Llama, ViT


def ids(rows: int, time: int) -> dict[str, Tensor]:
    given = torch.zeros(rows, time, dtype=torch.int64)
    return {"input_ids": given, "labels": given}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "gpt2": (lambda: GPT2(1024, 1024, 768, 12, 3), lambda: ids(16, 1024)),
    "bert": (lambda: BERT(1024, 512, 768, 12, 3), lambda: ids(32, 512)),
    "vit": (
        lambda: ViT(224, 768, 12, 3),
        lambda: {"pixel_values": torch.zeros(128, 3, 224, 224), "labels": torch.zeros(128, dtype=torch.int64)},
    ),
    "llama": (lambda: Llama(1024, 2048, 2048, 8192, 32, 8, 3), lambda: ids(4, 2048)),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_plan_says_no_where_fp8_loses(name: str) -> None:
    build, batch = MODELS[name]
    plan = mpcompile(build(), "fp8,device=h200", backend="eager").plan(**batch())
    reading = {node.module for node in plan.graph if node.fp8}
    assert sum(node.op == fp8.LINEAR for node in plan.graph) >= 12
    wanted = {"blocks.1.feedforward.up", "blocks.1.feedforward.down"} if name == "llama" else set()
    assert reading >= wanted
    assert all(module.startswith("blocks.1.") for module in reading)
    assert not reading or name == "llama", reading
