"""The training step inside transformers' `Trainer`: `MixedPrecisionTrainer`, or the mixin before any trainer's class.

    trainer = MixedPrecisionTrainer(mpcompile(model, "bf16"), arguments, train_dataset=texts)

`Trainer` keeps its loop, arguments, callbacks and files; each of its training steps is one call of `mp.train_step`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from mpcompile import MixedPrecisionModule, mpcompile
from mpcompile.integrations.accelerate import AcceleratedStep, hosted_step, taken_over
from mpcompile.integrations.refusals import refused


class StepState(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps the loss scale in `trainer_state.json`, and gives it back when a run is resumed."""

    trainer: Any = None

    def state(self) -> dict[str, Any]:
        """What the checkpoint keeps: the step's state, whose window is closed where `Trainer` saves."""
        step = self.trainer.hosted if self.trainer is not None else None
        return {"args": {}, "attributes": {"saved": None if step is None else step.state_dict()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The state is loaded, the optimizer too."""
        saved = (state.stateful_callbacks or {}).get(type(self).__name__, {}).get("attributes", {}).get("saved")
        if saved is not None and state.global_step:
            self.trainer.hosted.load_state_dict(saved)


class TrainsByStep:
    """Before a trainer's class: `class MyTrainer(TrainsByStep, SFTTrainer)`.

    Args:
      step_options: those of `mp.train_step`; clipping and accumulation are the training arguments'.
      policy: of a model that comes unwrapped; by default what the arguments' ``bf16`` and ``fp16`` say, else "auto".

    Fields:
      hosted: the `AcceleratedStep` of the run; None before `train`.
    """

    hosted: AcceleratedStep | None = None
    # What the trainer's class has.
    accelerator: Any
    args: Any
    callback_handler: Any
    model: Any
    optimizer: Any

    def __init__(
        self, model: Any = None, args: Any = None, *rest: Any, policy: Any = None,
        step_options: dict[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.step_options, self._policy = dict(step_options or {}), policy
        self._weights: dict[int, Tensor] = {}
        for name in {"accumulate", "max_grad_norm"} & self.step_options.keys():
            raise refused(
                f"step_options has {name!r}", try_="gradient_accumulation_steps and max_grad_norm of the arguments"
            )
        super().__init__(self._wrapped(model, args), args, *rest, **options)  # type: ignore[call-arg]
        self.callback_handler.add_callback(StepState())

    def _wrapped(self, model: Any, args: Any) -> Any:
        if not isinstance(model, nn.Module) or isinstance(model, MixedPrecisionModule):
            return model
        asked = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), "auto")
        return mpcompile(model, self._policy or asked)

    def call_model_init(self, trial: Any = None) -> Any:
        """The model of `model_init`, wrapped."""
        return self._wrapped(super().call_model_init(trial), self.args)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The optimizer is prepared now, and the scheduler not made: the step takes the optimizer over."""
        if getattr(self.optimizer, "accelerator_state", None) is not None:
            self._make_step()
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _make_step(self) -> None:
        self._refuse()
        self._weights.clear()
        norm = self.args.max_grad_norm
        self.hosted = hosted_step(
            self.accelerator,
            self.model,
            taken_over(self.optimizer),
            self._loss,
            accumulate=self.args.gradient_accumulation_steps,
            max_grad_norm=norm if norm and norm > 0 else None,
            **self.step_options,
        )
        # What the loop asks for after each window: the step has clipped already, and knows the norm.
        self.accelerator.clip_grad_norm_ = lambda *_, **__: self.hosted.updated.grad_norm
        for one in self.callback_handler.callbacks:
            if isinstance(one, StepState):
                one.trainer = self

    def _refuse(self) -> None:
        asked = {
            "DeepSpeed": getattr(self, "is_deepspeed_enabled", False),
            "FSDP": getattr(self, "is_fsdp_enabled", False),
            "several GPUs in one process (DataParallel)": self.args.n_gpu > 1,
            "torch_compile=True": getattr(self.args, "torch_compile", False),
        }
        for name in (name for name, on in asked.items() if on):
            raise refused(f"the training step under {name}", why="the step is compiled whole, for one process and its model",
                          try_="transformers.Trainer(mpcompile(model), …): the drop-in way, or one GPU")  # fmt: skip

    def _loss(self, model: nn.Module, inputs: dict[str, Any], items: Tensor | None, weight: Tensor) -> Tensor:
        loss: Tensor = self.compute_loss(model, dict(inputs), num_items_in_batch=items)  # type: ignore[attr-defined]
        return loss * weight

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One microbatch: forward, backward, and the update at the end of a window.

        Returns:
          The loss as `Trainer` adds it up: of a window's microbatches the sum is the window's mean.
        """
        model.train()
        given = dict(self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        items = num_items_in_batch
        if items is not None:
            items = torch.as_tensor(items, device=self.args.device)
        # The step divides by `accumulate`; a loss that is normalized over the window already, or over a short one, is not
        # to be divided so.
        size = self.args.gradient_accumulation_steps
        counted = self._counted(num_items_in_batch)
        share = 1 if counted else self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        if share not in self._weights:  # made once: each transfer to the device would be waited for
            self._weights[share] = torch.tensor(size / share, dtype=torch.float32, device=self.args.device)
        result = self.hosted(given, items, self._weights[share])  # type: ignore[misc]
        return result.loss / size  # type: ignore[no-any-return]

    def _counted(self, items: Any) -> bool:
        """Whether `compute_loss` normalizes over the window itself."""
        told: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return told
        by_model: bool = self.model_accepts_loss_kwargs and items is not None  # type: ignore[attr-defined]
        return by_model or self.compute_loss_func is not None  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """With each logged loss: the loss scale (where there is one) and how many steps were skipped so far."""
        if "loss" in logs and self.hosted is not None:
            inner = self.hosted.step
            logs["skipped_steps"] = int(inner.state.skipped)
            if not inner.rule.is_off:
                logs["loss_scale"] = float(inner.state.scale)
        super().log(logs, *rest, **options)  # type: ignore[misc]


class MixedPrecisionTrainer(TrainsByStep, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` that trains by `mp.train_step`. See `TrainsByStep` for its two arguments of its own."""


__all__ = ["MixedPrecisionTrainer", "StepState", "TrainsByStep"]
