"""Lightning's precision plugin: `Trainer(plugins=[MPCompilePrecision("bf16")])`, and `FabricPrecision` for Fabric.

As a drop-in, what the module computes in its steps and its `forward` is compiled in mixed precision, and Lightning does
the rest.  With ``whole_step=True`` each training step of Lightning's loop is one call of `mp.train_step`.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.plugins.precision.amp import MixedPrecision as FabricMixedPrecision
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision.amp import MixedPrecision
from torch import Tensor, nn

from mpcompile import MixedPrecisionModule, Policy, mpcompile
from mpcompile.formats import LOW
from mpcompile.integrations.refusals import refused

_STEPS = ("training_step", "validation_step", "test_step", "predict_step", "forward")
_LOGS = ("log", "log_dict")
# Lightning's own word for FP16; of the others it is the type's name.
_SIXTEEN = "16-mixed"


class MPCompilePrecision(MixedPrecision):  # type: ignore[misc]
    """The precision plugin.

    Args:
      policy: a policy string or a `Policy`, of which the low type is "bf16" or "fp16".
      whole_step: each training step is a call of `mp.train_step`: forward, backward, clipping and update in one.
      keep_fp32, low, backend: as in `mpcompile(model, …)`.
      step_options: with `whole_step`, those of `mp.train_step`; clipping and accumulation are the Trainer's.

    Raises:
      TrainingError: MP551, for a policy without a low type.
    """

    def __init__(
        self, policy: str | Policy = "bf16", *, whole_step: bool = False, keep_fp32: Any = (), low: Any = (),
        backend: str = "inductor", step_options: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        parsed = policy if isinstance(policy, Policy) else Policy.parse(policy)
        super().__init__(_lightnings(parsed), "cuda" if torch.cuda.is_available() else "cpu")
        self.policy, self.whole_step = parsed, whole_step
        self.settings: dict[str, Any] = {"keep_fp32": keep_fp32, "low": low}
        self.backend, self.step_options = backend, dict(step_options or {})
        for name in {"accumulate", "max_grad_norm"} & self.step_options.keys():
            raise refused(
                f"step_options has {name!r}", try_="accumulate_grad_batches and gradient_clip_val of the Trainer"
            )
        if whole_step:
            self.scaler = None
        self.step: Any = None
        self.result: Any = None
        self._saved: dict[str, Any] | None = None
        self._converted = weakref.WeakSet[nn.Module]()

    # ------------------------------------------------------------------------------------------------------ the drop-in

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Compile what the module's steps compute. Its parameters and their names stay as they are."""
        if module in self._converted:
            return module
        self._converted.add(module)
        options = {"policy": str(self.policy), **self.settings, "inner": self.backend}
        for name in _LOGS:
            setattr(module, name, torch.compiler.disable(getattr(module, name)))  # type: ignore[no-untyped-call]
        for name in _STEPS:
            if not (self.whole_step and name == "training_step") and _is_own(module, name):
                compiled = torch.compile(getattr(module, name), backend="mpcompile", options=options)
                setattr(module, name, compiled)
        return module

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """No autocast: the compiled graphs hold their own casts."""
        yield

    # --------------------------------------------------------------------------------------------------- the whole step

    def connect(self, model: nn.Module, optimizers: list[Any], lr_schedulers: list[Any]) -> Any:
        """The optimizers are there: the step is made of them."""
        if self.whole_step and optimizers:
            self._make_step(model, optimizers)
        return super().connect(model, optimizers, lr_schedulers)

    def _make_step(self, module: Any, optimizers: list[Any]) -> None:
        trainer = module.trainer
        asked = {
            "manual optimization": not module.automatic_optimization,
            f"{len(optimizers)} optimizers": len(optimizers) > 1,
            "gradient_clip_algorithm='value'": trainer.gradient_clip_algorithm not in (None, "norm"),
            f"{trainer.world_size} processes": trainer.world_size > 1,
        }
        for name in (name for name, on in asked.items() if on):
            raise refused(f"whole_step=True under {name}", why="the step is one loss, one clipped norm and one update",
                          try_="MPCompilePrecision(…) as a drop-in, or mp.train_step in a loop of your own")  # fmt: skip
        traced = getattr(module.training_step, "traced", module.training_step)
        self.step = mpcompile(module, self.policy, backend=self.backend, **self.settings).train_step(
            optimizers[0],
            lambda model, batch, place: _loss(model, traced, batch, place),
            accumulate=trainer.accumulate_grad_batches,
            max_grad_norm=trainer.gradient_clip_val or None,
            **self.step_options,
        )
        if self._saved is not None:
            self.step.load_state_dict(self._saved)
            self._saved = None  # it is of this fit alone
        wants_place = "batch_idx" in inspect.signature(traced).parameters

        def training_step(batch: Any, batch_idx: int = 0) -> Tensor:
            self.result = self.step(batch, wants_place)
            # A leaf of its own, for a loop that calls backward on what it is given; no gradient goes further.
            return self.result.loss.detach().requires_grad_()  # type: ignore[no-any-return]

        training_step.traced = traced  # type: ignore[attr-defined]
        module.training_step = training_step

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing, where the step has done it."""
        if self.step is None:
            super().backward(tensor, model, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Lightning's update: the last microbatch, whose call of the step makes it."""
        if self.step is None:
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        result = closure()
        if self.step.pending:
            self.result = self.step.end_window()._replace(loss=self.result.loss)
        # The hooks before an update come after it here.
        self._after_closure(model, optimizer)
        return result

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, where the step has done it."""
        if self.step is None:
            super().clip_gradients(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The step's (loss scale, counts, open window), or the GradScaler's."""
        return super().state_dict() if self.step is None else self.step.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        if not self.whole_step:
            super().load_state_dict(state_dict)
        elif self.step is None:
            self._saved = state_dict
        else:
            self.step.load_state_dict(state_dict)


