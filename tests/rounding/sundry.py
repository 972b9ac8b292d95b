"""Kinds of arithmetic that belong to no one field: recursions in log space, warps, schedules, counts, encodings of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounding.registry import STATE, SUM, Built, Domain, Net, mlp, mse

case = Domain("sundry")


@case("vocoder", "unwrap", "group-delay", scale=64.0)
def stft_phase(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.last(torch.tanh(net.first(x))).squeeze(1)
        spectrum = torch.stft(y, 16, hop_length=8, window=torch.hann_window(16), return_complex=True)
        if how == "vocoder":
            size, phase = spectrum.abs(), torch.atan2(spectrum.imag, spectrum.real + 2.0)
            advance = phase[..., 1:] - phase[..., :-1] + torch.arange(9.0)[:, None] * 8
            return torch.cumsum(advance, -1) * 0.01 + size[..., 1:]
        if how == "unwrap":
            phase = torch.angle(spectrum[:, 1:] + 3.0) + 2 * math.pi * torch.arange(spectrum.shape[-1])
            return phase[..., 1:] - phase[..., :-1] - 2 * math.pi
        return torch.log(spectrum.abs() + 1.0).diff(dim=1)

    model = Net(forward, first=nn.Conv1d(1, 8, 5, padding=2), last=nn.Conv1d(8, 1, 5, padding=2))
    return model, lambda: ((torch.randn(4, 1, 128),), ()), lambda out: out.square().mean()


@case("backward-warp", "cost-volume", "refined", scale=16.0)
def optical_flow(how: str) -> Built:
    def forward(net: Net, a: Tensor, b: Tensor) -> Tensor:
        n, _, h, w = a.shape
        ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        base = torch.stack([xs, ys]).float()[None]
        seen_a, seen_b = F.relu(net.see(a)), F.relu(net.see(b))
        flow = net.flow(torch.cat([seen_a, seen_b], 1))
        for _ in range(2 if how == "refined" else 1):
            place = base + flow
            scaled = torch.stack([2 * place[:, 0] / (w - 1) - 1, 2 * place[:, 1] / (h - 1) - 1], -1)
            warped = F.grid_sample(seen_b, scaled, align_corners=True)
            flow = flow + 0.1 * net.flow(torch.cat([seen_a, warped], 1)) if how == "refined" else flow
        return (seen_a * warped).mean(1, keepdim=True) if how == "cost-volume" else flow.expand(n, -1, -1, -1)

    model = Net(forward, see=nn.Conv2d(3, 8, 3, padding=1), flow=nn.Conv2d(16, 2, 3, padding=1))
    image = lambda: F.interpolate(torch.rand(2, 3, 6, 6), (24, 24), mode="bilinear")  # noqa: E731
    return model, lambda: ((image(), image()), (torch.randn(2, 1, 24, 24),)), lambda out, y: (out - y).square().mean()


@case("gains", "innovation", "information", row=STATE, scale=64.0)
def kalman(how: str) -> Built:
    """Covariances and states of a filter whose measurements a network makes."""

    def forward(net: Net, z: Tensor) -> Tensor:
        seen = net.into(z)
        x, p, found = torch.zeros(4, 8), torch.ones(4, 8) * 100, []
        noise = F.softplus(net.noise(z).mean(1)) + 0.1
        for t in range(z.shape[1]):
            p = p + 0.01
            gain = p / (p + noise)
            x = x + gain * (seen[:, t] - x)
            p = 1 / (1 / p + 1 / noise) if how == "information" else (1 - gain) * p
            found.append((seen[:, t] - x) if how == "innovation" else x)
        return net.out(torch.stack(found, 1))

    model = Net(forward, into=nn.Linear(3, 8), noise=nn.Linear(3, 8), out=nn.Linear(8, 1))
    return model, lambda: ((torch.randn(4, 12, 3),), (torch.randn(4, 12, 1),)), mse


@case("log", "plain", "unbalanced", scale=32.0)
def sinkhorn(how: str) -> Built:
    def forward(net: Net, a: Tensor, b: Tensor) -> Tensor:
        cost = torch.cdist(net.embed(a), net.embed(b)) if how == "plain" else 1 - net.embed(a) @ net.embed(b).mT
        f, g = torch.zeros(4, 10), torch.zeros(4, 12)
        for _ in range(6):
            if how == "plain":
                k = torch.exp(-cost)
                f = 1 / (k @ torch.exp(g)[..., None]).squeeze(-1)
                g = torch.log(1 / (k.mT @ f[..., None]).squeeze(-1))
                continue
            f = -0.1 * torch.logsumexp((g[:, None] - cost) / 0.1, 2)
            g = -0.1 * torch.logsumexp((f[:, :, None] - cost) / 0.1, 1) * (0.9 if how == "unbalanced" else 1.0)
        plan = f[..., None] * torch.exp(g)[:, None] * torch.exp(-cost) if how == "plain" else torch.exp(
            (f[..., None] + g[:, None] - cost) / 0.1
        )  # fmt: skip
        return (plan * cost).sum((1, 2))

    return (
        Net(forward, embed=mlp(4, 16, 8)),
        lambda: ((torch.randn(4, 10, 4), torch.randn(4, 12, 4)), ()),
        lambda o: o.mean(),
    )


@case("soft-dtw", "crf", "forward-algorithm", "edit-distance", scale=16.0)
def dynamic_program(how: str) -> Built:
    """Recursions in log space over scores that a network gives."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.scores(x)
        if how == "crf":
            alpha = y[:, 0]
            for t in range(1, y.shape[1]):
                alpha = torch.logsumexp(alpha[:, :, None] + net.trans[None] + y[:, t, None], 1)
            return torch.logsumexp(alpha, 1)
        if how == "forward-algorithm":
            alpha, total = torch.softmax(y[:, 0], 1), torch.zeros(x.shape[0])
            for t in range(1, y.shape[1]):
                alpha = (alpha @ torch.softmax(net.trans, 1)) * torch.exp(y[:, t])
                size = alpha.sum(1, keepdim=True)
                alpha, total = alpha / size, total + torch.log(size.squeeze(1))
            return total
        cost = (y[:, :, None] - y[:, None]).square().mean(-1) if how == "soft-dtw" else torch.sigmoid(y @ y.mT)
        row = torch.arange(float(y.shape[1]))[None].expand(x.shape[0], -1)
        for i in range(y.shape[1]):
            left = row[:, :-1] + cost[:, i, 1:]
            row = torch.cat([row[:, :1] + 1, -0.1 * torch.logaddexp(-left / 0.1, -(row[:, 1:] + 1) / 0.1)], 1)
        return row[:, -1]

    model = Net(forward, scores=mlp(4, 16, 6), trans=nn.Parameter(torch.randn(6, 6)))
    return model, lambda: ((torch.randn(4, 12, 4),), ()), lambda out: out.mean()


