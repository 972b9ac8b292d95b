"""Text: embeddings, positions, attention and its masks, recurrences, losses over a vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import BUFFER, MASK, TABLE, Built, Domain, Net, cross_entropy, mlp, mse

case = Domain("language")


def _words(length: int = 12, vocabulary: int = 40) -> tuple[tuple[Tensor], tuple[Tensor]]:
    words = torch.randint(0, vocabulary, (3, length))
    return (words,), (words,)


def _heads(x: Tensor, many: int = 2) -> Tensor:
    return x.unflatten(-1, (many, -1)).transpose(1, 2)


class Block(nn.Module):
    """A transformer's block of width 16: `norm` before or after, attention by hand or fused, a gated or a plain body."""

    def __init__(
        self, pre: bool = True, fused: bool = True, gated: bool = False, norm: Callable[[int], nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.qkv, self.out, self.m, self.n = nn.Linear(16, 48), nn.Linear(16, 16), norm(16), norm(16)
        self.pre, self.fused, self.gated = pre, fused, gated
        self.up, self.gate, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def attend(self, x: Tensor, mask: Tensor | None, turn: Callable[[Tensor], Tensor]) -> Tensor:
        q, k, v = map(_heads, self.qkv(x).chunk(3, -1))
        q, k = turn(q), turn(k)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        else:
            scores = q @ k.transpose(-1, -2) * 8**-0.5
            y = (scores if mask is None else scores + mask).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))

    def body(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) if self.gated else F.gelu(self.up(x)))

    def forward(self, x: Tensor, mask: Tensor | None = None, turn: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        if self.pre:
            x = x + self.attend(self.m(x), mask, turn)
            return x + self.body(self.n(x))
        x = self.m(x + self.attend(x, mask, turn))
        return self.n(x + self.body(x))


def _lm(forward: Callable[..., Any], deep: int = 2, **more: Any) -> Net:
    options = {k: more.pop(k) for k in ("pre", "fused", "gated", "norm") if k in more}
    parts: dict[str, Any] = {
        "words": nn.Embedding(40, 16),
        "places": nn.Embedding(64, 16),
        "final": nn.LayerNorm(16),
        "head": nn.Linear(16, 40, bias=False),
    }
    return Net(forward, **(parts | more), blocks=nn.ModuleList(Block(**options) for _ in range(deep)))


@case((True, True, False), (True, False, False), (False, True, False), (True, True, True))
def transformer(pre: bool, fused: bool, gated: bool) -> Built:
    def forward(net: Net, ids: Tensor) -> Tensor:
        x = net.words(ids) + net.places(torch.arange(ids.shape[1]))
        for block in net.blocks:
            x = block(x)
        return net.head(net.final(x))

    return _lm(forward, pre=pre, fused=fused, gated=gated), _words, cross_entropy


@case("half", "interleaved", "complex", "buffers")
def rope(how: str) -> Built:
    def forward(net: Net, ids: Tensor) -> Tensor:
        angle = torch.arange(ids.shape[1])[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
        cos, sin = (net.cos, net.sin) if how == "buffers" else (angle.cos(), angle.sin())

        def turn(t: Tensor) -> Tensor:
            if how == "complex":
                turned = torch.view_as_complex(t.float().unflatten(-1, (4, 2))) * torch.polar(
                    torch.ones_like(angle), angle
                )
                return torch.view_as_real(turned).flatten(-2).type_as(t)
            if how == "interleaved":
                a, b = t[..., ::2], t[..., 1::2]
                return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        x = net.words(ids)
        for block in net.blocks:
            x = block(x, turn=turn)
        return net.head(net.final(x))

    angle = torch.arange(12)[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    return (
        _lm(forward, cos=angle.cos(), sin=angle.sin(), norm=nn.RMSNorm, gated=True, final=nn.RMSNorm(16)),
        _words,
        cross_entropy,
    )


@case("alibi", "t5-bias", "learned-scale", "rel-embedding", row=TABLE)
def position_bias(how: str) -> Built:
    def forward(net: Net, ids: Tensor) -> Tensor:
        gap = torch.arange(12)[None] - torch.arange(12)[:, None]
        bias = {
            "alibi": lambda: -gap.abs() * net.slopes.view(2, 1, 1),
            "t5-bias": lambda: net.table(gap.clamp(-8, 8) + 8).permute(2, 0, 1),
            "learned-scale": lambda: gap * net.scale.view(2, 1, 1),
            "rel-embedding": lambda: net.raw[gap + 11].permute(2, 0, 1),
        }[how]()
        x = net.words(ids)
        for block in net.blocks:
            x = block(x, mask=bias)
        return net.head(net.final(x))

    return (
        _lm(
            forward,
            fused=False,
            slopes=torch.tensor([0.5, 0.25]),
            table=nn.Embedding(17, 2),
            scale=nn.Parameter(torch.tensor([0.01, -0.01])),
            raw=nn.Parameter(torch.randn(23, 2) * 0.1),
        ),
        _words,
        cross_entropy,
    )


@case("repeats", "mixed", "two-axes", "gather", "slice", row=TABLE, scale=8.0)
def indexed_table(how: str) -> Built:
    many = 20000 if how == "repeats" else 2000

    def forward(net: Net, ids: Tensor) -> Tensor:
        if how == "two-axes":
            x = net.table[ids, :8]
        elif how == "gather":
            x = torch.gather(net.table, 0, ids[:, None].expand(-1, 16))
        elif how == "slice":
            x = net.table[ids] + net.table[0:1]
        else:
            x = net.table[ids]
        x = torch.cat([x, x], 1) if how == "two-axes" else x
        return net.body(x)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y, reduction="sum") / 100

    model = Net(forward, table=nn.Parameter(torch.randn(4 if how != "mixed" else 50, 16)), body=mlp(16, 32, 4))
    rows = 2 if how == "repeats" else 4
    return model, lambda: ((torch.randint(0, rows, (many,)),), (torch.randn(many, 4) * 0.3 + 0.5,)), loss


@case("embedding", "tied", "scaled", "bag", "padded", scale=64.0)
def embeddings(how: str) -> Built:
    def forward(net: Net, ids: Tensor) -> Tensor:
        if how == "bag":
            return net.head(net.bag(ids))[:, None].expand(-1, ids.shape[1], -1)
        x = net.words(ids) * (4.0 if how == "scaled" else 1.0)
        x = net.norm(x + net.body(x))
        return F.linear(x, net.words.weight) if how == "tied" else net.head(x)

    model = Net(
        forward,
        words=nn.Embedding(40, 16, padding_idx=0 if how == "padded" else None),
        bag=nn.EmbeddingBag(40, 16),
        norm=nn.LayerNorm(16),
        body=mlp(16, 32, 16),
        head=nn.Linear(16, 40),
    )
    return model, lambda: _words(48), cross_entropy


def _mask(value: float, whole: bool) -> Tensor:
    mask = torch.where(torch.rand(3, 1, 12, 12) < 0.3, value, 0.0)
    mask[..., 0] = 0.0
    if whole:
        mask[0, :, 3] = value
    return mask


@case(
    (-1e9, True, False),
    (-1e9, False, False),
    (-1e9, False, True),
    (-1e4, True, False),
    (-65504.0, True, False),
    (float("-inf"), False, False),
    (-3e38, True, False),
    row=MASK,
)
def masked(value: float, whole: bool, fused: bool) -> Built:
    def forward(net: Net, ids: Tensor, mask: Tensor) -> Tensor:
        x = net.words(ids)
        for block in net.blocks:
            x = block(x, mask=mask)
        return net.head(net.final(x))

    def batch() -> tuple[tuple[Tensor, Tensor], tuple[Tensor]]:
        words = torch.randint(0, 40, (3, 12))
        return (words, _mask(value, whole)), (words,)

    return _lm(forward, fused=fused), batch, cross_entropy


@case("built", "where", "masked-fill", "multiplied", "bool-fused", row=MASK)
def mask_made_inside(how: str) -> Built:
    def forward(net: Net, ids: Tensor, keep: Tensor) -> Tensor:
        wide = keep[:, None, None, :]
        x = net.words(ids)
        q, k, v = map(_heads, net.qkv(net.final(x)).chunk(3, -1))
        if how == "bool-fused":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=wide)
        else:
            scores = q @ k.transpose(-1, -2) * 8**-0.5
            scores = {
                "built": lambda: scores + (1.0 - wide.float()) * -1e9,
                "where": lambda: torch.where(wide, scores, -1e9),
                "masked-fill": lambda: scores.masked_fill(~wide, float("-inf")),
                "multiplied": lambda: scores * wide - 1e4 * (1 - wide.float()),
            }[how]()
            y = scores.softmax(-1) @ v
        return net.head(x + y.transpose(1, 2).flatten(2))

    def batch() -> tuple[tuple[Tensor, Tensor], tuple[Tensor]]:
        words = torch.randint(1, 40, (3, 12))
        keep = torch.rand(3, 12) < 0.7
        keep[:, 0] = True
        return (words, keep), (words,)

    return _lm(forward, deep=0, qkv=nn.Linear(16, 48)), batch, cross_entropy


@case("added", "added-to-product", "scaled", "subtracted", row=BUFFER)
def large_buffer(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.body(x)
        if how == "added":
            return net.head(torch.tanh((x + net.far) * 1e-5) + y)
        if how == "added-to-product":
            return net.head(torch.log(y.abs() + net.far) * 0.1)
        if how == "scaled":
            return net.head(torch.tanh(y * net.far * 1e-5))
        return net.head(torch.tanh((net.far - y) / 7e4))

    model = Net(forward, far=torch.full((16,), 70000.0), body=nn.Linear(16, 16), head=nn.Linear(16, 4))
    return model, lambda: ((torch.randn(8, 16),), (torch.randn(8, 4),)), mse


@case("lstm", "gru", "rnn", "lstm2")
def recurrent(how: str) -> Built:
    made = {
        "lstm": nn.LSTM(16, 16, batch_first=True),
        "gru": nn.GRU(16, 16, batch_first=True),
        "rnn": nn.RNN(16, 16, batch_first=True),
        "lstm2": nn.LSTM(16, 16, 2, batch_first=True, bidirectional=True),
    }[how]
    wide = 32 if how == "lstm2" else 16
    model = Net(
        lambda net, ids: net.head(net.cell(net.words(ids))[0]),
        words=nn.Embedding(40, 16),
        cell=made,
        head=nn.Linear(wide, 40),
    )
    return model, _words, cross_entropy


@case("lstm", "gru", "minimal", "highway")
def cells_by_hand(how: str) -> Built:
    def forward(net: Net, ids: Tensor) -> Tensor:
        x, h, c, seen = net.words(ids), torch.zeros(3, 16), torch.zeros(3, 16), []
        for t in range(ids.shape[1]):
            i, f, g, o = net.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
            if how == "lstm":
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            elif how == "highway":
                h = torch.sigmoid(i) * torch.tanh(g) + (1 - torch.sigmoid(i)) * x[:, t]
            else:
                z = torch.sigmoid(i)
                h = (1 - z) * h + z * torch.tanh(g + (torch.sigmoid(f) * h if how == "gru" else 0.0))
            seen.append(h)
        return net.head(torch.stack(seen, 1))

    return (
        Net(forward, words=nn.Embedding(40, 16), gates=nn.Linear(32, 64), head=nn.Linear(16, 40)),
        _words,
        cross_entropy,
    )


@case("moe", "linear-attention", "retention", "conv", "mixer", "performer")
def mixers(how: str) -> Built:
    def forward(net: Net, ids: Tensor) -> Tensor:
        x = net.words(ids)
        y = net.final(x)
        if how == "moe":
            gate = net.gate(y).softmax(-1)
            x = x + sum(gate[..., i : i + 1] * expert(y) for i, expert in enumerate(net.experts))
        elif how == "conv":
            x = x + net.conv(F.pad(y.transpose(1, 2), (3, 0))).transpose(1, 2)
        elif how == "mixer":
            x = x + net.across(y.transpose(1, 2)).transpose(1, 2)
        else:
            q, k, v = net.qkv(y).chunk(3, -1)
            if how == "retention":
                gap = torch.arange(12)[:, None] - torch.arange(12)
                x = x + ((q @ k.transpose(1, 2)) * torch.where(gap >= 0, 0.9 ** gap.clamp_min(0), 0.0)) @ v
            else:
                q, k = (
                    (F.elu(q) + 1, F.elu(k) + 1) if how == "linear-attention" else (torch.exp(q - 1), torch.exp(k - 1))
                )
                x = x + (q @ (k.transpose(1, 2) @ v)) / (q @ k.sum(1)[..., None])
        return net.head(x)

    model = _lm(
        forward,
        deep=0,
        gate=nn.Linear(16, 2),
        experts=nn.ModuleList(mlp(16, 32, 16) for _ in range(2)),
        conv=nn.Conv1d(16, 16, 4, groups=16),
        across=nn.Linear(12, 12),
        qkv=nn.Linear(16, 48),
    )
    return model, _words, cross_entropy


@case("smoothed", "z-loss", "weighted", "focal", "distilled", "contrastive", "reward", "dpo", scale=256.0)
def losses(how: str) -> Built:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        flat, t = out.flatten(0, 1), y.flatten()
        each = F.cross_entropy(flat, t, reduction="none")
        found = {
            "smoothed": lambda: F.cross_entropy(flat, t, label_smoothing=0.1),
            "z-loss": lambda: each.mean() + 1e-2 * flat.logsumexp(-1).square().mean(),
            "weighted": lambda: (each * (t % 3)).sum() / (t % 3).sum(),
            "focal": lambda: ((1 - torch.exp(-each)) ** 2 * each).mean(),
            "distilled": lambda: F.kl_div(
                flat.log_softmax(-1), flat.detach().roll(1, 0).softmax(-1), reduction="batchmean"
            ),
            "contrastive": lambda: F.cross_entropy(
                F.normalize(out.mean(1)) @ F.normalize(out[:, 0]).T / 0.1, torch.arange(3)
            ),
            "reward": lambda: -F.logsigmoid(out[0].mean() - out[1].mean()),
            "dpo": lambda: -F.logsigmoid(0.1 * (-each.view(3, -1).sum(1)[0] + each.view(3, -1).sum(1)[1])),
        }
        return found[how]()

    model = Net(
        lambda net, ids: net.head(net.body(net.words(ids))),
        words=nn.Embedding(40, 16),
        body=mlp(16, 32, 16),
        head=nn.Linear(16, 40),
    )
    return model, _words, loss


@case("encoder-decoder", "cross", "nn-transformer", "mha")
def torch_s_own(how: str) -> Built:
    if how == "nn-transformer":
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        model = Net(
            lambda net, ids: net.head(net.body(net.words(ids))),
            words=nn.Embedding(40, 16),
            body=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            head=nn.Linear(16, 40),
        )
        return model, _words, cross_entropy
    if how == "mha":
        model = Net(
            lambda net, ids: net.head(net.body(*[net.words(ids)] * 3)[0]),
            words=nn.Embedding(40, 16),
            body=nn.MultiheadAttention(16, 2, batch_first=True),
            head=nn.Linear(16, 40),
        )
        return model, _words, cross_entropy
    if how == "cross":
        model = Net(
            lambda net, ids: net.head(net.body(net.words(ids), net.words(ids.flip(1)))),
            words=nn.Embedding(40, 16),
            body=nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
            head=nn.Linear(16, 40),
        )
        return model, _words, cross_entropy
    model = Net(
        lambda net, ids: net.head(net.body(net.words(ids), net.words(ids))),
        words=nn.Embedding(40, 16),
        body=nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True),
        head=nn.Linear(16, 40),
    )
    return model, _words, cross_entropy
