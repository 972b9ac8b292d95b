"""Of optimizers: hooks around a step, the state that a first step makes, what schedulers look for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from mpcompile.torch_internals.names import found


def hooks_of_all_optimizers() -> tuple[dict[int, Any], dict[int, Any]]:
    """(before, after) a step: `torch.optim.optimizer.register_optimizer_step_pre_hook` and its twin."""
    before, after = found("torch.optim.optimizer", "_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    return before, after


def step_hooks(optimizer: Optimizer) -> tuple[dict[int, Any], dict[int, Any]]:
    """(before, after) a step of one optimizer: `register_step_pre_hook` and its twin."""
    return optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks


def state_maker(optimizer: Optimizer) -> Callable[[dict[str, Any]], Any] | None:
    """What an optimizer of torch's makes the states of a group's parameters with, where they have gradients; else None."""
    make: Any = getattr(optimizer, "_init_group", None)
    if make is None:
        return None
    # It fills a list for each kind of state, and each class has another number of them.
    lists = len(inspect.signature(make).parameters) - 1
    return lambda group: make(group, *([] for _ in range(lists)))


def note_step(optimizer: Optimizer) -> None:
    """What schedulers look for before they step, and warn where it is not there."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


__all__ = ["hooks_of_all_optimizers", "note_step", "state_maker", "step_hooks"]
