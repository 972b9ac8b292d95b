"""Graphs: message passing, molecules, links."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import HAND, Built, Domain, Net, cross_entropy, mlp, mse

case = Domain("graphs")


def _edges(nodes: int = 20, many: int = 80) -> Tensor:
    return torch.randint(0, nodes, (2, many))


@case("gcn", "sage", "gin", "gat", "gatv2", "edge", "mpnn", "pna", "transformer")
def convolution(how: str) -> Built:
    def forward(net: Net, x: Tensor, edges: Tensor) -> Tensor:
        a, b = edges
        degree = torch.zeros(len(x)).index_add(0, b, torch.ones(len(b))).clamp_min(1)
        for one, two in zip(net.one, net.two, strict=True):
            h = one(x)
            if how == "gcn":
                h = h[a] * (degree[a] * degree[b]).rsqrt()[:, None]
            elif how in ("gat", "gatv2", "transformer"):
                raw = {
                    "gat": lambda h=h: F.leaky_relu(net.att(h)[a, 0] + net.att(h)[b, 1], 0.2),
                    "gatv2": lambda h=h: net.att(F.leaky_relu(h[a] + h[b], 0.2))[:, 0],
                    "transformer": lambda h=h, x=x: (net.query(x)[b] * h[a]).sum(1) / 4,
                }[how]()
                weight = torch.exp(raw - raw.max())
                h = h[a] * (weight / torch.zeros(len(x)).index_add(0, b, weight).clamp_min(1e-6)[b])[:, None]
            elif how in ("edge", "mpnn"):
                h = torch.relu(one(x[a] - x[b]) if how == "edge" else one(x[a]) * torch.sigmoid(two(x[b])))
            else:
                h = h[a]
            gathered = torch.zeros(len(x), 16).index_add(0, b, h.float())
            if how == "pna":
                gathered = gathered / degree[:, None] + torch.zeros(len(x), 16).scatter_reduce(
                    0, b[:, None].expand(-1, 16), h.float(), "amax"
                )
            elif how == "sage":
                gathered = gathered / degree[:, None]
            x = F.relu(gathered + two(x))
        return net.head(x)

    model = Net(
        forward,
        one=nn.ModuleList(nn.Linear(16, 16) for _ in range(2)),
        two=nn.ModuleList(nn.Linear(16, 16) for _ in range(2)),
        att=nn.Linear(16, 2),
        query=nn.Linear(16, 16),
        head=nn.Linear(16, 3),
    )
    return model, lambda: ((torch.randn(20, 16), _edges()), (torch.randint(0, 3, (20,)),)), cross_entropy


@case("schnet", "egnn", "dime", "painn", "forces", row=HAND, scale=0.0625)
def molecule(how: str) -> Built:
    def forward(net: Net, kind: Tensor, place: Tensor, edges: Tensor) -> Tensor:
        a, b = edges
        h = net.kinds(kind)
        gap = place[a] - place[b]
        distance = (gap.square().sum(1, keepdim=True) + 1e-6).sqrt()
        if how == "egnn":
            m = net.edge(torch.cat([h[a], h[b], distance.square() / 10], 1))
            place = place + torch.zeros_like(place).index_add(0, b, gap * net.push(m).float() * 0.1)
            return place
        smeared = torch.exp(-((distance - net.centres) ** 2) * 2.0)
        if how == "dime":
            smeared = torch.sin(net.centres * distance * 0.6) / distance
        m = h[a] * net.filter(smeared)
        if how == "painn":
            vector = torch.zeros(len(kind), 3, 16).index_add(0, b, (m[:, None] * (gap / distance)[:, :, None]).float())
            return net.out(vector.square().sum(1)).sum()[None]
        h = h + net.body(torch.zeros(len(kind), 16).index_add(0, b, m.float()))
        energy = net.out(h).sum()
        return energy[None] if how == "schnet" else torch.cat([energy[None] / 10, (net.out(h) * place).sum(0)])

    def batch() -> tuple[tuple[Tensor, ...], tuple[Tensor]]:
        place = torch.rand(12, 3) * 4 + 60
        target = {"egnn": (12, 3), "forces": (4,)}.get(how, (1,))
        a = torch.arange(12).repeat(5)
        b = (a + torch.arange(1, 6).repeat_interleave(12)) % 12
        return (torch.randint(0, 5, (12,)), place, torch.stack([a, b])), (
            torch.randn(target) + (60 if how == "egnn" else 0),
        )

    model = Net(
        forward,
        kinds=nn.Embedding(5, 16),
        centres=torch.linspace(0, 6, 20),
        filter=mlp(20, 16, 16, act=nn.Softplus),
        edge=mlp(33, 16, 16, act=nn.SiLU),
        push=nn.Linear(16, 1),
        body=mlp(16, 16, 16, act=nn.SiLU),
        out=nn.Linear(16, 1),
    )
    return model, batch, mse


@case("sum", "mean", "attention", "set2set", scale=1.0)
def readout(how: str) -> Built:
    def forward(net: Net, x: Tensor, graph: Tensor) -> Tensor:
        h = F.relu(net.body(x))
        many = torch.zeros(4).index_add(0, graph, torch.ones(len(graph)))
        if how == "attention":
            weight = torch.exp(net.score(h))
            h = h * weight / torch.zeros(4, 1).index_add(0, graph, weight.float())[graph]
        pooled = torch.zeros(4, 16).index_add(0, graph, h.float())
        return net.head(pooled / many[:, None] if how in ("mean", "set2set") else pooled)

    model = Net(forward, body=nn.Linear(8, 16), score=nn.Linear(16, 1), head=nn.Linear(16, 2))
    return model, lambda: ((torch.randn(200, 8), torch.arange(200) % 4), (torch.randn(4, 2) * 10,)), mse


@case("dot", "bilinear", "transe", "rotate", "distmult", scale=64.0)
def links(how: str) -> Built:
    def forward(net: Net, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        x, y, w = net.body(net.nodes(a)), net.body(net.nodes(b)), net.relations(r)
        return {
            "dot": lambda: (x * y).sum(1),
            "bilinear": lambda: (torch.einsum("bi,ij->bj", x, net.matrix) * y).sum(1),
            "transe": lambda: -(x + w - y).norm(dim=1),
            "distmult": lambda: (x * w * y).sum(1),
            "rotate": lambda: -((x[:, :8] * w[:, :8].cos() - x[:, 8:] * w[:, 8:].sin() - y[:, :8]) ** 2).sum(1),
        }[how]()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out, y)

    model = Net(
        forward,
        nodes=nn.Embedding(30, 16),
        relations=nn.Embedding(4, 16),
        matrix=nn.Parameter(torch.randn(16, 16) / 4),
        body=nn.Linear(16, 16),
    )
    draw = lambda n: torch.randint(0, n, (64,))  # noqa: E731
    return model, lambda: ((draw(30), draw(4), draw(30)), ((torch.rand(64) < 0.5).float(),)), loss