@case("nerf", "gaussian", "integrated", "siren", scale=64.0)
def encodings(how: str) -> Built:
    """Positions between hundreds of frequencies."""

    def forward(net: Net, x: Tensor) -> Tensor:
        if how == "siren":
            return net.out(torch.sin(30 * net.first(x)))
        doubled = (x[..., None] * 2.0 ** torch.arange(8)).flatten(1)
        angles = 2 * math.pi * x @ net.frequencies if how == "gaussian" else doubled
        fade = torch.exp(-0.001 * 4.0 ** torch.arange(8)).repeat(3) if how == "integrated" else 1.0
        return net.out(F.relu(net.hidden(torch.cat([torch.sin(angles) * fade, torch.cos(angles) * fade], 1))))

    parts = {"first": nn.Linear(3, 16), "out": nn.Linear(16, 4), "hidden": nn.Linear(48, 16)}
    model = Net(forward, frequencies=torch.randn(3, 24) * 10, **parts)
    if how == "siren":
        nn.init.uniform_(model.first.weight, -0.02, 0.02)
    return model, lambda: ((torch.rand(64, 3) * 10,), (torch.randn(64, 4),)), mse


@case("rays", "transmittance", "gates", "survival", scale=0.0625)
def products_over_an_axis(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.body(x)
        if how == "rays":
            alpha = 1 - torch.exp(-F.softplus(y) * 0.1)
            through = torch.cumprod(1 - alpha + 1e-10, 1)
            return (alpha * through * torch.arange(x.shape[1])[:, None]).sum(1)
        if how == "transmittance":
            return torch.exp(-torch.cumsum(F.softplus(y) * 0.05, 1))
        if how == "gates":
            return torch.cumprod(torch.sigmoid(y + 4), 1).sum(1)
        hazard = torch.sigmoid(y - 4)
        return torch.log(1 - torch.cumprod(1 - hazard, 1) + 1e-6).sum(1)

    return Net(forward, body=mlp(4, 16, 3)), lambda: ((torch.randn(8, 64, 4),), ()), lambda out: out.square().mean()


@case("by-hand", "streaming", "pairwise", "free-energy", scale=64.0)
def log_sums(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.body(x) * 8
        if how == "by-hand":
            top = y.max(1, keepdim=True).values
            return top.squeeze(1) + torch.log(torch.exp(y - top).sum(1))
        if how == "free-energy":
            return -F.softplus(y).sum(1) - x.sum(1)
        if how == "pairwise":
            return torch.log1p(torch.exp(-(y[:, :, None] - y[:, None]).abs())).sum((1, 2)) / 64
        top, total = torch.full((x.shape[0],), -1e4), torch.zeros(x.shape[0])
        for i in range(y.shape[1]):
            new = torch.maximum(top, y[:, i])
            total = total * torch.exp(top - new) + torch.exp(y[:, i] - new)
            top = new
        return top + torch.log(total)

    return Net(forward, body=mlp(4, 16, 8)), lambda: ((torch.randn(32, 4),), ()), lambda out: out.square().mean()


@case("average", "debiased", "centre", "prototypes", row=STATE, scale=0.001)
def averages_inside(how: str) -> Built:
    """Exponential averages that the forward reads, and keeps in a buffer."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.body(x)
        with torch.no_grad():
            net.kept.mul_(0.999).add_(y.float().mean(0), alpha=0.001)
        if how == "average":
            return net.out(y - net.kept)
        if how == "debiased":
            return net.out(y / (net.kept.abs().sqrt() + 1)) + net.kept.sum() / (1 - 0.999**3)
        if how == "centre":
            return torch.log_softmax((y - net.kept) / 0.1, 1)
        return -(y - net.kept).square().sum(1)

    model = Net(forward, body=mlp(4, 16, 8), out=nn.Linear(8, 8), kept=torch.rand(8) * 10)
    return model, lambda: ((torch.randn(16, 4),), ()), lambda out: out.square().mean()


@case("cosine", "warmup", "sigmas", "alphas", scale=64.0)
def schedules(how: str) -> Built:
    """Factors that are computed from the number of a step."""

    def forward(net: Net, x: Tensor, step: Tensor) -> Tensor:
        t = step.float() / 10_000
        if how == "cosine":
            return net.body(x) * (0.5 * (1 + torch.cos(math.pi * t)))[:, None]
        if how == "warmup":
            return net.body(x) * torch.clamp(step / 4000.0, max=1.0)[:, None] * (step + 1.0).rsqrt()[:, None] * 100
        if how == "sigmas":
            sigma = (0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
            scale = (sigma.square() + 0.25).rsqrt()[:, None]
            return 0.25 * scale.square() * x + sigma[:, None] * 0.5 * scale * net.body(scale * x)
        alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 10_000), 0)[step][:, None]
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * net.body(x)
        return (noisy - (1 - alpha).sqrt() * net.body(noisy)) / alpha.clamp(min=1e-3).sqrt()

    return (
        Net(forward, body=mlp(4, 16, 4)),
        lambda: ((torch.randn(16, 4), torch.randint(0, 10_000 if how != "alphas" else 900, (16,))), ()),
        lambda out: out.square().mean(),
    )


@case("pinball", "crps", "expectile", "winkler", scale=64.0)
def quantile_losses(how: str) -> Built:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        levels = torch.linspace(0.1, 0.9, 9)
        if how == "crps":
            off = out - y[:, None]
            return off.abs().mean() - 0.5 * (out[:, :, None] - out[:, None]).abs().mean()
        off = y[:, None] - out
        if how == "expectile":
            return (torch.where(off > 0, levels, 1 - levels) * off.square()).mean()
        if how == "winkler":
            lower, upper = out[:, 0], out[:, 0] + F.softplus(out[:, 1])
            return (upper - lower + 20 * F.relu(lower - y) + 20 * F.relu(y - upper)).mean()
        return torch.maximum(levels * off, (levels - 1) * off).mean()

    net = mlp(4, 16, 9, act=nn.GELU)
    return (
        Net(lambda m, x: m.body(x) + 100, body=net),
        lambda: ((torch.randn(256, 4),), (100 + torch.randn(256),)),
        loss,
    )


@case("computed", "long", "two-dimensional", "scaled", scale=256.0)
def rotary(how: str) -> Built:
    """Angles that the forward computes from positions."""

    def forward(net: Net, x: Tensor) -> Tensor:
        s, w = x.shape[1:]
        q, k, v = net.qkv(x).chunk(3, -1)
        start = 4000 if how == "long" else 0
        place = torch.arange(start, start + s).float()
        rates = 1.0 / (10_000 ** (torch.arange(0, w, 2).float() / w))
        if how == "scaled":
            rates = rates * torch.where(rates < 0.01, 0.125, 1.0)
        angles = place[:, None] * rates[None]
        if how == "two-dimensional":
            angles = torch.cat([(place // 4)[:, None] * rates[::2], (place % 4)[:, None] * rates[::2]], 1)
        cos, sin = angles.cos(), angles.sin()

        def turn(t: Tensor) -> Tensor:
            a, b = t[..., ::2], t[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

        return net.out(F.scaled_dot_product_attention(turn(q), turn(k), v)) + x

    model = Net(forward, qkv=nn.Linear(16, 48), out=nn.Linear(16, 16))
    return model, lambda: ((torch.randn(4, 24, 16),), (torch.randn(4, 24, 16),)), mse


@case("window", "cumulative", "momentum", row=STATE, scale=0.0625)
def moving_averages(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        if how == "window":
            trend = F.avg_pool1d(x.mT, 5, 1, 2).mT
            return net.body((x - trend) * 10) + trend
        if how == "cumulative":
            counts = torch.arange(1, x.shape[1] + 1)[:, None]
            mean = x.cumsum(1) / counts
            return net.body((x - mean) * 10) + mean
        level, found = x[:, 0], []
        for t in range(x.shape[1]):
            level = 0.95 * level + 0.05 * (x[:, t] + 0.01 * net.body(x[:, t] - level))
            found.append(x[:, t] - level)
        return torch.stack(found, 1)

    return Net(forward, body=mlp(3, 16, 3)), lambda: ((100 + torch.randn(4, 20, 3),), (torch.randn(4, 20, 3),)), mse


def _penalised(how: str) -> Callable[[Net, Tensor], Tensor]:
    def forward(net: Net, x: Tensor) -> Tensor:
        w1, b1, w2 = net.first.weight, net.first.bias, net.second.weight
        hidden = torch.tanh(F.linear(x, w1, b1))
        slope = ((1 - hidden.square()) * w2) @ w1
        if how == "one-lipschitz":
            return (slope.norm(dim=1) - 1).square()
        if how == "score":
            curve = ((-2 * hidden * (1 - hidden.square()) * w2) * w1.square().sum(1)).sum(1)
            return curve + 0.5 * slope.square().sum(1)
        return slope.square().sum(1) + F.linear(hidden, w2).squeeze(1) * 0.1

    return forward


@case("one-lipschitz", "score", "r1", scale=64.0)
def gradient_penalties(how: str) -> Built:
    """Slopes of a network in its input, written out."""
    model = Net(_penalised(how), first=nn.Linear(4, 16), second=nn.Linear(16, 1))
    return model, lambda: ((torch.randn(32, 4),), ()), lambda out: out.mean()


@case("learned", "sigmoid", "hard-negatives", "queue", scale=16.0)
def contrastive(how: str) -> Built:
    def forward(net: Net, a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(net.left(a), dim=1), F.normalize(net.right(b), dim=1)
        scores = a @ b.T * net.temperature.exp()
        if how == "sigmoid":
            return F.logsigmoid((scores - 10) * (2 * torch.eye(len(a)) - 1)).sum(1)
        if how == "hard-negatives":
            rest = scores - 1e4 * torch.eye(len(a))
            weight = torch.softmax(rest.detach(), 1)
            return scores.diagonal() - torch.log(scores.diagonal().exp() + (weight * rest.exp()).sum(1))
        if how == "queue":
            scores = torch.cat([scores, a @ F.normalize(net.kept, dim=0) / 0.07], 1)
        return torch.log_softmax(scores, 1).diagonal()

    model = Net(
        forward,
        left=mlp(4, 16, 8),
        right=mlp(4, 16, 8),
        kept=torch.randn(8, 64),
        temperature=nn.Parameter(torch.tensor(math.log(14.0))),
    )
    return model, lambda: ((torch.randn(16, 4), torch.randn(16, 4)), ()), lambda out: -out.mean()


@case("masked-mean", "one-hot", "bincount", "histogram", "frequencies", scale=64.0)
def counts(how: str) -> Built:
    """Sums of hundreds of ones, by which something is divided or weighed."""

    def forward(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        y = net.body(x)
        if how == "masked-mean":
            mask = (ids > 0).float()[..., None]
            return (y * mask).sum(1) / mask.sum(1)
        if how == "one-hot":
            hot = F.one_hot(ids, 6).float()
            return torch.einsum("bsk,bsd->bkd", hot, y) / hot.sum(1)[..., None].clamp(min=1)
        if how == "bincount":
            many = torch.zeros(6).scatter_add_(0, ids.flatten(), torch.ones(ids.numel()))
            return y * (many[ids] / many.sum()).rsqrt()[..., None]
        if how == "frequencies":
            seen = torch.softmax(y, -1).sum((0, 1))
            return y - 0.1 * torch.log(seen / seen.sum())
        edges = torch.linspace(-2, 2, 8)
        soft = torch.sigmoid((y[..., None] - edges) * 10)
        return (soft[..., :-1] - soft[..., 1:]).sum(1) / y.shape[1]

    model = Net(forward, body=mlp(4, 16, 6, act=nn.Tanh))
    return model, lambda: ((torch.randn(2, 600, 4), torch.randint(0, 6, (2, 600))), ()), lambda out: out.square().mean()


@case("positions", "relative", "buckets", "ages", scale=64.0)
def integers_as_floats(how: str) -> Built:
    def forward(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        if how == "positions":
            return net.body(x) * (1 + ids.float()[..., None] / 1000)
        if how == "relative":
            apart = (ids[:, None] - ids[:, :, None]).float()
            y = net.body(x)
            return torch.softmax(y @ y.mT - 0.01 * apart.abs(), -1) @ y
        if how == "buckets":
            place = torch.log(ids.float() + 1) / math.log(4000) * 16
            return net.body(x) + net.table[place.long()] * (place - place.floor())[..., None]
        return net.body(torch.cat([x[..., :3], (ids.float() - 1987.0)[..., None]], -1))

    model = Net(forward, body=mlp(4, 16, 4, act=nn.Tanh), table=nn.Parameter(torch.randn(17, 4)))
    return model, lambda: ((torch.randn(4, 20, 4), torch.randint(1900, 2100, (4, 20))), ()), lambda o: o.square().mean()


@case("decay", "gaps", "encoded", "hawkes", scale=64.0)
def time_deltas(how: str) -> Built:
    def forward(net: Net, x: Tensor, t: Tensor) -> Tensor:
        gap = t[:, 1:] - t[:, :-1]
        y = net.body(x)
        if how == "gaps":
            return y[:, 1:] / gap[..., None]
        if how == "encoded":
            return net.body(
                torch.cat([torch.sin(gap[..., None] * 50), torch.cos(gap[..., None] * 50), x[:, 1:, :2]], -1)
            )
        if how == "hawkes":
            since = (t[:, :, None] - t[:, None]).clamp(min=0)
            return torch.exp(-since * F.softplus(net.rate)).tril(-1) @ F.softplus(y)
        state, found = torch.zeros_like(y[:, 0]), []
        for i in range(gap.shape[1]):
            state = state * torch.exp(-gap[:, i, None] * F.softplus(net.rate)) + y[:, i]
            found.append(state)
        return torch.stack(found, 1)

    model = Net(forward, body=mlp(4, 16, 4), rate=nn.Parameter(torch.zeros(())))

    def batch() -> tuple[tuple[Tensor, Tensor], tuple[()]]:
        return (torch.randn(4, 16, 4), 5000 + torch.rand(4, 16).cumsum(1) + 0.01), ()

    return model, batch, lambda out: out.square().mean()


@case("anchored", "relaxed", "laplacian", "velocity", row=SUM, scale=4.0)
def small_changes(how: str) -> Built:
    """What a network changes of its input, looked at under a glass."""

    def forward(net: Net, x: Tensor) -> Tensor:
        change = 0.01 * net.body(x)
        if how == "anchored":
            return x + change - x.mean(0)
        if how == "relaxed":
            return torch.lerp(x, x + change, 0.1)
        if how == "laplacian":
            y = x + change
            return (y[:, 2:] - 2 * y[:, 1:-1] + y[:, :-2]) * 100
        return ((x + change) - x) * 60

    model = Net(forward, body=mlp(8, 16, 8, act=nn.Tanh))
    return model, lambda: ((20 + torch.rand(32, 8),), ()), lambda out: out.square().mean()


@case("polynomial", "horner", "chebyshev", "spline", scale=64.0)
def series_of_powers(how: str) -> Built:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = torch.tanh(net.body(x))
        if how == "polynomial":
            return sum((c * y**i for i, c in enumerate(net.terms)), torch.zeros(()))
        if how == "horner":
            total = torch.zeros_like(y)
            for c in net.terms.flip(0):
                total = total * y + c
            return total
        if how == "chebyshev":
            a, b, total = torch.ones_like(y), y, net.terms[0] + net.terms[1] * y
            for c in net.terms[2:]:
                a, b = b, 2 * y * b - a
                total = total + c * b
            return total
        knots = torch.linspace(-1, 1, 6)
        return (F.relu(y[..., None] - knots) ** 3 * net.terms).sum(-1)

    model = Net(forward, body=mlp(4, 16, 4), terms=nn.Parameter(torch.randn(6)))
    return model, lambda: ((torch.randn(32, 4),), ()), lambda out: out.square().mean()
