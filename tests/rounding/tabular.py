"""Tables: raw features of any size, standardised inside, embedded columns, trees of gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import IDS, LARGE, RAW, Built, Domain, Net, cross_entropy, mlp, mse

case = Domain("tabular")


def _table(shift: float = 0.0, scale: float = 1.0, wide: int = 16, out: int = 4) -> tuple[tuple[Tensor], tuple[Tensor]]:
    return (torch.randn(24, wide) * scale + shift,), (torch.randn(24, out),)


def _standardised(how: str, x: Tensor) -> Tensor:
    if how == "by-hand":
        return (x - 1000.0) / 2.0
    if how == "per-row":
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return (x - x.mean(0)) * torch.rsqrt(x.var(0) + 1e-5)


@case("layer", "batch", "rms", "group", "instance", row=RAW)
def raw_norm(how: str) -> Built:
    norm = {
        "layer": nn.LayerNorm(16),
        "batch": nn.BatchNorm1d(16),
        "rms": nn.RMSNorm(16),
        "group": nn.GroupNorm(4, 16),
        "instance": nn.InstanceNorm1d(4),
    }[how]

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.norm(x.unflatten(1, (4, 4))).flatten(1) if how == "instance" else net.norm(x)
        return net.body(x)

    shift = 0.0 if how == "rms" else 1000.0
    return Net(forward, norm=norm, body=mlp(16, 32, 4)), lambda: _table(shift), mse


@case("by-hand", "per-row", "per-column", row=RAW)
def standardised(how: str) -> Built:
    model = Net(lambda net, x: net.body(_standardised(how, x)), body=mlp(16, 32, 4))
    return model, lambda: _table(1000.0), mse


@case(row=RAW)
def standardised_by_buffers() -> Built:
    mean, std = torch.full((16,), 1000.0), torch.full((16,), 1.5)
    model = Net(lambda net, x: net.body((x - net.mean) / net.std), mean=mean, std=std, body=mlp(16, 32, 4))
    return model, lambda: _table(1000.0), mse


@case("min-max", "quantile-like", "log", "signed-log", row=RAW)
def scaled_features(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        if how == "min-max":
            x = (x - x.amin(0)) / (x.amax(0) - x.amin(0))
        elif how == "quantile-like":
            x = torch.sigmoid(x - x.median(0).values)
        elif how == "log":
            x = torch.log1p(x.clamp_min(0)) - 6.9
        else:
            x = x.sign() * torch.log1p(x.abs()) - 6.9
        return net.body(x)

    return Net(forward, body=mlp(16, 32, 4)), lambda: _table(1000.0, 3.0), mse


@case("layer", "divided", "batch", "max-scaled", row=LARGE)
def large(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = {
            "layer": lambda: net.layer(x),
            "divided": lambda: x / 1e5,
            "batch": lambda: net.batch(x),
            "max-scaled": lambda: x / x.abs().amax(1, keepdim=True),
        }[how]()
        return net.body(x)

    model = Net(forward, layer=nn.LayerNorm(16), batch=nn.BatchNorm1d(16), body=mlp(16, 32, 4))
    return model, lambda: _table(2e5, 1e5), mse


@case(row=LARGE)
def large_differences() -> Built:
    model = Net(lambda net, x, y: net.body((x - y) / 1e3), body=mlp(16, 32, 4))
    return (
        model,
        lambda: (((a := torch.randn(24, 16) * 1e5), a + torch.randn(24, 16) * 1e3), (torch.randn(24, 4),)),
        mse,
    )


@case("scaled", "shifted", "both", row=IDS)
def ids_as_numbers(how: str) -> Built:
    def forward(net: Net, ids: Tensor) -> Tensor:
        x = ids * net.scale if how != "shifted" else ids - net.shift
        x = x - net.shift * net.scale if how == "both" else x
        return net.body(x)

    shift = 0.0 if how == "scaled" else 2000.0
    model = Net(
        forward,
        scale=nn.Parameter(torch.full((8,), 1e-3)),
        shift=nn.Parameter(torch.full((8,), shift)),
        body=mlp(8, 32, 4),
    )
    low = 0 if how == "scaled" else 1990
    return model, lambda: ((torch.randint(low, 2010, (24, 8)),), (torch.randn(24, 4),)), mse


@case(row=IDS)
def ids_difference() -> Built:
    model = Net(
        lambda net, a, b: net.body((a * net.scale - b * net.scale) * 10),
        scale=nn.Parameter(torch.full((8,), 0.01)),
        body=mlp(8, 32, 4),
    )
    ids = lambda: torch.randint(1000, 1040, (24, 8))  # noqa: E731
    return model, lambda: ((ids(), ids()), (torch.randn(24, 4),)), mse


@case()
def year_and_month() -> Built:
    def forward(net: Net, year: Tensor, x: Tensor) -> Tensor:
        return net.body(torch.cat([(year.float() - 2000.0) / 25.0, x], 1))

    model = Net(forward, body=mlp(9, 32, 4))
    return model, lambda: ((torch.randint(1990, 2025, (24, 1)), torch.randn(24, 8)), (torch.randn(24, 4),)), mse


@case()
def embedded_columns() -> Built:
    def forward(net: Net, ids: Tensor, x: Tensor) -> Tensor:
        seen = [table(ids[:, i]) for i, table in enumerate(net.tables)]
        return net.body(torch.cat([*seen, net.norm(x)], 1))

    model = Net(
        forward,
        tables=nn.ModuleList(nn.Embedding(10, 4) for _ in range(4)),
        norm=nn.BatchNorm1d(6),
        body=mlp(22, 32, 3),
    )
    return (
        model,
        lambda: ((torch.randint(0, 10, (24, 4)), torch.randn(24, 6) * 50), (torch.randint(0, 3, (24,)),)),
        cross_entropy,
    )


@case(2, 3)
def wide_and_deep(depth: int) -> Built:
    model = Net(lambda net, x: net.wide(x) + net.deep(x), wide=nn.Linear(16, 4), deep=mlp(16, *[24] * depth, 4))
    return model, _table, mse


@case(2, 3)
def cross_network(depth: int) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = x
        for layer in net.layers:
            y = x * layer(y) + y
        return net.head(y)

    model = Net(forward, layers=nn.ModuleList(nn.Linear(16, 16) for _ in range(depth)), head=nn.Linear(16, 4))
    return model, _table, mse


@case()
def resnet_table() -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.first(x)
        for block in net.blocks:
            x = x + block(x)
        return net.head(x)

    blocks = nn.ModuleList(
        nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24)) for _ in range(3)
    )
    return Net(forward, first=nn.Linear(16, 24), blocks=blocks, head=nn.Linear(24, 4)), _table, mse


@case()
def feature_tokens() -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        tokens = x[..., None] * net.weight + net.bias
        tokens = torch.cat([net.cls.expand(len(x), 1, -1), tokens], 1)
        return net.head(net.layer(tokens)[:, 0])

    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = Net(
        forward,
        weight=nn.Parameter(torch.randn(8, 16) / 4),
        bias=nn.Parameter(torch.randn(8, 16) / 4),
        cls=nn.Parameter(torch.randn(1, 1, 16)),
        layer=layer,
        head=nn.Linear(16, 4),
    )
    return model, lambda: _table(wide=8), mse


@case(4, 8)
def periodic_features(many: int) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        angle = 6.2831853 * net.coefficients * x[..., None]
        return net.body(torch.cat([angle.sin(), angle.cos()], -1).flatten(1))

    model = Net(forward, coefficients=nn.Parameter(torch.randn(8, many)), body=mlp(16 * many, 32, 4))
    return model, lambda: _table(wide=8), mse


@case()
def piecewise_linear_features() -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        places = (x[..., None] - net.edges[:-1]) / (net.edges[1:] - net.edges[:-1])
        return net.body(places.clamp(0, 1).flatten(1))

    model = Net(forward, edges=torch.linspace(900, 1100, 9), body=mlp(64, 32, 4))
    return model, lambda: _table(1000.0, 50.0, wide=8), mse


@case(2, 4)
def soft_tree(depth: int) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        gates, paths = torch.sigmoid(net.gates(x)), torch.ones(len(x), 1)
        for level in range(depth):
            g = gates[:, 2**level - 1 : 2 ** (level + 1) - 1]
            paths = torch.stack([paths * g, paths * (1 - g)], -1).flatten(1)
        return paths @ net.leaves

    model = Net(forward, gates=nn.Linear(16, 2**depth - 1), leaves=nn.Parameter(torch.randn(2**depth, 4)))
    return model, _table, mse


@case("softplus", "exp")
def poisson(how: str) -> Built:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.poisson_nll_loss(out, y, log_input=how == "exp")

    model = Net(lambda net, x: net.body(x) if how == "exp" else F.softplus(net.body(x)), body=mlp(16, 32, 4))
    return model, lambda: ((torch.randn(24, 16),), (torch.randint(0, 20, (24, 4)).float(),)), loss


@case("smooth_l1", "huber", "l1", "quantile", "mape")
def raw_targets(how: str) -> Built:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        if how == "quantile":
            d = y - out
            return torch.maximum(0.9 * d, -0.1 * d).mean()
        if how == "mape":
            return ((out - y).abs() / y.abs()).mean()
        return {"smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss, "l1": F.l1_loss}[how](out, y)

    model = Net(
        lambda net, x: net.body(x) * 10.0 + net.base, base=nn.Parameter(torch.full((4,), 500.0)), body=mlp(16, 32, 4)
    )
    return model, lambda: ((torch.randn(24, 16),), (torch.randn(24, 4) * 10 + 500,)), loss


@case()
def survival_cox() -> Built:
    def loss(risk: Tensor, event: Tensor) -> Tensor:
        return -((risk.flatten() - torch.logcumsumexp(risk.flatten(), 0)) * event).mean()

    return mlp(16, 32, 1), lambda: ((torch.randn(24, 16),), (torch.randint(0, 2, (24,)).float(),)), loss


@case()
def factorised_additive() -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        return torch.stack([part(x[:, i : i + 1]) for i, part in enumerate(net.parts)]).sum(0)

    return Net(forward, parts=nn.ModuleList(mlp(1, 16, 4) for _ in range(6))), lambda: _table(wide=6), mse


@case()
def missing_values() -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        gone = x.isnan()
        return net.body(torch.cat([torch.where(gone, net.fill, x), gone.float()], 1))

    model = Net(forward, fill=nn.Parameter(torch.zeros(16)), body=mlp(32, 32, 4))
    batch = lambda: ((torch.where(torch.rand(24, 16) < 0.2, torch.nan, torch.randn(24, 16)),), (torch.randn(24, 4),))  # noqa: E731
    return model, batch, mse


@case("layer", "rms", scale=4.0)
def norm_of_many_rows(how: str) -> Built:
    """The gradients of a norm's weight and bias are sums over thousands of rows."""
    norm = {"layer": nn.LayerNorm(16), "rms": nn.RMSNorm(16)}[how]
    model = Net(
        lambda net, ids: net.head(net.norm(net.body(net.words(ids)))),
        words=nn.Embedding(40, 16),
        body=nn.Linear(16, 16),
        norm=norm,
        head=nn.Linear(16, 4),
    )

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y, reduction="sum") / 10

    return model, lambda: ((torch.randint(0, 40, (4000,)),), (torch.randn(4000, 4) * 0.3 + 0.5,)), loss
