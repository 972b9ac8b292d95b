"""The optimizers of a step: taken out of their hosts' wrappers, and refused where their `step` is not what is traced."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.optimizers import note_step

# Hosts' wrappers that only hold an optimizer and say when it steps: module, class -> where the optimizer is.
_WRAPPERS = {
    ("lightning.fabric.wrappers", "_FabricOptimizer"): "_optimizer",
    ("lightning_fabric.wrappers", "_FabricOptimizer"): "_optimizer",
    ("lightning.pytorch.core.optimizer", "LightningOptimizer"): "_optimizer",
    ("pytorch_lightning.core.optimizer", "LightningOptimizer"): "_optimizer",
    ("accelerate.optimizer", "AcceleratedOptimizer"): "optimizer",
}
_DROP_IN = "the drop-in way: loss = mp(x); loss.backward(); optimizer.step()"


_READ_GRADIENT = cast(Any, Tensor.grad).__get__


class GradientsUnread(TorchFunctionMode):
    """While the optimizers' hooks run before an update: none of them reads ``.grad``, where the step keeps no gradient.

    Raises:
      TrainingError: MP523, as soon as one does: to clip or change gradients there would change nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _READ_GRADIENT:
            raise TrainingError("MP523", "a hook before the optimizer's step reads gradients", where=_caller(),
                                why="the step's gradients are in its graph, and in no .grad",
                                try_="max_grad_norm= to clip; a hook on the parameter (p.register_hook) to change a "
                                "gradient; or the drop-in way: loss = mp(x); loss.backward(); optimizer.step()")  # fmt: skip
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """file:line of the user's hook."""
    frames = [
        f for f in traceback.extract_stack() if "site-packages" not in f.filename and "mpcompile" not in f.filename
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def is_not_ours(hook: Any) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith("mpcompile.")


class Optimizers:
    """One optimizer, or several that step together on one loss; their groups are numbered through.

    Args:
      given: an optimizer, a host's wrapper around one, or a list of them.

    Raises:
      TrainingError: MP525, MP522 (a parameter that two of them hold), MP541 (no optimizer).
    """

    def __init__(self, given: Any) -> None:
        self.given: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        self.each = [unwrap(one) for one in self.given]
        if not self.each:
            raise TrainingError("MP541", "train_step([]) has no optimizer", try_="train_step(optimizer)")
        self.name = " and ".join(type(one).__name__ for one in self.each)
        self._steps: list[Any] = []
        self.refuse()
        ids = [id(p) for p in self.params()]
        if len(set(ids)) < len(ids):
            raise TrainingError(
                "MP522",
                f"a parameter is in {self.name} twice",
                why="one loss gives it one gradient, and two updates of it would be ambiguous",
                try_="one optimizer, or one group, for each parameter",
            )

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.each)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of all, as they are now."""
        return [group for one in self.each for group in one.param_groups]

    def params(self) -> list[Tensor]:
        """Their parameters, as they list them."""
        return [p for group in self.groups for p in group["params"]]

    def owners(self) -> list[torch.optim.Optimizer]:
        """The optimizer of each group."""
        return [one for one in self.each for _ in one.param_groups]

    def refuse(self) -> None:
        """Refuse one whose `step` has become another.

        Raises:
          TrainingError: MP525.
        """
        steps = [(type(one), vars(one).get("step")) for one in self.each]
        if steps != self._steps:
            for one in self.each:
                _refuse_step(one)
            self._steps = steps

    def refuse_untrained(self, read: Iterable[Tensor] | None) -> None:
        """Refuse optimizers that train nothing.

        Args:
          read: all the tensors that a loss can read; None where a function may read others.

        Raises:
          TrainingError: MP522.
        """
        known = None if read is None else set(map(id, read))
        if not any(p.requires_grad and (known is None or id(p) in known) for p in self.params()):
            raise TrainingError(
                "MP522",
                f"the {self.name} holds no parameter of the model that is trained",
                try_=f"{type(self.each[0]).__name__}(model.parameters(), …)",
            )

    def clip_norm(self, given: float | None) -> float | None:
        """The step's `max_grad_norm`, or that of its one optimizer (`mpcompile.optim`).

        Raises:
          TrainingError: MP541, where they say different things.
        """
        norms = {getattr(one, "max_grad_norm", None) for one in self.each}
        if norms <= {None, given}:
            return given
        if given is not None or len(self.each) > 1:
            raise TrainingError("MP541", f"max_grad_norm of the step is {given}, of its optimizers {norms}",
                                why="the gradients of all optimizers have one norm in a step",
                                try_="train_step(..., max_grad_norm=), and none on the optimizers")  # fmt: skip
        return next(iter(norms))

    def note_step(self) -> None:
        """What schedulers look for before they step."""
        for one in (*self.each, *self.given):
            note_step(one)


def torch_class(optimizer: Any) -> type:
    """The class, or that of torch which it is (`mpcompile.optim`)."""
    return getattr(optimizer, "torch_class", type(optimizer))


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside a host's wrapper, or `optimizer` itself.

    Raises:
      TrainingError: MP541, for what is no optimizer.
    """
    names = {(cls.__module__, cls.__name__) for cls in type(optimizer).__mro__}
    inner = next((attribute for name, attribute in _WRAPPERS.items() if name in names), None)
    if inner is not None:
        return unwrap(getattr(optimizer, inner))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TrainingError(
            "MP541",
            f"train_step was given a {type(optimizer).__name__} as optimizer",
            try_="a torch.optim.Optimizer, or a list of them on one loss",
        )
    return optimizer


