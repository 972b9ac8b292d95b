"""State dicts, of a model and of its optimizers, as one process would have them while ranks hold shares."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mpcompile.errors import TrainingError
from mpcompile.training.distributed.shares import Shares
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.monitor import OptimizerMonitor

Find = Callable[[], "Shares | None"]


class ShareHooks:
    """What state dicts and loading do while `find` gives shares.

    Every module of the model has the hooks, for a part's state dict is to be FP32 as well; of those that call each other,
    the outermost opens and closes.
    """

    def __init__(self, find: Find, model: nn.Module, users: Optimizers, monitor: OptimizerMonitor) -> None:
        self._find, self._users, self._monitor = find, users, monitor
        self._stack = contextlib.ExitStack()
        self._opener: nn.Module | None = None
        for module in model.modules():
            self._hook(module)
        for number, user in enumerate(users):
            self._hook_optimizer(number, user)

    def close(self) -> None:
        """Share out again what a state dict that failed midway has left whole."""
        self._opener = None
        self._stack.close()

    def _hook(self, module: nn.Module) -> None:
        # A deep copy of the model has these hooks too, and shares nothing.
        def enter(one: nn.Module, what: str) -> None:
            shares = self._find()
            if one is module and shares is not None and self._opener is None:
                self._stack.enter_context(shares.joined(what))
                self._opener = module

        def leave(one: nn.Module) -> None:
            if one is self._opener:
                self.close()

        before: list[tuple[str, str]] = [
            ("state_dict", "model.state_dict()"),
            ("load_state_dict", "model.load_state_dict()"),
        ]
        for call, what in before:
            getattr(module, f"register_{call}_pre_hook")(lambda one, *_, what=what: enter(one, what))
            getattr(module, f"register_{call}_post_hook")(lambda one, *_: leave(one))

    def _hook_optimizer(self, number: int, user: torch.optim.Optimizer) -> None:
        def mine(one: torch.optim.Optimizer) -> Shares | None:
            return self._find() if one is user else None

        def gather(one: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            shares = mine(one)
            if shares is None:
                return
            whole = shares.whole_state(number)
            numbers = {id(p): i for i, p in enumerate(p for group in user.param_groups for p in group["params"])}
            every = set(map(id, shares.parameters.values()))
            rest = {i: saved["state"][i] for key, i in numbers.items() if key not in every and i in saved["state"]}
            shared = {numbers[id(p)]: state for p, state in whole.items()}
            saved["state"] = dict(sorted({**rest, **shared}.items()))

        def load(one: torch.optim.Optimizer, *_: Any) -> None:
            # torch casts what it loads to its parameter's dtype, and reads no number of it.
            shares = mine(one)
            if shares is not None:
                self._stack.enter_context(shares.stretched())

        user.register_state_dict_post_hook(gather)
        user.register_load_state_dict_pre_hook(load)
        user.register_load_state_dict_post_hook(lambda *_: self.close())
        user.register_step_pre_hook(lambda one, *_: self._refuse_step(one))

    def _refuse_step(self, one: torch.optim.Optimizer) -> None:
        if self._find() is not None and not self._monitor.ours and one in self._users.each:
            raise TrainingError("MP549", "optimizer.step() while each rank holds a share of masters and moments",
                                why="the optimizer's state is of pieces, and the parameters are low copies",
                                try_="step(...) updates; step.join_masters(), on all ranks, to train otherwise")  # fmt: skip


__all__ = ["ShareHooks"]
