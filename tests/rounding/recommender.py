"""Recommenders."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import TABLE, Built, Domain, Net, mlp, mse

case = Domain("recommender")


@case("mf", "biased", "ncf", "fm", "dlrm", "two-tower", "sasrec", "bpr", "autoencoder", scale=1.0)
def models(how: str) -> Built:
    def forward(net: Net, user: Tensor, item: Tensor, x: Tensor) -> Tensor:
        u, v = net.users(user), net.items(item)
        if how == "mf":
            return net.out(u * v).squeeze(1)
        if how == "biased":
            return net.out(u * v).squeeze(1) + net.user_bias[user] + net.item_bias[item] + net.mean
        if how == "ncf":
            return net.deep(torch.cat([u, v], 1)).squeeze(1)
        if how == "fm":
            both = torch.stack([u, v, net.dense(x)], 1)
            return 0.5 * (both.sum(1).square() - both.square().sum(1)).sum(1)
        if how == "dlrm":
            both = torch.stack([u, v, net.dense(torch.log1p(x.abs() * 1e4))], 1)
            return net.top(torch.cat([(both @ both.transpose(1, 2)).flatten(1), both[:, 2]], 1)).squeeze(1)
        if how == "two-tower":
            return (F.normalize(net.dense(u), dim=1) * F.normalize(net.dense(v), dim=1)).sum(1) * 5
        if how == "sasrec":
            seen = net.items(item.view(8, 8)) + net.place[:8]
            return net.out(net.layer(seen)).flatten()
        if how == "bpr":
            return F.logsigmoid((net.dense(u) * (v - net.items(item.flip(0)))).sum(1))
        return net.deep(torch.cat([x, u], 1)).squeeze(1)

    model = Net(
        forward,
        users=nn.Embedding(30, 8),
        items=nn.Embedding(40, 8),
        user_bias=nn.Parameter(torch.randn(30) * 0.1),
        item_bias=nn.Parameter(torch.randn(40) * 0.1),
        mean=nn.Parameter(torch.tensor(3.5)),
        deep=mlp(16, 32, 1),
        dense=nn.Linear(8, 8),
        top=mlp(17, 32, 1),
        out=nn.Linear(8, 1),
        place=nn.Parameter(torch.randn(8, 8) * 0.1),
        layer=nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    )
    return (
        model,
        lambda: (
            (torch.randint(0, 30, (64,)), torch.randint(0, 40, (64,)), torch.randn(64, 8)),
            (torch.randint(1, 6, (64,)).float(),),
        ),
        mse,
    )


@case("user", "popular", "hashed", row=TABLE, scale=8.0)
def repeated_rows(how: str) -> Built:
    def forward(net: Net, ids: Tensor, x: Tensor) -> Tensor:
        rows = {
            "user": lambda: net.table[ids],
            "popular": lambda: net.table[ids] + net.bias[ids, None],
            "hashed": lambda: net.table[ids % 3] + net.table[ids % 2],
        }[how]()
        return net.body(rows + net.dense(x))

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y, reduction="sum") / 50

    model = Net(
        forward,
        table=nn.Parameter(torch.randn(10, 8)),
        bias=nn.Parameter(torch.zeros(10)),
        dense=nn.Linear(4, 8),
        body=mlp(8, 16, 2),
    )
    return (
        model,
        lambda: (
            ((torch.randint(0, 100, (6000,)) ** 2 // 1500), torch.randn(6000, 4)),
            (torch.randn(6000, 2) * 0.3 + 0.5,),
        ),
        loss,
    )