class _NoPlace:
    """Stands for `batch_idx` where a loss is traced: a number would be fixed in the graph."""

    def _refuse(self, *_: Any) -> Any:
        raise refused("training_step reads batch_idx", why="it is traced once, and would keep the first one",
                      try_="take it out of the loss, or use MPCompilePrecision as a drop-in")  # fmt: skip

    __index__ = __int__ = __bool__ = __add__ = __radd__ = __mod__ = __eq__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse
    __hash__ = None  # type: ignore[assignment]
    __sub__ = __mul__ = __floordiv__ = __truediv__ = __str__ = __format__ = __ne__ = _refuse


def _loss(model: Any, traced: Callable[..., Any], batch: Any, wants_place: bool) -> Tensor:
    """The loss of a module's training_step, traced.

    Raises:
      TrainingError: MP551, where it logs: that would happen once, when it is traced.
    """
    before = {name: vars(model)[name] for name in _LOGS}

    def refuse(*_: Any, **__: Any) -> None:
        raise refused(
            "training_step logs",
            why="it is traced once: what it logs would be logged once",
            try_="log in on_train_batch_end(outputs, …), where outputs['loss'] and the plugin's result are there",
        )

    for name in _LOGS:
        vars(model)[name] = refuse
    try:
        given = traced(batch, _NoPlace()) if wants_place else traced(batch)
    finally:
        vars(model).update(before)
    return given["loss"] if isinstance(given, dict) else given  # type: ignore[no-any-return]


class FabricPrecision(FabricMixedPrecision):  # type: ignore[misc]
    """Fabric's plugin: `Fabric(plugins=[FabricPrecision("bf16")])`, whose `setup` gives an `mpcompile(model)` inside.

    Args:
      policy, options: as of `mpcompile(model, policy, …)`.
    """

    def __init__(self, policy: str | Policy = "bf16", **options: Any) -> None:
        parsed = policy if isinstance(policy, Policy) else Policy.parse(policy)
        super().__init__(_lightnings(parsed), "cuda" if torch.cuda.is_available() else "cpu")
        self.policy, self.options = parsed, options

    def convert_module(self, module: nn.Module) -> nn.Module:
        """`module` in mixed precision."""
        if isinstance(module, MixedPrecisionModule):
            return module
        return mpcompile(module, self.policy, **self.options)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """No autocast: the compiled graphs hold their own casts."""
        yield

    def convert_input(self, data: Any) -> Any:
        """As it is: the plan casts."""
        return data

    def convert_output(self, data: Any) -> Any:
        """As it is: the policy says what comes out."""
        return data


def _lightnings(policy: Policy) -> str:
    if policy.low not in LOW:
        raise refused(f"the policy {policy} has no low type that Lightning knows", try_="'bf16' or 'fp16'")
    return _SIXTEEN if policy.low == "fp16" else f"{policy.low}-mixed"


def _is_own(module: nn.Module, name: str) -> bool:
    """Whether the module's class has a method of its own of that name."""
    return getattr(type(module), name, None) is not getattr(LightningModule, name, None)


__all__ = ["FabricPrecision", "MPCompilePrecision"]
