"""Diffusion: a small UNet told the time step, the v-prediction loss, an EMA of the weights."""

from __future__ import annotations

from typing import Any

import torch
from curves import Wrap, both
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class UNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 2 * width))
        self.enter, self.down = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm, self.middle = nn.GroupNorm(4, 2 * width), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up, self.leave = nn.ConvTranspose2d(2 * width, width, 2, stride=2), nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = torch.exp(torch.arange(16, device=x.device) * -0.5) * t[:, None] * 1000
        told = self.time(torch.cat([waves.sin(), waves.cos()], 1))[:, :, None, None]
        skip = torch.nn.functional.silu(self.enter(x))
        low = self.down(skip) + told
        low = low + self.middle(torch.nn.functional.silu(self.norm(low)))
        out: Tensor = self.leave(torch.cat([self.up(low), skip], 1))
        return out


def loss_of(model: Any, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    a, s = torch.cos(t * torch.pi / 2)[:, None, None, None], torch.sin(t * torch.pi / 2)[:, None, None, None]
    return (model(a * x + s * noise, t) - (a * noise - s * x)).square().mean()  # type: ignore[no-any-return]


def train(wrap: Wrap, steps: int) -> list[float]:
    model = UNet()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    step = wrap(model).train_step(torch.optim.AdamW(model.parameters(), 2e-3), loss_of, max_grad_norm=1.0)
    images = torch.randn(16, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    losses = []
    for _ in range(steps):
        losses.append(step(images, torch.randn_like(images), torch.rand(16)).loss.item())
        ema.update_parameters(model)
    return losses


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float]]:
    return both(__doc__ or "", train, arguments, steps=60)


if __name__ == "__main__":
    main()
