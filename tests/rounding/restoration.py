"""Restoration and super-resolution: a picture plus what a network adds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import SUM, Built, Domain, Net

case = Domain("restoration")


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    pool = lambda t: F.avg_pool2d(t, 3, 1)  # noqa: E731
    m, n = pool(a), pool(b)
    v, w, c = pool(a * a) - m * m, pool(b * b) - n * n, pool(a * b) - m * n
    return ((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4))).mean()


def _restored(net: Net, x: Tensor) -> Tensor:
    return x + 0.01 * net.body(x)


def _body(out: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, out, 3, padding=1))


def _pictures() -> tuple[tuple[Tensor], tuple[Tensor]]:
    x = torch.rand(2, 3, 12, 12) * 0.1 + 1
    return (x,), (x + 0.01 * torch.randn_like(x),)


@case("mse", "ssim", "gradient", "charbonnier", "total-variation", "psnr", "difference", row=SUM, scale=1.0)
def residual(how: str) -> Built:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        if how == "ssim":
            return 1 - _ssim(out, y)
        if how in ("gradient", "total-variation"):
            d = out[..., 1:] - out[..., :-1]
            return (
                d.abs().mean() if how == "total-variation" else (d - y[..., 1:] + y[..., :-1]).square().mean() * 100
            ) * 10
        if how == "charbonnier":
            return ((out - y).square() + 1e-6).sqrt().mean()
        if how == "psnr":
            return 10 * torch.log10((out - y).square().mean())
        return (out - y).square().mean() * 1e3

    def forward(net: Net, x: Tensor) -> Tensor:
        return (_restored(net, x) - x) * 100.0 if how == "difference" else _restored(net, x)

    return Net(forward, body=_body()), _pictures, loss


@case("bicubic", "bilinear", "shuffle", "nearest", row=SUM)
def super_resolution(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        if how == "shuffle":
            return F.pixel_shuffle(net.wide(x) * 0.01, 2) + F.interpolate(x, scale_factor=2.0)
        options = {} if how == "nearest" else {"align_corners": False}
        return F.interpolate(x, scale_factor=2.0, mode=how, **options) + 0.01 * net.body(
            F.interpolate(x, scale_factor=2.0)
        )

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return (out - y).square().mean() * 1e3

    return (
        Net(forward, body=_body(), wide=_body(12)),
        lambda: ((torch.rand(2, 3, 8, 8) * 0.1 + 1,), (torch.rand(2, 3, 16, 16) * 0.1 + 1,)),
        loss,
    )


@case("unrolled", "laplacian", "gamma", "demosaic", "inpaint", "bytes", row=SUM, scale=1.0)
def other(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        if how == "unrolled":
            y = x
            for _ in range(4):
                y = y - 0.1 * (y - x) - 0.01 * net.body(y)
            return y
        if how == "laplacian":
            small = F.avg_pool2d(x, 2)
            return F.interpolate(small, scale_factor=2.0) + (x - F.interpolate(small, scale_factor=2.0)) * (
                1 + 0.1 * net.body(x)
            )
        if how == "gamma":
            return x.clamp_min(1e-3) ** (1 + 0.01 * net.body(x).mean((2, 3), keepdim=True))
        if how == "demosaic":
            return torch.cat([x[:, :1], x[:, 1:] + 0.01 * net.body(x)[:, 1:]], 1)
        if how == "inpaint":
            return torch.where(net.hole, net.body(x), x)
        return (x * 255.0 + net.body(x)) / 255.0

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return (out - y).square().mean() * 1e3

    return Net(forward, body=_body(), hole=torch.rand(12, 12) < 0.3), _pictures, loss
