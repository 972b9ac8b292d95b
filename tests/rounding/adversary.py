"""Adversaries and normalised weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import Built, Domain, Net, mlp, mse

case = Domain("adversary")


@case("gan", "hinge", "wgan", "lsgan", "feature-matching", scale=128.0)
def game(how: str) -> Built:
    def forward(net: Net, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([net.make(z), x])
        seen = F.leaky_relu(net.see(both), 0.2)
        if how == "feature-matching":
            fake, real = seen.chunk(2)
            return fake.mean(0), real.mean(0)
        fake, real = net.tell(seen).chunk(2)
        return fake, real

    def loss(out: tuple[Tensor, Tensor]) -> Tensor:
        fake, real = out
        return {
            "gan": lambda: F.softplus(fake).mean() + F.softplus(-real).mean(),
            "hinge": lambda: F.relu(1 + fake).mean() + F.relu(1 - real).mean(),
            "wgan": lambda: fake.mean() - real.mean(),
            "lsgan": lambda: fake.square().mean() + (real - 1).square().mean(),
            "feature-matching": lambda: (fake - real).square().sum(),
        }[how]()

    return (
        Net(forward, make=mlp(8, 16, 8), see=nn.Linear(8, 16), tell=nn.Linear(16, 1)),
        lambda: ((torch.randn(16, 8), torch.randn(16, 8)), ()),
        loss,
    )


@case("style", "spectral", "weight-norm")
def normalised_weights(how: str) -> Built:
    def forward(net: Net, x: Tensor, z: Tensor) -> Tensor:
        w = net.weight
        if how == "weight-norm":
            return net.out(F.linear(x, w * (net.gain / w.norm(dim=1, keepdim=True))))
        if how == "spectral":
            return net.out(F.linear(x, w / torch.dot(net.u, w @ (w.T @ net.u))))
        w = w[None] * (1 + 0.1 * z)[:, None]
        w = w * torch.rsqrt(w.square().sum(2, keepdim=True) + 1e-8)
        return net.out(torch.einsum("bi,boi->bo", x, w))

    model = Net(
        forward,
        weight=nn.Parameter(torch.randn(16, 8)),
        gain=nn.Parameter(torch.ones(16, 1)),
        u=F.normalize(torch.randn(16), dim=0),
        out=nn.Linear(16, 4),
    )
    return model, lambda: ((torch.randn(16, 8), torch.randn(16, 8)), (torch.randn(16, 4),)), mse
