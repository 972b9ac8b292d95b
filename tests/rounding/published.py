"""Published architectures of transformers, at random weights and small sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from zoo import build

from rounding.registry import DEIT, Built, Domain, Net

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
    model, inputs = build(name, torch.initial_seed())
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


@case(0.02, 0.004, row=DEIT, scale=65536.0)
def deit_by_hand(std: float) -> Built:
    """Two tokens and positions in front of the patches: the smaller they are, the larger is what a norm gives back to them."""
    tokens, width = 16, 32
    layer = nn.TransformerEncoderLayer(width, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        patches = net.patches(x).flatten(2).mT
        two = [net.cls.expand(len(x), -1, -1), net.distilled.expand(len(x), -1, -1)]
        y = net.norm(net.body(torch.cat([*two, patches], 1) + net.places))
        return net.head(y[:, 0]), net.teacher(y[:, 1])

    def loss(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        several = [nn.functional.cross_entropy(one, y) for one in out]
        return (several[0] + several[1]) / 2

    model = Net(
        forward,
        patches=nn.Conv2d(3, width, 8, 8),
        cls=nn.Parameter(torch.randn(1, 1, width) * std),
        distilled=nn.Parameter(torch.randn(1, 1, width) * std),
        places=nn.Parameter(torch.randn(1, tokens + 2, width) * std),
        body=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        norm=nn.LayerNorm(width),
        head=nn.Linear(width, 5),
        teacher=nn.Linear(width, 5),
    )
    return model, lambda: ((torch.randn(16, 3, 32, 32),), (torch.randint(0, 5, (16,)),)), loss


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
