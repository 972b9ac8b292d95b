"""A timm-like loop: Mixup, a teacher to distil from, an EMA of the weights, clipping, a cosine schedule."""

from __future__ import annotations

from typing import Any

import torch
from curves import Wrap, both
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def net(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels, out in ((3, width), (width, 2 * width)):
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def loss_of(model: Any, x: Tensor, first: Tensor, second: Tensor, share: Tensor, taught: Tensor) -> Tensor:
    logits = model(x)
    mixed = share * F.cross_entropy(logits, first) + (1 - share) * F.cross_entropy(logits, second)
    return mixed + F.kl_div(
        F.log_softmax(logits, -1), F.log_softmax(taught, -1), log_target=True, reduction="batchmean"
    )


def train(wrap: Wrap, steps: int) -> list[float]:
    model, teacher = net(16), wrap(net(32).eval())
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = wrap(model).train_step(optimizer, loss_of, max_grad_norm=1.0)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    losses = []
    for _ in range(steps):
        order, share = torch.randperm(32), torch.distributions.Beta(0.8, 0.8).sample()
        mixed = share * x + (1 - share) * x[order]
        with torch.no_grad():
            taught = teacher(mixed)
        losses.append(step(mixed, y, y[order], share, taught).loss.item())
        schedule.step()
        ema.update_parameters(model)
    return losses


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float]]:
    return both(__doc__ or "", train, arguments, steps=60)


if __name__ == "__main__":
    main()