def _refuse_step(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a `step` that is not the whole of what the class traces to.

    Raises:
      TrainingError: MP525.
    """
    cls = type(optimizer)
    if (why := _own_step(optimizer) or _overridden(cls) or _inner(optimizer)) is not None:
        raise TrainingError(
            "MP525",
            f"the step of {cls.__name__} is not the one that is traced",
            where=f"{cls.__module__}.{cls.__qualname__}",
            why=why,
            try_=_DROP_IN,
        )


def _own_step(optimizer: torch.optim.Optimizer) -> str | None:
    """A `step` that was put on the object; a scheduler puts one there that only notes the call."""
    own = vars(optimizer).get("step")
    while getattr(own, "__code__", None) in _schedulers():
        own = own.__wrapped__  # type: ignore[union-attr]
    bound = getattr(own, "__self__", optimizer) is optimizer
    if own is None or (bound and getattr(own, "__func__", own) is type(optimizer).step):
        return None
    return "the object has a `step` of its own"


@functools.cache
def _schedulers() -> frozenset[Any]:
    """The code of the functions that schedulers put in the place of an optimizer's step."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return frozenset({vars(optimizer)["step"].__code__})


def _overridden(cls: type) -> str | None:
    """A class outside of torch.optim that puts its `step` before one that works."""
    if _is_torchs(_traced(cls)):
        return None
    having = [c for c in cls.__mro__ if "step" in vars(c) and c not in (torch.optim.Optimizer, object)]
    if len({inspect.unwrap(vars(c)["step"]) for c in having}) > 1:
        return f"{having[0].__name__} puts its own `step` before that of {having[-1].__name__}"
    return f"someone replaced {cls.__name__}.step" if cls.__module__.startswith("torch.optim.") else None


def _inner(optimizer: torch.optim.Optimizer) -> str | None:
    """A class of one's own that holds another optimizer most probably steps that one."""
    if _is_torchs(_traced(type(optimizer))):
        return None
    held = [k for k, v in vars(optimizer).items() if isinstance(v, torch.optim.Optimizer)]
    return f"it holds another optimizer in `{held[0]}`" if held else None


def _traced(cls: Any) -> Any:
    """The function that a trace of the class's step runs."""
    return inspect.unwrap(cls.step)


def _is_torchs(step: Any) -> bool:
    return str(step.__module__).startswith("torch.optim.")
