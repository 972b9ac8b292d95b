"""Variational and Bayesian models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import Built, Domain, Net, mlp

case = Domain("bayes")


@case("vae", "beta", "iwae", "vq", "categorical", "hierarchical", scale=128.0)
def variational(how: str) -> Built:
    def forward(net: Net, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = net.encode(x).chunk(2, 1)
        if how == "vq":
            near = torch.cdist(mean, net.codes).argmin(1)
            code = net.codes[near]
            return net.decode(mean + (code - mean).detach()), (code - mean.detach()).square().sum(1) + 0.25 * (
                code.detach() - mean
            ).square().sum(1)
        if how == "categorical":
            q = (mean + noise).softmax(1)
            return net.decode(q), (q * (q + 1e-8).log()).sum(1)
        z = mean + torch.exp(0.5 * spread) * noise
        kl = 0.5 * (mean.square() + spread.exp() - spread - 1).sum(1)
        if how == "hierarchical":
            z = z + 0.1 * net.more(z)
        return net.decode(z), kl * (4.0 if how == "beta" else 1.0)

    def loss(out: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        each = (out[0] - x).square().sum(1) + out[1]
        return -torch.logsumexp(-each, 0) if how == "iwae" else each.mean()

    model = Net(
        forward,
        encode=mlp(16, 32, 16),
        decode=mlp(8, 32, 16),
        codes=nn.Parameter(torch.randn(12, 8)),
        more=nn.Linear(8, 8),
    )
    return model, lambda: (((x := torch.randn(16, 16)), torch.randn(16, 8)), (x,)), loss


@case("weights", "local", "laplace", "ensemble", "evidential", "gp", "dropout-rate", scale=128.0)
def uncertain(how: str) -> Built:
    def forward(net: Net, x: Tensor, noise: Tensor) -> Tensor:
        if how == "weights":
            return F.linear(x, net.mean + F.softplus(net.spread) * noise[:8, :16], net.bias)[:, :4]
        if how == "local":
            mean, wide = F.linear(x, net.mean), F.linear(x.square(), F.softplus(net.spread).square())
            return (mean + (wide + 1e-6).sqrt() * noise[:, :8])[:, :4]
        y = torch.relu(net.body(x))
        if how == "gp":
            k = torch.exp(-torch.cdist(y, y).square() / 8) + 0.1 * torch.eye(len(x))
            return k @ torch.linalg.solve(k.float() + torch.eye(len(x)), net.head(y).float())
        if how == "ensemble":
            return torch.stack([head(y) for head in net.heads]).mean(0)
        if how == "dropout-rate":
            rate = torch.sigmoid(net.rate)
            return net.head(y * torch.sigmoid((torch.log(rate) - torch.log1p(-rate) + noise[:, :16]) / 0.1))
        return net.head(y) if how == "laplace" else F.softplus(net.head(y)) + 1.0

    def loss(out: Tensor, y: Tensor) -> Tensor:
        if how == "evidential":
            return (torch.log(out.sum(1)) - torch.log(out[:, 0])).mean()
        return (out - y).square().mean()

    model = Net(
        forward,
        mean=nn.Parameter(torch.randn(8, 16) / 4),
        spread=nn.Parameter(torch.full((8, 16), -3.0)),
        bias=nn.Parameter(torch.zeros(8)),
        body=nn.Linear(16, 16),
        head=nn.Linear(16, 4),
        heads=nn.ModuleList(nn.Linear(16, 4) for _ in range(3)),
        rate=nn.Parameter(torch.tensor(1.0)),
    )
    return model, lambda: ((torch.randn(16, 16), torch.randn(16, 16)), (torch.randn(16, 4),)), loss
