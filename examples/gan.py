"""A GAN: two models, two optimizers, one training step for each; the curve is the generator's loss."""

from __future__ import annotations

from typing import Any

import torch
from curves import Wrap, both
from torch import Tensor, nn
from torch.nn.functional import softplus


def net(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(into, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, out)
    )


def train(wrap: Wrap, steps: int) -> list[float]:
    maker, judge = net(8, 2), net(2, 1)

    def judged(model: Any, real: Tensor, fake: Tensor) -> Tensor:
        return (softplus(-model(real)) + softplus(model(fake))).mean()

    def fooled(model: Any, noise: Tensor) -> Tensor:
        return softplus(-judge(model(noise))).mean()

    makes = wrap(maker)
    learn = wrap(judge).train_step(torch.optim.Adam(judge.parameters(), 1e-3, betas=(0.5, 0.99)), judged)
    fool = makes.train_step(torch.optim.Adam(maker.parameters(), 1e-3, betas=(0.5, 0.99)), fooled)
    losses = []
    for _ in range(steps):
        angle = torch.rand(128) * 2 * torch.pi
        real, noise = torch.stack([angle.cos(), angle.sin()], 1), torch.randn(128, 8)
        with torch.no_grad():
            fake = makes(noise)
        learn(real, fake)
        losses.append(fool(noise).loss.item())
    return losses


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float]]:
    return both(__doc__ or "", train, arguments, steps=100)


if __name__ == "__main__":
    main()
