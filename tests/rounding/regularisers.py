"""Regularisers: differences and norms of parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import SHRINK, Built, Domain, Net, mse

case = Domain("regularisers")


def _near(shape: tuple[int, ...]) -> tuple[nn.Parameter, Tensor]:
    start = torch.randn(shape)
    return nn.Parameter(start + 1e-3 * torch.randn(shape)), start


@case(
    "l2-sp",
    "ewc",
    "l1-sp",
    "scaled",
    "fused-lasso",
    "orthogonal",
    "hyper",
    "consensus",
    "curvature",
    row=SHRINK,
    scale=16.0,
)
def towards(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        out = net.head(F.relu(F.linear(x, net.p)))
        d = net.p - net.start
        extra = {
            "l2-sp": lambda: d.square().sum() * 1e3,
            "ewc": lambda: (net.fisher * d.square()).sum() * 1e3,
            "l1-sp": lambda: d.abs().sum() * 10,
            "scaled": lambda: (d * 100).square().sum(),
            "fused-lasso": lambda: (net.p[1:] - net.p[:-1]).square().sum(),
            "orthogonal": lambda: (net.p @ net.p.T - torch.eye(16)).square().sum() * 0.01,
            "hyper": lambda: ((net.p - net.other) * 100).square().mean(),
            "consensus": lambda: ((net.p - (net.p + net.other) / 2) * 100).square().mean(),
            "curvature": lambda: (net.p[2:] - 2 * net.p[1:-1] + net.p[:-2]).square().sum(),
        }[how]()
        return out, extra

    def loss(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.mse_loss(out[0], y) + out[1]

    p, start = _near((16, 8))
    model = Net(
        forward,
        p=p,
        start=start,
        other=nn.Parameter(start + 1e-3 * torch.randn(16, 8)),
        fisher=torch.rand(16, 8),
        head=nn.Linear(16, 4),
    )
    return model, lambda: ((torch.randn(16, 8),), (torch.randn(16, 4),)), loss


@case("rows", "embedding", "positions", "biases", row=SHRINK, scale=16.0)
def differences(how: str) -> Built:
    def forward(net: Net, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = net.table(ids)
        out = net.head(rows)
        extra = {
            "rows": lambda: ((rows - net.start[ids]) * 100).square().mean(),
            "embedding": lambda: ((net.table.weight - net.start) * 100).square().mean(),
            "positions": lambda: ((rows[1:] - rows[:-1]) * 30).square().mean(),
            "biases": lambda: ((net.head.bias - net.other.bias) * 100).square().mean(),
        }[how]()
        return out, extra

    def loss(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.mse_loss(out[0], y) + out[1]

    table = nn.Embedding(20, 8)
    start = table.weight.detach() + 1e-3 * torch.randn(20, 8)
    return (
        Net(forward, table=table, start=start, head=nn.Linear(8, 4), other=nn.Linear(8, 4)),
        lambda: ((torch.randint(0, 20, (24,)),), (torch.randn(24, 4),)),
        loss,
    )


@case("weight-decay", "entropy", "sparsity", "jacobian", "group-lasso", "nuclear", "contractive", scale=128.0)
def penalties(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.sigmoid(net.first(x))
        w = net.first.weight
        extra = {
            "weight-decay": lambda: sum(p.square().sum() for p in net.parameters()) * 1e-2,
            "entropy": lambda: -(h * torch.log(h + 1e-8)).mean(),
            "sparsity": lambda: (0.05 * torch.log(0.05 / h.mean(0)) + 0.95 * torch.log(0.95 / (1 - h.mean(0)))).sum(),
            "jacobian": lambda: ((net.last(torch.sigmoid(net.first(x + 1e-2))) - net.last(h)) * 100).square().mean(),
            "group-lasso": lambda: w.norm(dim=1).sum(),
            "nuclear": lambda: torch.linalg.matrix_norm(w, "nuc"),
            "contractive": lambda: ((h * (1 - h)).square() @ w.square().sum(1)).mean(),
        }[how]()
        return net.last(h), 0.1 * extra

    def loss(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.mse_loss(out[0], y) + out[1]

    return (
        Net(forward, first=nn.Linear(8, 16), last=nn.Linear(16, 4)),
        lambda: ((torch.randn(16, 8),), (torch.randn(16, 4),)),
        loss,
    )


@case("scaled", "interpolated", "centred", "rows", "task-vector", row=SHRINK, scale=16.0)
def read_by_a_product(how: str) -> Built:
    def forward(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        weight = {
            "scaled": lambda: (net.p - net.start) * 100,
            "interpolated": lambda: (net.other + 0.5 * (net.p - net.other) - net.start) * 100,
            "centred": lambda: (net.p - net.p.mean(0)) * 100 - 40.0 * net.start,
            "rows": lambda: (net.table(ids) - net.rows[ids]) * 100,
            "task-vector": lambda: (net.p - net.start) * 50 + (net.other - net.start) * 50,
        }[how]()
        return net.head(torch.tanh(F.linear(x, weight)))

    p, start = _near((16, 8))
    rows = nn.Embedding(20, 8)
    model = Net(
        forward,
        p=p,
        start=start,
        other=nn.Parameter(start + 1e-3 * torch.randn(16, 8)),
        table=rows,
        rows=rows.weight.detach() + 1e-3 * torch.randn(20, 8),
        head=nn.Linear(16, 4),
    )
    return model, lambda: ((torch.randn(24, 8), torch.randint(0, 20, (16,))), (torch.randn(24, 4),)), mse
