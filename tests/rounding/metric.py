"""Metric learning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import Built, Domain, Net, mlp, mse

case = Domain("metric")


@case(
    "triplet",
    "contrastive",
    "ntxent",
    "arcface",
    "proxy",
    "centre",
    "circle",
    "npair",
    "clip",
    "prototype",
    scale=128.0,
)
def embedding_losses(how: str) -> Built:
    def loss(out: Tensor, scale: Tensor, centres: Tensor, y: Tensor) -> Tensor:
        unit = F.normalize(out, dim=1)
        a, b, c = out[0::3], out[1::3], out[2::3]
        gap = lambda p, q: (p - q).square().sum(1)  # noqa: E731
        cosine = unit @ F.normalize(centres, dim=1).T
        return {
            "triplet": lambda: F.triplet_margin_loss(a, b, c),
            "contrastive": lambda: (gap(a, b) + F.relu(1 - (gap(a, c) + 1e-6).sqrt()) ** 2).mean(),
            "ntxent": lambda: F.cross_entropy(
                F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.07, torch.arange(len(a))
            ),
            "arcface": lambda: F.cross_entropy(
                16 * torch.cos(torch.acos(cosine.clamp(-0.999, 0.999)) + 0.3 * F.one_hot(y, 5)), y
            ),
            "proxy": lambda: F.cross_entropy(-torch.cdist(out, centres).square(), y),
            "centre": lambda: F.cross_entropy(out @ centres.T, y) + 0.1 * (out - centres[y]).square().sum(1).mean(),
            "circle": lambda: F.softplus(torch.logsumexp(8 * cosine[:, 0], 0) + torch.logsumexp(-8 * cosine[:, 1], 0)),
            "npair": lambda: F.cross_entropy(a @ b.T, torch.arange(len(a))),
            "clip": lambda: F.cross_entropy(
                scale.exp() * F.normalize(a, dim=1) @ F.normalize(c, dim=1).T, torch.arange(len(a))
            ),
            "prototype": lambda: F.cross_entropy(
                -(out[:, None] - torch.stack([out[i::3].mean(0) for i in range(3)])).square().sum(-1), y.clamp_max(2)
            ),
        }[how]()

    def forward(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return loss(net.body(x), net.scale, net.centres, y)

    model = Net(
        forward, body=mlp(8, 32, 8), scale=nn.Parameter(torch.tensor(2.0)), centres=nn.Parameter(torch.randn(5, 8))
    )
    return model, lambda: ((torch.randn(18, 8), torch.randint(0, 5, (18,))), ()), lambda out: out


@case("hand", "cdist", "mahalanobis", "rbf", "rank", scale=1.0)
def distances(how: str) -> Built:
    def forward(net: Net, x: Tensor, y: Tensor) -> Tensor:
        a, b = net.body(x - 100.0), net.body(y - 100.0)
        d = {
            "hand": lambda: ((x[:, None] - y).square().sum(-1) + 1e-6).sqrt() + a @ b.T,
            "cdist": lambda: torch.cdist(a, b),
            "mahalanobis": lambda: torch.einsum("abi,ij,abj->ab", x[:, None] - y, net.matrix, x[:, None] - y),
            "rbf": lambda: torch.exp(-(a[:, None] - b).square().sum(-1) / 8),
            "rank": lambda: F.margin_ranking_loss(a[:, 0], b[:, 0], torch.ones(12), margin=0.5)[None],
        }[how]()
        return d

    shape = (1,) if how == "rank" else (12, 12)
    return (
        Net(forward, body=mlp(8, 16, 8), matrix=nn.Parameter(torch.eye(8))),
        lambda: ((torch.randn(12, 8) + 100, torch.randn(12, 8) + 100), (torch.rand(shape) * 4,)),
        mse,
    )
