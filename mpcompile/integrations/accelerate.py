"""The training step in a loop of Accelerate: `train_step(accelerator, model, optimizer)`.

model, optimizer, loader, schedule = accelerator.prepare(mpcompile(model, "bf16"), optimizer, loader, schedule)
step = train_step(accelerator, model, optimizer, max_grad_norm=1.0)
for batch in loader:
    with accelerator.accumulate(model):
        result = step(**batch)  # forward, backward, clip, update, zero
        schedule.step()
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from mpcompile import MixedPrecisionModule
from mpcompile.integrations.refusals import refused


class SteppedOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """A prepared optimizer whose updates the training step makes: a host's `step` after that finds nothing to do.

    Gradients of the user's own (a `backward` besides the step) are applied as ever.
    """

    _result: Any = None

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Nothing, unless there are gradients that the training step did not make."""
        held = [p.grad for group in self.param_groups for p in group["params"]]
        if closure is not None or held.count(None) < len(held):
            super().step(closure)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last update was skipped. Reads the device, as every use of a GradScaler does."""
        return self._result is not None and not bool(self._result.stepped)


class AcceleratedStep:
    """A training step that ends its windows where Accelerate does, and says so to the prepared optimizers.

    Fields:
      step: the `TrainStep` inside.
      result: the last `StepResult`; None before the first call.
      updated: the last result of an update; None before the first.
      accumulate: microbatches of a window.
      divides: what Accelerate divides each loss by, where that must stay as it was; None where another host divides.
    """

    def __init__(
        self, accelerator: Accelerator, step: Any, optimizers: list[SteppedOptimizer], accumulate: int = 1
    ) -> None:
        self.accelerator, self.step, self.optimizers, self.accumulate = accelerator, step, optimizers, accumulate
        self.divides: int | None = None
        self.result: Any = None
        self.updated: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One microbatch; an update where `accelerator.sync_gradients` says so.

        Returns:
          A `StepResult`: device tensors.

        Raises:
          TrainingError: MP551, where the host's windows are no longer the step's; nothing is changed.
        """
        self._agree()
        result = self.step(*args, **kwargs)
        if self.step.pending and self.accelerator.sync_gradients:
            result = self.step.end_window()._replace(loss=result.loss)
        self.result = result
        if not self.step.pending:
            self._note(result)
        return result

    def _agree(self) -> None:
        """The window is as long as it was, and this microbatch ends it on both sides or on the host's alone."""
        now = self.accelerator.gradient_accumulation_steps
        ends = self.step.pending + 1 >= self.accumulate
        if (self.divides is None or now == self.divides) and (self.accelerator.sync_gradients or not ends):
            return
        raise refused(
            f"the step updates after {self.accumulate} microbatches, and Accelerate's window is another",
            why=f"gradient_accumulation_steps is {now} now; or the step stands outside of accelerator.accumulate(model)",
            try_="make the step anew: train_step(accelerator, model, optimizer)",
        )

    def _note(self, result: Any) -> None:
        """An update was made, or skipped."""
        self.updated = result
        for one in self.optimizers:
            one._result = result

    def state_dict(self) -> dict[str, Any]:
        """The inner step's; `accelerator.save_state` asks for it."""
        return self.step.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; `accelerator.load_state` calls it."""
        self.step.load_state_dict(saved)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    loss_fn: Callable[..., Any] | None = None,
    **options: Any,
) -> AcceleratedStep:
    """The training step of a prepared model and optimizer, inside `with accelerator.accumulate(model)`.

    It takes the place of the forward, `accelerator.backward`, `clip_grad_norm_`, `optimizer.step` and `zero_grad`; a
    prepared scheduler is stepped as before. Its state is part of `accelerator.save_state` from here on.

    Args:
      accelerator: its `gradient_accumulation_steps` are the step's `accumulate`.
      model: an `mpcompile(model)`, prepared or not.
      optimizer: prepared or not; or a list of them on one loss.
      loss_fn, options: those of `mp.train_step`.

    Raises:
      TrainingError: MP551, for a model that is no `mpcompile(model)`, or `accumulate=`; MP5xx, as `mp.train_step`.
    """
    if "accumulate" in options:
        raise refused("train_step(accelerator, …, accumulate=…)", try_="Accelerator(gradient_accumulation_steps=…)")
    options["accumulate"] = accelerator.gradient_accumulation_steps
    step = hosted_step(accelerator, model, optimizer, loss_fn, **options)
    step.divides = options["accumulate"]
    accelerator.register_for_checkpointing(step)
    return step


def hosted_step(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, loss_fn: Callable[..., Any] | None, **options: Any
) -> AcceleratedStep:
    """As `train_step`, with `accumulate` as it is given, and without registering the state."""
    found = compiled_inside(accelerator, model)
    if accelerator.num_processes > 1:
        raise refused(
            f"the training step under Accelerate in {accelerator.num_processes} processes",
            why="nobody has tried it: who averages the gradients, DDP or the step, is not settled here",
            try_="the drop-in way: accelerator.prepare(mpcompile(model)); or mp.train_step under torchrun without Accelerate",
        )
    prepared = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    step = found.train_step(optimizer, loss_fn, **options)
    return AcceleratedStep(
        accelerator, step, [taken_over(one) for one in prepared if _is_prepared(one)], options.get("accumulate", 1)
    )


def compiled_inside(accelerator: Accelerator, model: nn.Module) -> Any:
    """The `mpcompile(model)` that a prepared model is or holds.

    Raises:
      TrainingError: MP551.
    """
    inside = accelerator.unwrap_model(model)
    if not isinstance(inside, MixedPrecisionModule):
        raise refused(
            f"the model is a {type(inside).__name__}, and no mpcompile(model)",
            try_="model = accelerator.prepare(mpcompile(model, 'bf16'))",
        )
    return inside


def taken_over(optimizer: Any) -> Any:
    """`optimizer` itself, a `SteppedOptimizer` now, which leaves its updates to the training step from here on."""
    if not isinstance(optimizer, SteppedOptimizer):
        optimizer.__class__ = SteppedOptimizer
        # What a scheduler put on the object calls the class's former step.
        before = vars(optimizer).get("step")
        if before is not None:
            optimizer.step = functools.update_wrapper(functools.partial(SteppedOptimizer.step, optimizer), before)
    return optimizer


def _is_prepared(optimizer: Any) -> bool:
    return isinstance(optimizer, AcceleratedOptimizer)


__all__ = ["AcceleratedStep", "SteppedOptimizer", "train_step"]
