"""Reinforcement learning: values, policies, raw observations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rounding.registry import Built, Domain, Net, mlp, mse

case = Domain("rl")


@case("dqn", "double", "dueling", "categorical", "sac", "td-lambda", scale=128.0)
def values(how: str) -> Built:
    def forward(net: Net, s: Tensor, s2: Tensor, r: Tensor) -> Tensor:
        q = net.q(s)
        if how == "dueling":
            q = net.v(s) + q - q.mean(1, keepdim=True)
        if how == "categorical":
            return q.log_softmax(1)
        with torch.no_grad():
            after = net.target(s2)
            best = (
                after.gather(1, net.q(s2).argmax(1, keepdim=True)) if how == "double" else after.amax(1, keepdim=True)
            )
        if how == "sac":
            p = q.softmax(1)
            return (p * (0.2 * torch.log(p + 1e-8) - after)).sum(1, keepdim=True)
        if how == "td-lambda":
            total, seen = best[-1], []
            for t in reversed(range(len(r))):
                total = r[t] + 0.99 * (0.05 * best[t] + 0.95 * total)
                seen.append(total)
            return q[:, :1] - torch.stack(seen[::-1])
        return q[:, :1] - (r + 0.99 * best)

    def loss(out: Tensor) -> Tensor:
        return F.smooth_l1_loss(out, torch.zeros_like(out)) if how != "sac" else out.mean()

    model = Net(forward, q=mlp(6, 32, 4), v=mlp(6, 16, 1), target=mlp(6, 32, 4))
    return model, lambda: ((torch.randn(16, 6), torch.randn(16, 6), torch.randn(16, 1)), ()), loss


@case("reinforce", "ppo", "gaussian", "tanh-gaussian", "advantage", "entropy", scale=128.0)
def policies(how: str) -> Built:
    def forward(net: Net, s: Tensor, action: Tensor, advantage: Tensor) -> Tensor:
        out = net.body(s)
        if how in ("gaussian", "tanh-gaussian"):
            mean, spread = out.chunk(2, 1)
            spread = spread.clamp(-3, 2)
            each = -0.5 * ((action - mean) / spread.exp()) ** 2 - spread - 0.919
            each = each - torch.log(1 - torch.tanh(action).square() + 1e-6) if how == "tanh-gaussian" else each
            return -(each.sum(1) * advantage)
        chosen = out.log_softmax(1).gather(1, action[:, :1].abs().long().clamp_max(3)).squeeze(1)
        if how == "ppo":
            ratio = torch.exp(chosen - net.old)
            return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        if how == "advantage":
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        if how == "entropy":
            return -chosen * advantage + 0.01 * (out.softmax(1) * out.log_softmax(1)).sum(1)
        return -chosen * advantage

    def loss(out: Tensor) -> Tensor:
        return out.mean()

    return (
        Net(forward, body=mlp(6, 32, 4), old=torch.full((16,), -1.4)),
        lambda: ((torch.randn(16, 6), torch.randn(16, 2), torch.randn(16)), ()),
        loss,
    )


@case("returns", "observation-norm", "reward-scale", "world-model", "counts", scale=0.0625)
def raw_observations(how: str) -> Built:
    def forward(net: Net, s: Tensor) -> Tensor:
        if how == "returns":
            return net.body(s / 500.0) * 300.0 + 500.0
        if how == "observation-norm":
            return net.body(((s - net.mean) / (net.var + 1e-8).sqrt()).clamp(-10, 10))
        if how == "reward-scale":
            return net.body(s.sign() * ((s.abs() + 1).sqrt() - 1) + 0.001 * s)
        if how == "world-model":
            return s + 0.1 * net.body(s / 500.0).repeat(1, 2)[:, :6]
        return net.body(torch.rsqrt(s.abs().round() + 1))

    wide = 6 if how == "world-model" else 4
    far = 500.0 if how in ("returns", "world-model") else 0.0
    model = Net(forward, body=mlp(6, 32, 4), mean=torch.full((6,), 500.0), var=torch.full((6,), 9.0))
    return model, lambda: ((torch.randn(16, 6) * 3 + 500,), (torch.randn(16, wide) + far,)), mse
