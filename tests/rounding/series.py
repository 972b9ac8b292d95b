"""Time series and their forecasts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import RAW, Built, Domain, Net, mlp, mse

case = Domain("series")


@case("instance", "min-max", "last", "decomposed", row=RAW)
def forecast(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        if how == "instance":
            mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
            return net.body((x - mean) / std) * std + mean
        if how == "min-max":
            low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
            return net.body((x - low) / (high - low)) * (high - low) + low
        if how == "last":
            return net.body(x - x[:, -1:]) + x[:, -1:]
        trend = F.avg_pool1d(x[:, None], 5, 1, 2, count_include_pad=False)[:, 0]
        return net.body(x - trend) + net.trend(trend - 1000.0) + 1000.0

    model = Net(forward, body=mlp(24, 32, 6), trend=nn.Linear(24, 6))
    return model, lambda: ((torch.randn(8, 24) * 2 + 1000,), (torch.randn(8, 6) * 2 + 1000,)), mse


@case("tcn", "nbeats", "patch", "seq2seq", "gru-d")
def forecasters(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        if how == "tcn":
            y = F.relu(net.conv(F.pad(x[:, None], (2, 0))))
            return net.out(F.relu(net.conv2(F.pad(y, (4, 0))))[..., -1])
        if how == "nbeats":
            total = torch.zeros(len(x), 6)
            for block in net.blocks:
                back, front = block(x).split((24, 6), 1)
                x, total = x - back, total + front
            return total
        if how == "patch":
            return net.out(net.layer(net.patch(x.unfold(1, 6, 6)) + net.position).mean(1))
        if how == "seq2seq":
            _, h = net.cell(x[..., None])
            y, seen, h = x[:, -1:], [], h[0]
            for _ in range(4):
                h = net.decoder(y, h)
                y = y + net.step(h)
                seen.append(y)
            return torch.cat([*seen, y, y], 1)
        h, gap = torch.zeros(len(x), 8), torch.arange(24.0)
        for t in range(0, 24, 4):
            h = net.decoder(x[:, t : t + 1], h * torch.exp(-F.relu(net.decay * gap[t])))
        return net.out(h)

    model = Net(
        forward,
        conv=nn.Conv1d(1, 8, 3),
        conv2=nn.Conv1d(8, 8, 3, dilation=2),
        out=nn.Linear(8, 6),
        blocks=nn.ModuleList(mlp(24, 32, 30) for _ in range(3)),
        patch=nn.Linear(6, 8),
        position=nn.Parameter(torch.randn(4, 8) * 0.1),
        layer=nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        cell=nn.GRU(1, 8, batch_first=True),
        decoder=nn.GRUCell(1, 8),
        step=nn.Linear(8, 1),
        decay=nn.Parameter(torch.full((8,), 0.05)),
    )
    return model, lambda: ((torch.randn(8, 24),), (torch.randn(8, 6),)), mse


@case("unix", "days", "harmonics", row=RAW)
def time_stamps(how: str) -> Built:
    def forward(net: Net, t: Tensor, x: Tensor) -> Tensor:
        if how == "unix":
            seen = torch.stack([(t - 1.6e9) / 1e7], 1)
        elif how == "days":
            seen = torch.stack([(t - t.mean()) / t.std()], 1)
        else:
            seen = torch.stack([torch.sin(t * 6.2831853 / 365.25), torch.cos(t * 6.2831853 / 7.0)], 1)
        return net.body(torch.cat([seen, x], 1))

    wide = 2 if how == "harmonics" else 1
    first = (
        (lambda: torch.rand(16) * 2e7 + 1.6e9)
        if how == "unix"
        else (lambda: torch.randint(18000, 19000, (16,)).float())
    )
    return Net(forward, body=mlp(4 + wide, 32, 2)), lambda: ((first(), torch.randn(16, 4)), (torch.randn(16, 2),)), mse


@case("gaussian", "student", "negative-binomial", "quantiles", "returns", scale=64.0)
def probabilistic(how: str) -> Built:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        a, b = out.chunk(2, 1)
        if how == "gaussian":
            wide = F.softplus(b) + 1e-3
            return 0.5 * (torch.log(wide) + (y - a) ** 2 / wide).mean()
        if how == "student":
            return (
                torch.log1p((y - a) ** 2 / (3 * (F.softplus(b) + 0.1) ** 2)) * 2 + torch.log(F.softplus(b) + 0.1)
            ).mean()
        if how == "negative-binomial":
            mean, shape = F.softplus(a) + 0.1, F.softplus(b) + 0.5
            count = (y * 3).round().abs()
            return -(
                torch.lgamma(count + shape)
                - torch.lgamma(shape)
                + shape * torch.log(shape / (shape + mean))
                + count * torch.log(mean / (shape + mean))
            ).mean()
        if how == "quantiles":
            return (
                torch.maximum(0.1 * (y - a), -0.9 * (y - a)).mean()
                + torch.maximum(0.9 * (y - b), -0.1 * (y - b)).mean()
            )
        price = 100.0 + a
        return -((price[:, 1:] - price[:, :-1]) / price[:, :-1] * y[:, 1:]).mean() * 100

    return mlp(12, 32, 8), lambda: ((torch.randn(16, 12),), (torch.randn(16, 4),)), loss
