"""The models that `mpcompile bench` trains, with random weights and random data: of `transformers`, and written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.tools import bench_by_hand as by_hand

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """One model and the shape of its batches.

    Fields:
      build: makes the module; ``module(**batch)`` is its loss.
      sample: makes one batch of so many rows.
      rows: of a batch in the large regime.
      per_row: units ("tokens" or "images") in a row.
      channels_last: memory format of convolution weights and images.
    """

    build: Callable[[], nn.Module]
    sample: Callable[[int], Batch]
    rows: int
    per_row: int = 1
    unit: str = "images"
    channels_last: bool = False


class Loss(nn.Module):
    """The loss of a `transformers` model alone, so that every candidate compiles the loss with the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch).loss  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Linear layers with GELU, and cross entropy."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.GELU()]
        self.body = nn.Sequential(*layers, nn.Linear(width, 16))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.body(x), labels)


def _text(vocabulary: int, length: int) -> Callable[[int], Batch]:
    def sample(rows: int) -> Batch:
        ids = torch.randint(0, vocabulary, (rows, length))
        return {"input_ids": ids, "labels": ids.clone()}

    return sample


def _images(side: int, classes: int) -> Callable[[int], Batch]:
    def sample(rows: int) -> Batch:
        return {"pixel_values": torch.randn(rows, 3, side, side), "labels": torch.randint(0, classes, (rows,))}

    return sample


def _gpt2(full: bool) -> Workload:
    sizes: dict[str, Any] = {} if full else {"n_layer": 4, "n_embd": 384, "n_head": 6, "vocab_size": 16384}
    length = 1024 if full else 256

    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        return Loss(GPT2LMHeadModel(GPT2Config(n_positions=length, use_cache=False, **off, **sizes)))

    return Workload(build, _text(sizes.get("vocab_size", 50257), length), 16 if full else 4, length, "tokens")


def _bert(full: bool) -> Workload:
    sizes = {"num_hidden_layers": 4, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    vocabulary, length = (30522, 512) if full else (16384, 128)

    def build() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return Loss(BertForMaskedLM(BertConfig(vocab_size=vocabulary, **off, **({} if full else sizes))))

    return Workload(build, _text(vocabulary, length), 32 if full else 8, length, "tokens")


def _vit(full: bool) -> Workload:
    sizes = {"num_hidden_layers": 4, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}

    def build() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        return Loss(ViTForImageClassification(ViTConfig(num_labels=1000, **({} if full else sizes))))

    return Workload(build, _images(224, 1000), 128 if full else 8)


def _resnet(full: bool) -> Workload:
    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    side = 224 if full else 128

    def build() -> nn.Module:
        from transformers import ResNetConfig, ResNetForImageClassification

        return Loss(ResNetForImageClassification(ResNetConfig(num_labels=1000, **({} if full else sizes))))

    return Workload(build, _images(side, 1000), 256 if full else 8, channels_last=True)


def _llama(full: bool) -> Workload:
    large = {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
             "intermediate_size": 8192, "vocab_size": 128256}  # fmt: skip
    small = {"num_hidden_layers": 4, "hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 2,
             "intermediate_size": 1024, "vocab_size": 16384}  # fmt: skip
    sizes, length = (large, 2048) if full else (small, 256)

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        fixed: dict[str, Any] = {"use_cache": False, "tie_word_embeddings": True, "max_position_embeddings": length}
        return Loss(LlamaForCausalLM(LlamaConfig(**fixed, **sizes)))

    return Workload(build, _text(sizes["vocab_size"], length), 4, length, "tokens")


def _mlp(full: bool) -> Workload:
    """Small, it is bound by launches: eight layers whose products take microseconds."""
    width, depth = (4096, 4) if full else (64, 8)

    def sample(rows: int) -> Batch:
        return {"x": torch.randn(rows, width), "labels": torch.randint(0, 16, (rows,))}

    return Workload(lambda: MLP(width, depth), sample, 4096 if full else 32, unit="rows")


def _gpt2_by_hand(full: bool) -> Workload:
    vocabulary, time, width, heads, layers = (50304, 1024, 768, 12, 12) if full else (16384, 256, 384, 6, 4)
    build = functools.partial(by_hand.GPT2, vocabulary, time, width, heads, layers)
    return Workload(build, _text(vocabulary, time), 16 if full else 4, time, "tokens")


def _gpt2_small_batch(full: bool) -> Workload:
    """One row of 256 tokens: launches count, not arithmetic."""
    vocabulary, time, width, heads, layers = (50304, 256, 768, 12, 12) if full else (16384, 64, 384, 6, 4)
    build = functools.partial(by_hand.GPT2, vocabulary, time, width, heads, layers)
    return Workload(build, _text(vocabulary, time), 1, time, "tokens")


def _llama_by_hand(full: bool) -> Workload:
    vocabulary, time = (128256, 2048) if full else (16384, 256)
    width, hidden, heads, groups, layers = (2048, 8192, 32, 8, 16) if full else (384, 1024, 6, 2, 4)
    build = functools.partial(by_hand.Llama, vocabulary, time, width, hidden, heads, groups, layers)
    return Workload(build, _text(vocabulary, time), 4, time, "tokens")


def _bert_by_hand(full: bool) -> Workload:
    vocabulary, time, width, heads, layers = (30528, 512, 768, 12, 12) if full else (16384, 128, 384, 6, 4)
    build = functools.partial(by_hand.BERT, vocabulary, time, width, heads, layers)
    return Workload(build, _text(vocabulary, time), 32 if full else 8, time, "tokens")


def _vit_by_hand(full: bool) -> Workload:
    width, heads, layers = (768, 12, 12) if full else (384, 6, 4)
    build = functools.partial(by_hand.ViT, 224, width, heads, layers)
    return Workload(build, _images(224, 1000), 128 if full else 8)


WORKLOADS: dict[str, Callable[[bool], Workload]] = {
    "gpt2": _gpt2,
    "bert": _bert,
    "vit": _vit,
    "resnet": _resnet,
    "llama": _llama,
    "mlp": _mlp,
    "gpt2-by-hand": _gpt2_by_hand,
    "gpt2-by-hand-1x256": _gpt2_small_batch,
    "llama-by-hand": _llama_by_hand,
    "bert-by-hand": _bert_by_hand,
    "vit-by-hand": _vit_by_hand,
}
