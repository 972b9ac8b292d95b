"""Training by a step beside the same training by plain PyTorch: weights, losses and buffers are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mpcompile.api import mpcompile


def train_beside(
    model: nn.Module,
    batches: Sequence[tuple[Any, ...]],
    loss: Callable[..., torch.Tensor] | None = None,
    *,
    backend: str = "eager",
    policy: str = "fp32",
    tolerance: float = 2e-5,
    make: Callable[[Any], torch.optim.Optimizer] = lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9),
    copied: nn.Module | None = None,
    low: Sequence[str] = (),
    **options: Any,
) -> Any:
    """The step, after it trained `model` on `batches`, and its copy did plainly; fails where they differ."""
    plain = copied if copied is not None else copy.deepcopy(model)
    own, other = make(model.parameters()), make(plain.parameters())
    step = mpcompile(model, policy, backend=backend, low=list(low)).train_step(own, loss, **options)
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        found = step(*batch).loss
        torch.manual_seed(number)
        other.zero_grad()
        wanted = plain(*batch) if loss is None else loss(plain, *batch)
        wanted.backward()
        other.step()
        torch.testing.assert_close(found, wanted.detach(), rtol=tolerance, atol=tolerance)
    same_state(model, plain, tolerance)
    return step


def same_state(model: nn.Module, plain: nn.Module, tolerance: float = 2e-5) -> None:
    """Parameters and buffers of both are the same."""
    pairs = zip(model.state_dict().items(), plain.state_dict().values(), strict=True)
    for (name, found), wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
