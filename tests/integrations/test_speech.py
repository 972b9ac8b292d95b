"""wav2vec2 and HuBERT train in the step: CTC over labels that a mask chooses, and masks that numpy draws at each call."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from mpcompile import MPCompileError, mpcompile

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.3, "mask_time_length": 2,
    "mask_feature_prob": 0.2, "mask_feature_length": 2, "hidden_dropout": 0.0, "activation_dropout": 0.0,
    "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "ctc_loss_reduction": "mean",
}  # fmt: skip


def speech(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TINY, **more)
    return getattr(transformers, f"{name}ForCTC")(config).train()


def batch(seed: int, last: int) -> dict[str, torch.Tensor]:
    """Two recordings of 200 samples; the second ends at `last`, and its labels are shorter."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[1, last:] = 0
    labels = torch.randint(1, 12, (2, 4), generator=g)
    labels[1, 1 + seed % 3 :] = -100
    return {"input_values": torch.randn(2, 200, generator=g), "attention_mask": mask, "labels": labels}


def race(name: str, policy: str, **more: Any) -> tuple[Any, float]:
    """Train by the step and plainly with the same draws; the step, and how far the losses come apart."""
    mine = speech(name, **more)
    plain = copy.deepcopy(mine)
    twin = optim.SGD(plain.parameters(), 0.01)
    step = mpcompile(mine, policy, backend="eager").train_step(optim.SGD(mine.parameters(), 0.01))
    far = 0.0
    for seed, last in enumerate((200, 150, 180)):
        twin.zero_grad()
        np.random.seed(seed)
        exact = plain(**batch(seed, last)).loss
        exact.backward()
        twin.step()
        np.random.seed(seed)
        far = max(far, abs(float(step(**batch(seed, last)).loss / exact.detach()) - 1))
    return step, far


@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert"])
def test_it_trains_as_plain_torch_does_with_masks_of_the_same_draws(name: str) -> None:
    step, far = race(name, "fp32", layerdrop=0.0)
    assert far < 1e-5
    assert len(step.specializations) == 1


def test_it_trains_low() -> None:
    step, far = race("Wav2Vec2", "bf16,device=free-low", layerdrop=0.0)
    assert far < 0.05
    lows = [n for n in step.report().to_dict()["nodes"] if n["kind"] == "matmul" and n["precision"] == "bf16"]
    assert lows


def test_layers_dropped_at_random_are_refused_with_the_line_and_the_way_out() -> None:
    mine = speech("Wav2Vec2", layerdrop=0.1)
    step = mpcompile(mine, "fp32", backend="eager").train_step(optim.SGD(mine.parameters(), 0.01))
    with pytest.raises(MPCompileError, match="layerdrop = 0") as error:
        step(**batch(0, 200))
    assert "modeling_wav2vec2.py:" in str(error.value)
    mine.config.layerdrop = 0.0
    assert bool(step(**batch(0, 200)).stepped)
