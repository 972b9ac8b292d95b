"""Diffusion: schedules, preconditioning, samplers, denoisers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import STATE, Built, Domain, Net, mlp, mse

case = Domain("diffusion")


def _times(t: Tensor, wide: int = 16) -> Tensor:
    angle = t[:, None] * torch.exp(torch.arange(wide // 2) * (-math.log(1e4) / (wide // 2)))
    return torch.cat([angle.sin(), angle.cos()], 1)


@case("epsilon", "velocity", "start", "min-snr", scale=256.0)
def ddpm(how: str) -> Built:
    def forward(net: Net, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a = net.alphas[t][:, None]
        seen = a.sqrt() * x + (1 - a).sqrt() * noise
        found = net.body(torch.cat([seen, _times(t.float())], 1))
        want = {"velocity": lambda: a.sqrt() * noise - (1 - a).sqrt() * x, "start": lambda: x}.get(how, lambda: noise)()
        each = (found - want).square().mean(1)
        return each * torch.clamp(a[:, 0] / (1 - a[:, 0]), max=5.0) if how == "min-snr" else each

    def loss(out: Tensor) -> Tensor:
        return out.mean()

    model = Net(
        forward, alphas=torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0), body=mlp(24, 32, 8, act=nn.SiLU)
    )
    return model, lambda: ((torch.randn(16, 8), torch.randn(16, 8), torch.randint(0, 1000, (16,))), ()), loss


@case("edm", "ve", "rectified", "consistency")
def continuous(how: str) -> Built:
    def forward(net: Net, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        s = torch.exp(t * 2)[:, None] if how != "rectified" else torch.sigmoid(t)[:, None]
        if how == "rectified":
            return net.body(torch.cat([(1 - s) * x + s * noise, s], 1)) - (noise - x)
        seen = x + s * noise
        if how == "ve":
            return net.body(torch.cat([seen, s.log()], 1)) / s + noise
        skip, out, into = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt(), (s**2 + 0.25).rsqrt()
        found = skip * seen + out * net.body(torch.cat([into * seen, s.log() / 4], 1))
        return found - x if how == "edm" else found - (skip * seen).detach()

    return (
        Net(forward, body=mlp(9, 32, 8, act=nn.SiLU)),
        lambda: ((torch.randn(16, 8), torch.randn(16, 8), torch.randn(16)), (torch.zeros(16, 8),)),
        mse,
    )


@case("ddim", "euler", "langevin", row=STATE)
def sampler(how: str) -> Built:
    def forward(net: Net, x: Tensor, noise: Tensor) -> Tensor:
        for i in range(8):
            s = 1.0 - i / 8
            found = net.body(torch.cat([x, torch.full((len(x), 1), s)], 1))
            if how == "ddim":
                x = math.cos(s / 50) * x + math.sin(s / 50) * found
            elif how == "euler":
                x = x + (1 / 800) * found
            else:
                x = x + 0.001 * found + 0.04 * noise[i]
        return x

    return (
        Net(forward, body=mlp(9, 32, 8, act=nn.SiLU)),
        lambda: ((torch.randn(16, 8) + 3, torch.randn(8, 16, 8)), (torch.randn(16, 8),)),
        mse,
    )


@case("adagn", "film", "cross")
def denoising_unet(how: str) -> Built:
    def forward(net: Net, x: Tensor, t: Tensor) -> Tensor:
        y, e = net.into(x), net.time(_times(t))
        scale, shift = e[:, :, None, None].chunk(2, 1)
        z = net.norm(y)
        z = net.conv(F.silu(z * (1 + scale) + shift if how != "cross" else z))
        if how == "cross":
            q = z.flatten(2).transpose(1, 2)
            z = z + F.scaled_dot_product_attention(q, e[:, None, :8], e[:, None, 8:]).transpose(1, 2).view_as(z)
        y = y + z
        return net.out(F.silu(y + net.up(F.silu(net.down(y)))))

    model = Net(
        forward,
        into=nn.Conv2d(3, 8, 3, padding=1),
        norm=nn.GroupNorm(2, 8),
        conv=nn.Conv2d(8, 8, 3, padding=1),
        time=mlp(16, 32, 16, act=nn.SiLU),
        down=nn.Conv2d(8, 16, 3, 2, 1),
        up=nn.ConvTranspose2d(16, 8, 2, 2),
        out=nn.Conv2d(8, 3, 3, padding=1),
    )
    return model, lambda: ((torch.randn(2, 3, 8, 8), torch.rand(2) * 1000), (torch.randn(2, 3, 8, 8),)), mse


@case()
def dit() -> Built:
    def forward(net: Net, x: Tensor, t: Tensor) -> Tensor:
        x = net.patch(x) + net.position
        for made, attention, body in zip(net.made, net.attentions, net.bodies, strict=True):
            a, b, c, d, e, f = made(F.silu(net.time(_times(t))))[:, None].chunk(6, 2)
            y = F.layer_norm(x, (16,)) * (1 + a) + b
            x = x + c * attention(y, y, y, need_weights=False)[0]
            x = x + f * body(F.layer_norm(x, (16,)) * (1 + d) + e)
        return net.out(F.layer_norm(x, (16,)))

    each = lambda make: nn.ModuleList(make() for _ in range(2))  # noqa: E731
    model = Net(
        forward,
        patch=nn.Linear(12, 16),
        position=torch.sin(torch.arange(256.0).view(16, 16)),
        time=mlp(16, 16, 16, act=nn.SiLU),
        made=each(lambda: nn.Linear(16, 96)),
        attentions=each(lambda: nn.MultiheadAttention(16, 2, batch_first=True)),
        bodies=each(lambda: mlp(16, 32, 16, act=nn.GELU)),
        out=nn.Linear(16, 12),
    )
    return model, lambda: ((torch.randn(2, 16, 12), torch.rand(2) * 1000), (torch.randn(2, 16, 12),)), mse
