"""The models of `mpcompile bench` as an expert writes them: causal flag instead of a mask, aligned vocabulary, native norms.

The bench models of `tools/bench_models.py` are those of `transformers`, with what their versions leave untuned. These
are the harder peers: nothing is left in them that a compiler could gain by repairing the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# torch 2.13 has the loss over a vocabulary in chunks.
LINEAR_CROSS_ENTROPY: Any = getattr(F, "linear_cross_entropy", None)


class Attention(nn.Module):
    """Self-attention, `groups` heads of keys and values: [batch, time, width] -> the same."""

    def __init__(self, width: int, heads: int, groups: int = 0, *, causal: bool, rotary: bool, bias: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.causal, self.rotary = heads, groups or heads, causal, rotary
        self.size = width // heads
        self.qkv = nn.Linear(width, (heads + 2 * self.groups) * self.size, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, self.heads + 2 * self.groups, self.size).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.groups, self.groups], dim=1)  # batch x heads x time x size
        if turns is not None:
            q, k = _turned(q, turns), _turned(k, turns)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.groups != self.heads)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))  # type: ignore[no-any-return]


def rotary_table(time: int, size: int, base: float = 500_000.0) -> Tensor:
    """Cosines and sines of RoPE: [2, time, size / 2], FP32."""
    angles = torch.outer(torch.arange(time).float(), base ** (-torch.arange(0, size, 2).float() / size))
    return torch.stack([angles.cos(), angles.sin()])


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns.to(x.dtype)  # time x size / 2
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class SwiGLU(nn.Module):
    """[.., width] -> the same, gate and value from one product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a feed-forward net, each behind a norm, each added to the stream."""

    def __init__(self, width: int, attention: Attention, feedforward: nn.Module, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention, self.feedforward = attention, feedforward

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), turns)
        return x + self.feedforward(self.norm2(x))  # type: ignore[no-any-return]


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


class Written(nn.Module):
    """What a candidate may ask of such a model.

    Attributes:
      stream: dtype of the residual stream under autocast; None leaves the embeddings' (an expert sets it low).
      chunked: take the loss by `F.linear_cross_entropy`, which never holds all logits.
    """

    stream: torch.dtype | None = None
    chunked: bool = False

    def _stream(self, x: Tensor) -> Tensor:
        return x if self.stream is None else x.to(self.stream)

    def _loss(self, x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of ``x @ head.T``: x [.., width], head [vocabulary, width], labels [..] -> scalar."""
        flat, wanted = x.flatten(0, -2), labels.flatten()
        if self.chunked:
            return LINEAR_CROSS_ENTROPY(flat, head, wanted)  # type: ignore[no-any-return]
        return F.cross_entropy(F.linear(flat, head), wanted)


class GPT2(Written):
    """GPT-2 with tied embeddings; ``input_ids`` and ``labels`` int64 [batch, time]."""

    def __init__(self, vocabulary: int, time: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, heads, causal=True, rotary=False, bias=True), _mlp(width), nn.LayerNorm)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        _initialise(self)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self._stream(self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self._loss(self.norm(x), self.wte.weight, labels)


class Llama(Written):
    """Llama 3's architecture: RMSNorm, RoPE, grouped keys and values, SwiGLU, tied embeddings."""

    turns: Tensor

    def __init__(
        self, vocabulary: int, time: int, width: int, hidden: int, heads: int, groups: int, layers: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.register_buffer("turns", rotary_table(time, width // heads), persistent=False)
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, heads, groups, causal=True, rotary=True, bias=False),
                  SwiGLU(width, hidden), nn.RMSNorm)
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.RMSNorm(width)
        _initialise(self)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self._stream(self.embed(input_ids))
        for block in self.blocks:
            x = block(x, self.turns)
        return self._loss(self.norm(x), self.embed.weight, labels)


class BERT(Written):
    """A bidirectional encoder without padding, norms first, with a tied masked-language head."""

    def __init__(self, vocabulary: int, time: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, heads, causal=False, rotary=False, bias=True), _mlp(width), nn.LayerNorm)
            for _ in range(layers)
        )
        _initialise(self)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self._stream(self.norm1(self.words(input_ids) + self.places.weight[: input_ids.shape[1]]))
        for block in self.blocks:
            x = block(x)
        return self._loss(self.norm2(x), self.words.weight, labels)


class ViT(Written):
    """Patches of 16 x 16, a class token, norms first; ``pixel_values`` [batch, 3, side, side], ``labels`` int64 [batch]."""

    def __init__(self, side: int, width: int, heads: int, layers: int, classes: int = 1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, (side // 16) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, heads, causal=False, rotary=False, bias=True), _mlp(width), nn.LayerNorm)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        _initialise(self)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)  # batch x patches x width
        x = self._stream(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x[:, 0])), labels)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
