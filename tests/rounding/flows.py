"""Normalising flows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rounding.registry import Built, Domain, Net, mlp

case = Domain("flows")


@case("realnvp", "glow", "maf", "planar", "spline", "continuous", "residual")
def flow(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x))
        for i, body in enumerate(net.bodies):
            if how == "planar":
                h = torch.tanh(body(x)[:, :1])
                x = x + 0.1 * net.u[i] * h
                total = total + torch.log1p((0.1 * (1 - h.square()) * 0.1).squeeze(1))
                continue
            if how == "continuous":
                x, total = x + 0.05 * torch.tanh(body(torch.cat([x, x], 1)[:, :4])), total - 0.05 * x.square().sum(1)
                continue
            if how == "residual":
                x, total = x + 0.1 * body(x[:, :4])[:, :8], total + 0.1 * x.mean(1)
                continue
            a, b = x.chunk(2, 1)
            s, t = body(a).chunk(2, 1)
            s = torch.tanh(s)
            if how == "spline":
                b = b + 0.1 * torch.sin(b * 3 + s) + t
                total = total + torch.log1p(0.3 * torch.cos(b * 3 + s)).sum(1)
            else:
                b, total = b * torch.exp(s) + t, total + s.sum(1)
            x = torch.cat([b, a], 1)
            if how == "glow":
                x, total = x @ net.mix, total + torch.linalg.slogdet(net.mix).logabsdet
            elif how == "maf":
                x = x.flip(1)
        return x, total

    def loss(out: tuple[Tensor, Tensor]) -> Tensor:
        return (0.5 * out[0].square().sum(1) - out[1]).mean()

    model = Net(
        forward,
        bodies=nn.ModuleList(mlp(8 if how == "planar" else 4, 16, 8, act=nn.Tanh) for _ in range(3)),
        u=nn.Parameter(torch.randn(3, 8)),
        mix=nn.Parameter(torch.linalg.qr(torch.randn(8, 8)).Q.contiguous()),
    )
    return model, lambda: ((torch.randn(16, 8),), ()), loss
