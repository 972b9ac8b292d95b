"""Published architectures of transformers, at random weights and small sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from zoo import build

from rounding.registry import DEIT, Built, Domain

case = Domain("published")


class _Loss(nn.Module):
    """A model whose output has a loss, called with positional arguments."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: Any) -> Any:
        return self.model(**dict(zip(self.names, args, strict=True))).loss


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _published(name: str) -> Built:
    model, inputs = build(name)
    reads = list(inputs)
    return _Loss(_without_dropout(model.eval()), reads), lambda: (tuple(inputs.values()), ()), lambda out: out


@case(row=DEIT, scale=65536.0)
def deit() -> Built:
    """At the loss scale that a trainer starts with."""
    from transformers import DeiTConfig, DeiTForImageClassification

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = DeiTConfig(**shape, image_size=32, patch_size=8, num_labels=5, hidden_dropout_prob=0.0)
    labels = torch.randint(0, 5, (16,))
    net = DeiTForImageClassification(config).train()
    for token in (
        net.deit.embeddings.cls_token,
        net.deit.embeddings.distillation_token,
        net.deit.embeddings.position_embeddings,
    ):
        nn.init.trunc_normal_(token, std=0.004)
    model = _Loss(net, ["pixel_values", "labels"])
    return model, lambda: ((torch.randn(16, 3, 32, 32), labels), ()), lambda out: out


@case("vit", "swin", "resnet", "convnext", "segformer")
def vision(name: str) -> Built:
    return _published(name)


@case("gpt2", "llama", "bert", "t5", "mamba", "deberta-v2", "qwen3")
def language(name: str) -> Built:
    return _published(name)


@case(
    "whisper",
)
def speech(name: str) -> Built:
    return _published(name)
