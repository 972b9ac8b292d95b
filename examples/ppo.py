"""PPO with torch.distributions: clipped ratios, a value head, an entropy bonus; the task is to name the larger input."""

from __future__ import annotations

from typing import Any

import torch
from curves import Wrap, both
from torch import Tensor, nn
from torch.distributions import Categorical


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, 4), nn.Linear(64, 1)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(seen)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def loss_of(model: Any, seen: Tensor, acted: Tensor, before: Tensor, gain: Tensor) -> Tensor:
    logits, value = model(seen)
    # Checks of the arguments read their numbers, which a traced loss cannot.
    policy = Categorical(logits=logits, validate_args=False)
    ratio = (policy.log_prob(acted) - before).exp()
    advantage = gain - value.detach()
    clipped = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -clipped.mean() + 0.5 * (gain - value).square().mean() - 0.01 * policy.entropy().mean()


def train(wrap: Wrap, steps: int) -> list[float]:
    agent = Agent()
    acts = wrap(agent)
    step = acts.train_step(torch.optim.Adam(agent.parameters(), 3e-3), loss_of, max_grad_norm=0.5)
    losses = []
    for _ in range(steps):
        seen = torch.randn(256, 4)
        with torch.no_grad():
            policy = Categorical(logits=acts(seen)[0])
            # Drawn by the inverse of the distribution, so that both curves draw the same.
            acted = (policy.probs.cumsum(-1) < torch.rand(256, 1)).sum(-1).clamp(max=3)
        gain = (acted == seen.argmax(-1)).float()
        before = policy.log_prob(acted)
        for _ in range(2):
            loss = step(seen, acted, before, gain).loss
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float]]:
    return both(__doc__ or "", train, arguments, steps=60)


if __name__ == "__main__":
    main()
