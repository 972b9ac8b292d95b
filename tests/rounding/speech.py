"""Speech: features, recognisers, synthesis."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import RAW, Built, Domain, Net, cross_entropy, mlp

case = Domain("speech")


def _waves(length: int = 256, scale: float = 1.0) -> Tensor:
    return torch.randn(4, 1, length) * scale


@case("stft", "mel", "raw", "int16")
def keyword(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        if how == "raw":
            return net.head(net.front(x).mean(2))
        x = x.float() / 32768.0 if how == "int16" else x
        power = torch.stft(x.squeeze(1), 32, 16, window=net.window, return_complex=True).abs().square()
        power = net.mel @ power if how == "mel" else power
        return net.head(net.conv(torch.log(power + 1e-6)).relu().mean(2))

    bands = 8 if how == "mel" else 17
    front = nn.Sequential(nn.Conv1d(1, 8, 9, 4), nn.GroupNorm(1, 8), nn.GELU(), nn.Conv1d(8, 8, 3, 2))
    model = Net(
        forward,
        window=torch.hann_window(32),
        mel=torch.rand(8, 17),
        conv=nn.Conv1d(bands, 8, 3),
        front=front,
        head=nn.Linear(8, 4),
    )
    if how == "int16":
        return (
            model,
            lambda: ((torch.randint(-30000, 30000, (4, 1, 256), dtype=torch.int16),), (torch.randint(0, 4, (4,)),)),
            cross_entropy,
        )
    return model, lambda: ((_waves(),), (torch.randint(0, 4, (4,)),)), cross_entropy


@case("cmvn", "utterance", "log-mel", row=RAW)
def normalised_features(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        if how == "cmvn":
            x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
        elif how == "utterance":
            x = F.layer_norm(x, x.shape[1:])
        else:
            x = (torch.log10(x.clamp_min(1e-10)) - 2.9) * 4.0
        return net.head(net.cell(x)[0].mean(1))

    model = Net(forward, cell=nn.GRU(8, 16, batch_first=True), head=nn.Linear(16, 4))
    return model, lambda: ((torch.randn(4, 20, 8) * 2 + 900,), (torch.randint(0, 4, (4,)),)), cross_entropy


@case("lstm", "conv")
def ctc(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.cell(x)[0] if how == "lstm" else net.conv(x.transpose(1, 2)).relu().transpose(1, 2)
        return net.head(y).log_softmax(-1)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.ctc_loss(out.transpose(0, 1), y, torch.full((4,), 20), torch.full((4,), 5))

    model = Net(
        forward, cell=nn.LSTM(8, 16, batch_first=True), conv=nn.Conv1d(8, 16, 3, padding=1), head=nn.Linear(16, 10)
    )
    return model, lambda: ((torch.randn(4, 20, 8),), (torch.randint(1, 10, (4, 5)),)), loss


@case()
def conformer() -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.into(x)
        x = x + 0.5 * net.feed(net.a(x))
        y = net.b(x)
        x = x + net.attention(y, y, y, need_weights=False)[0]
        y = F.glu(net.point(net.c(x).transpose(1, 2)), 1)
        x = x + net.point2(F.silu(net.batch(net.depth(y)))).transpose(1, 2)
        return net.head(x)

    model = Net(
        forward,
        into=nn.Linear(8, 16),
        feed=mlp(16, 32, 16, act=nn.SiLU),
        a=nn.LayerNorm(16),
        b=nn.LayerNorm(16),
        c=nn.LayerNorm(16),
        attention=nn.MultiheadAttention(16, 2, batch_first=True),
        point=nn.Conv1d(16, 32, 1),
        depth=nn.Conv1d(16, 16, 5, padding=2, groups=16),
        batch=nn.BatchNorm1d(16),
        point2=nn.Conv1d(16, 16, 1),
        head=nn.Linear(16, 10),
    )
    return model, lambda: ((torch.randn(4, 20, 8),), (torch.randint(0, 10, (4, 20)),)), cross_entropy


@case("transducer", "speaker", "tts-duration", "vocoder", scale=2.0)
def other_speech(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = torch.tanh(net.into(x))
        if how == "transducer":
            return net.head(torch.tanh(y[:, :, None] + net.words.weight[None, None, :5]))
        if how == "speaker":
            weight = net.score(y).softmax(1)
            mean = (weight * y).sum(1)
            return net.head(torch.cat([mean, ((weight * (y - mean[:, None]) ** 2).sum(1) + 1e-5).sqrt()], 1)[:, :16])
        if how == "tts-duration":
            lengths = F.softplus(net.score(y)).squeeze(-1)
            return torch.cumsum(lengths, 1)
        phase = torch.cumsum(F.softplus(net.score(y)).squeeze(-1) * 20, 1)
        return torch.sin(phase) * net.head(y).mean(-1)

    def loss(out: Tensor) -> Tensor:
        return out.square().mean()

    model = Net(
        forward, into=nn.Linear(8, 16), score=nn.Linear(16, 1), words=nn.Embedding(6, 16), head=nn.Linear(16, 10)
    )
    return model, lambda: ((torch.randn(4, 40, 8),), ()), loss
