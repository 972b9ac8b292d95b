"""Thirty architectures of transformers with tiny random weights, each with an input: what their forwards reach."""

# ruff: noqa: E501 (a row per architecture)
from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0}
_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 99, "pad_token_id": 0, "decoder_start_token_id": 1,
    "max_position_embeddings": 64,
}  # fmt: skip
_T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_IMAGE = {**{k: v for k, v in _TEXT.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 8, "num_labels": 5}
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16, "num_labels": 5}
_SPEECH = {
    **_TEXT, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip

# Name -> (model class, config class, config, what it reads).
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99}, "lm"),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_TEXT, "rotary_pct": 0.5}, "lm"),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}, "lm"),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99}, "lm"),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_TEXT, "alibi": False}, "lm"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, "lm"),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 8}, "lm"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_local_experts": 2}, "lm"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER, "lm"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER, "lm"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _DECODER, "lm"),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_TEXT, "max_position_embeddings": 64, "pad_token_id": 0}, "lm"),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 99, "state_size": 4}, "lm"),
    "bert": ("BertForMaskedLM", "BertConfig", _TEXT, "lm"),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _TEXT, "lm"),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99}, "lm"),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**_TEXT, "embedding_size": 16}, "lm"),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**_TEXT, "embedding_size": 16}, "lm"),
    "deberta-v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "lm"),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, "seq2seq"),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_SEQ2SEQ, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2}, "seq2seq"),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "bos_token_id": 1, "eos_token_id": 2}, "mel"),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH, "audio"),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGE, "image"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _IMAGE, "image"),
    "beit": ("BeitForImageClassification", "BeitConfig", _IMAGE, "image"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", _IMAGE, "image"),
    "swin": ("SwinForImageClassification", "SwinConfig", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "num_labels": 5}, "image"),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {**_STAGES, "layer_type": "basic"}, "image"),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 5}, "image"),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16, "num_attention_heads": [1, 2, 2, 4], "num_labels": 5}, "pixels"),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": {**_TEXT, "max_position_embeddings": 16, "eos_token_id": 98}, "vision_config": {k: v for k, v in _IMAGE.items() if k != "num_labels"}, "projection_dim": 16}, "both"),
}  # fmt: skip


def _inputs(reads: str) -> dict[str, Any]:
    words, image = torch.arange(1, 17).view(2, 8), torch.randn(2, 3, 32, 32)
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "lm": lambda: {"input_ids": words, "labels": words},
        "seq2seq": lambda: {"input_ids": words, "labels": words},
        "mel": lambda: {"input_features": torch.randn(2, 8, 32), "labels": words},
        "audio": lambda: {"input_values": torch.randn(2, 800)},
        "image": lambda: {"pixel_values": image, "labels": torch.tensor([0, 1])},
        "pixels": lambda: {
            "pixel_values": torch.randn(2, 3, 64, 64),
            "labels": torch.zeros(2, 64, 64, dtype=torch.long),
        },
        "both": lambda: {"input_ids": words, "pixel_values": image, "return_loss": True},
    }
    return made[reads]()


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model of `name` in training mode, and the keyword arguments to call it with."""
    import transformers

    model_class, config_class, settings, reads = ARCHITECTURES[name]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, config_class)(**settings)
        config.use_cache = False
        return getattr(transformers, model_class)(config).train(), _inputs(reads)
