"""Self-supervision, and many losses at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import Built, Domain, Net, mlp

case = Domain("selfsup")


@case("byol", "vicreg", "barlow", "mae", "dino", "simsiam", "autoencoder", "jigsaw", scale=128.0)
def pretext(how: str) -> Built:
    def forward(net: Net, a: Tensor, b: Tensor) -> Tensor:
        x, y = net.body(a), net.body(b)
        if how == "byol":
            with torch.no_grad():
                want = net.target(b)
            return 2 - 2 * F.cosine_similarity(net.head(x), want).mean()
        if how == "simsiam":
            return -F.cosine_similarity(net.head(x), y.detach()).mean()
        if how == "vicreg":
            c = (x - x.mean(0)).T @ (x - x.mean(0)) / 15
            return (
                (x - y).square().mean()
                + F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean()
                + (c.square().sum() - c.diagonal().square().sum()) / 8
            )
        if how == "barlow":
            c = ((x - x.mean(0)) / x.std(0)).T @ ((y - y.mean(0)) / y.std(0)) / 16
            return (c.diagonal() - 1).square().sum() + 0.005 * (c.square().sum() - c.diagonal().square().sum())
        if how == "dino":
            return -(((x - net.centre) / 0.04).softmax(1).detach() * (y / 0.1).log_softmax(1)).sum(1).mean()
        if how == "mae":
            keep = a.abs() < 0.7
            return ((net.decode(net.body(torch.where(keep, a, net.token))) - a).square() * ~keep).sum() / (~keep).sum()
        if how == "jigsaw":
            return F.cross_entropy(net.head(x), torch.arange(16) % 8)
        return F.mse_loss(net.decode(x), a)

    model = Net(
        forward,
        body=mlp(8, 32, 8),
        target=mlp(8, 32, 8),
        head=mlp(8, 16, 8),
        decode=mlp(8, 32, 8),
        centre=torch.zeros(8),
        token=nn.Parameter(torch.zeros(8)),
    )
    return model, lambda: (((x := torch.randn(16, 8)), x + 0.1 * torch.randn(16, 8)), ()), lambda out: out


@case("weighted", "homoscedastic", "multi-head", "curriculum", "mixup")
def many_losses(how: str) -> Built:
    def forward(net: Net, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        h = F.relu(net.body(x))
        first, second = F.mse_loss(net.a(h), y), F.cross_entropy(net.b(h), labels)
        if how == "homoscedastic":
            return (torch.exp(-net.s) * torch.stack([first, second]) + net.s).sum()
        if how == "multi-head":
            return sum(F.mse_loss(head(h), y) for head in net.heads) / 3
        if how == "curriculum":
            each = (net.a(h) - y).square().mean(1)
            return (each * torch.sigmoid((each.detach().mean() - each.detach()) * 5)).mean()
        if how == "mixup":
            return 0.3 * second + 0.7 * F.cross_entropy(net.b(h), labels.flip(0))
        return 10 * first + 0.1 * second

    model = Net(
        forward,
        body=nn.Linear(8, 16),
        a=nn.Linear(16, 4),
        b=nn.Linear(16, 5),
        s=nn.Parameter(torch.zeros(2)),
        heads=nn.ModuleList(nn.Linear(16, 4) for _ in range(3)),
    )
    return model, lambda: ((torch.randn(16, 8), torch.randn(16, 4), torch.randint(0, 5, (16,))), ()), lambda out: out
