"""Small random instances of real architectures, each with a batch that gives a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Tensor]]
VOCABULARY = 96
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _tokens(length: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (4, length))


def gpt2() -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=VOCABULARY, n_positions=32, use_cache=False,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    ids = _tokens()
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=VOCABULARY, use_cache=False)
    ids = _tokens()
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def bert() -> Made:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**SHAPE, **QUIET, vocab_size=VOCABULARY, max_position_embeddings=32)
    ids = _tokens()
    mask = torch.ones_like(ids)
    mask[:, -4:] = 0
    return BertForMaskedLM(config), {"input_ids": ids, "labels": ids, "attention_mask": mask}


def t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=VOCABULARY, dropout_rate=0.0,
                      use_cache=False, decoder_start_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config), {"input_ids": _tokens(), "labels": _tokens(12)}


def vit() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SHAPE, **QUIET, image_size=32, patch_size=8, num_labels=10)
    return ViTForImageClassification(config), {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.arange(8)}


def resnet() -> Made:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
    return ResNetForImageClassification(config), {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.arange(8)}


def convnext() -> Made:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=4, num_labels=10)
    return ConvNextForImageClassification(config), {
        "pixel_values": torch.randn(8, 3, 32, 32),
        "labels": torch.arange(8),
    }


class Recurrent(nn.Module):
    """A language model on an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(VOCABULARY, 64), nn.LSTM(64, 64, batch_first=True)
        self.mix, self.head = nn.Linear(64, 64), nn.Linear(64, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embed(input_ids))
        logits = self.head(torch.relu(self.mix(hidden)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def lstm() -> Made:
    ids = _tokens()
    return Recurrent(), {"input_ids": ids, "labels": ids}


ARCHITECTURES: dict[str, Callable[[], Made]] = {
    f.__name__: f for f in (gpt2, llama, bert, t5, vit, resnet, convnext, lstm)
}


def loss_of(output: Any) -> Tensor:
    """The model's output where it is the loss, else its `.loss`."""
    return output if isinstance(output, Tensor) else output.loss  # type: ignore[no-any-return]
