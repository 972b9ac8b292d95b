"""Optimizers, groups and schedulers, as texts. Epsilons are large: a moment of nearly nothing would make a coin of its sign."""

from __future__ import annotations

import random

OPTIMIZERS = (
    "torch.optim.SGD({groups}, lr={lr})",
    "torch.optim.SGD({groups}, lr={lr}, momentum=0.9)",
    "torch.optim.SGD({groups}, lr={lr}, momentum=0.9, nesterov=True, weight_decay=0.01)",
    "torch.optim.SGD({groups}, lr={lr}, momentum=0.9, dampening=0.3)",
    "torch.optim.SGD({groups}, lr={lr}, weight_decay=0.1, foreach=True)",
    "torch.optim.SGD({groups}, lr={lr}, momentum=0.5, fused=True)",
    "torch.optim.SGD({groups}, lr={lr}, maximize=True, momentum=0.5)",
    "torch.optim.Adam({groups}, lr={lr}, eps=1e-2)",
    "torch.optim.Adam({groups}, lr={lr}, eps=1e-2, amsgrad=True, weight_decay=0.01)",
    "torch.optim.Adam({groups}, lr={lr}, eps=1e-2, fused=True)",
    "torch.optim.Adam({groups}, lr={lr}, eps=1e-2, betas=(0.5, 0.7), maximize=True)",
    "torch.optim.AdamW({groups}, lr={lr}, eps=1e-2)",
    "torch.optim.AdamW({groups}, lr={lr}, eps=1e-2, weight_decay=0.1, foreach=True)",
    "torch.optim.AdamW({groups}, lr={lr}, eps=1e-2, fused=True)",
    "torch.optim.AdamW({groups}, lr={lr}, eps=1e-2, foreach=False)",
    "torch.optim.NAdam({groups}, lr={lr}, eps=1e-2)",
    "torch.optim.RAdam({groups}, lr={lr}, eps=1e-2)",
    "torch.optim.Adamax({groups}, lr={lr}, eps=1e-1)",
    "torch.optim.Adagrad({groups}, lr={lr}, eps=1e-1)",
    "torch.optim.Adadelta({groups}, lr=1.0, eps=1e-2)",
    "torch.optim.RMSprop({groups}, lr={lr}, eps=1e-1)",
    "torch.optim.RMSprop({groups}, lr={lr}, eps=1e-1, momentum=0.5, centered=True)",
    "torch.optim.ASGD({groups}, lr={lr})",
)

GROUPS = (
    "m.parameters()",
    "m.parameters()",
    "[p for p in m.parameters() if p.requires_grad]",
    "[{{'params': [p for p in m.parameters() if p.dim() > 1]}}, {{'params': [p for p in m.parameters() if p.dim() < 2], {other}}}]",
    "[p for n, p in m.named_parameters() if not n.startswith('e.')]",
)

SCHEDULERS = (
    "None",
    "None",
    "torch.optim.lr_scheduler.StepLR(o, 1, 0.7)",
    "torch.optim.lr_scheduler.CosineAnnealingLR(o, 5)",
    "torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n))",
    "torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 3)",
)


def sample(rng: random.Random) -> tuple[str, str]:
    """An optimizer of the model `m`, and a scheduler of it."""
    chosen, groups = rng.choice(OPTIMIZERS), rng.choice(GROUPS)
    other = rng.choice(["'lr': 0.02", "'weight_decay': 0.0", "'lr': 0.05, 'weight_decay': 0.05"])
    return chosen.format(groups=groups.format(other=other), lr=rng.choice([0.01, 0.05, 0.1])), rng.choice(SCHEDULERS)
