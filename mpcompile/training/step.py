"""The training step: forward, backward and update, emitted as one graph and run without asking the device anything.

`TrainStep` owns what lives between steps (loss scale, gradient buffers, shadows) and what is compiled: one forward and
backward per signature of the batch (`Artefact`), one update per set of gradients.  Everything it does per step is a
fixed number of calls, however many parameters there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from mpcompile.aten.capture import autocast_off
from mpcompile.errors import TrainingError, page
from mpcompile.hardware import settle_policy
from mpcompile.shadows.step_shadows import ShadowSet
from mpcompile.training.accumulation import Layout, Window
from mpcompile.training.cuda_graph import Replays, Run
from mpcompile.training.emitted.weave import Emitted, emit, origins, precision_graph
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.gradients.joint import Joint
from mpcompile.training.gradients.specialization import Artefact, Artefacts, compiling
from mpcompile.training.loss_scale.floor_monitor import FloorWatch
from mpcompile.training.loss_scale.overflow import Overflow, explain
from mpcompile.training.loss_scale.scale import LossScale, ScaleState, from_dict, to_dict
from mpcompile.training.optimizer.build import Plan, Updater
from mpcompile.training.optimizer.fused_update import FusedUpdate
from mpcompile.training.optimizer.monitor import OptimizerWatch
from mpcompile.training.optimizer.split import SplitMasters
from mpcompile.training.options import check_options
from mpcompile.training.result import StepResult
from mpcompile.training.skipped_buffers import SkippedBuffers

page(
    "MP542",
    "A step that has not run yet",
    "The emitted graph, its report and its exports are those of a batch; none has been seen.",
    "Call the step once.",
)


Like = Callable[[], Sequence[Tensor]]


class TrainStep:
    """`mp.train_step(optimizer, …)`: one call is one (micro)batch.

    Args:
      owner: the `MixedPrecisionModule`.
      optimizer: any dense `torch.optim` optimizer on the model's parameters.
      loss_fn: ``loss_fn(model, *args, **kwargs) -> scalar``; without it the model's output is or has the loss.
      scale: "auto" (dynamic for FP16, none for BF16), a number, or a `LossScale`.
      max_grad_norm: clip the unscaled gradients to this global norm.
      accumulate: calls per update; gradients are averaged over them.
      masters: "full" (the model's FP32 parameters) or "split" (BF16 shadow and 16 low bits).
      backend: "inductor" or "eager"; the module's own by default.
      cuda_graph: "auto" captures the step in a CUDA graph where shapes are static.
      chunk_loss: take the loss of a large vocabulary in chunks of rows, so that its logits are never held whole.
      remake: make cheap chains (an activation, a normalization's output) again in the backward instead of keeping them:
        less memory, and on CUDA a longer step. "auto" does so on a CPU alone, where it costs nothing (decision 0014).

    Raises:
      TrainingError: MP5xx.
    """

    def __init__(
        self,
        owner: Any,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Any] | None = None,
        *,
        scale: str | float | LossScale = "auto",
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        masters: Literal["full", "split"] = "full",
        backend: str | None = None,
        cuda_graph: Literal["auto"] | bool = "auto",
        chunk_loss: bool = True,
        remake: Literal["auto"] | bool = "auto",
    ) -> None:
        self.model, self.optimizer, self.policy = owner.model, optimizer, owner.settings.policy
        self.device = next(p.device for p in self.model.parameters())
        self.backend = backend or owner.backend
        self.policy = settle_policy(owner.settings.policy, self.device.type)
        options = {"backend": self.backend, "accumulate": accumulate, "masters": masters}
        check_options(self.policy.low, **options, cuda_graph=cuda_graph, remake=remake)
        if not self._trained() & {id(p) for p in self.model.parameters()}:
            raise TrainingError(
                "MP522",
                f"the {type(optimizer).__name__} holds no parameter of the model that is trained",
                try_=f"{type(optimizer).__name__}(model.parameters(), …)",
            )
        self.rule = LossScale.of(scale, self.policy.low)
        self.state: ScaleState = self.rule.initial(self.device)
        seed, shadows = self.state.scale * (1.0 / accumulate), ShadowSet()
        self.plan = Plan(
            self.model,
            optimizer,
            self.rule,
            self.state,
            seed,
            shadows,
            self.backend,
            max_grad_norm,
            accumulate,
            loss_fn,
        )
        self._watch = OptimizerWatch(optimizer, self.plan.counters)
        if masters == "split":
            self.plan.split = SplitMasters(self.model, optimizer, self._watch)
        self.artefacts = Artefacts(
            self.model,
            loss_fn,
            owner.settings,
            self.backend,
            owner.dynamic,
            self._trained,
            shadows,
            seed,
            chunk_loss,
            self.device.type == "cpu" if remake == "auto" else remake,
            self._on_new,
            self.plan.split.joined if self.plan.split is not None else contextlib.nullcontext,
        )
        self._replays = Replays(False if self.backend == "eager" else cuda_graph, self.device)
        self._updaters: dict[Any, Updater | FusedUpdate] = {}
        self._current: Updater | FusedUpdate | None = None
        self._window = Window(accumulate, self.policy.grads == "low")
        self._buffers = SkippedBuffers()
        self._floor = FloorWatch(self.rule, self.state)
        self._last: tuple[Artefact, Layout, Like] | None = None
        self._emitted: dict[Any, tuple[Emitted, Joint]] = {}
        self._no = torch.zeros((), dtype=torch.bool, device=self.device)
        self._yes = torch.ones((), dtype=torch.bool, device=self.device)
        self._nan = torch.full((), float("nan"), device=self.device)

    def __call__(self, *args: Any, **kwargs: Any) -> StepResult:
        """Run one (micro)batch; update the masters at the end of the window.

        The step holds its own casts: an ambient autocast, `no_grad` or `inference_mode` changes nothing.
        """
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(self.device.type):
            with torch.inference_mode(False), autocast_off():
                return self._call(args, kwargs)
        return self._call(args, kwargs)

    def _call(self, args: Any, kwargs: Any) -> StepResult:
        if self._watch.regrouped():
            self._forget_updates()
            self.artefacts.clear()
            self._buffers.clear()
        batch = Batch(args, kwargs)
        artefact = self.artefacts.find(batch)
        self.plan.shadows.bring_up_to_date()
        self._buffers.remember(artefact, artefact.written(), first=self._window.count == 0)
        if self.plan.accumulate == 1:
            self._last = artefact, artefact.layout, artefact.gradients
            result = self._whole(artefact, batch)
        else:
            result = self._in_window(artefact, batch)
        if artefact.writes:
            batch.write_back()
        return result

    def _in_window(self, artefact: Artefact, batch: Batch) -> StepResult:
        if artefact.layout not in self._window:
            self._window.prepare(artefact.layout, self.artefacts.named, self._order())
            self._forget_updates()

        def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            loss, grads = artefact(tensors, self.plan.seed)
            self._window.add(artefact.layout, grads)
            return (loss,)

        sums = list(self._window.sums.values())
        key = id(artefact), self._window.count == 0, batch.shapes()
        call = self._replayed(artefact, key, run, batch.tensors, lambda: [*artefact.tensors(), *sums])
        (loss,) = call(batch.tensors)
        self._window.count += 1
        if not self._window.full:
            return StepResult(loss, self._no, self._yes, self.state.scale.clone(), self._nan)
        self._window.count = 0
        self._before_update()
        layout = self._window.layout()
        self._last = artefact, layout, lambda: list(self._window.sums.values())
        updater = self._updater(layout, None, lambda: sums)
        update = self._replays.find(
            (id(updater),), lambda _: tuple(updater(sums)), [], lambda: [*self._written(updater), *sums]
        )
        return self._updated(updater, lambda: (loss, *update([])))

    def _replayed(
        self, artefact: Artefact, key: tuple[Any, ...], run: Run, tensors: Sequence[Tensor], fixed: Like
    ) -> Run:
        """`run`, or its replay. A recording reads a copy of the batch: what the model writes to it would be lost."""
        return run if artefact.writes else self._replays.find(key, run, tensors, fixed)

    def _written(self, updater: Updater | FusedUpdate) -> list[Tensor]:
        """What an update writes at fixed addresses; a master that only its shadow stands for is in no artefact."""
        return [*updater.binding.params, *self.plan.shadows.shadows]

    def _whole(self, artefact: Artefact, batch: Batch) -> StepResult:
        """Forward, backward and update of a batch, as a replayed CUDA graph where there is one."""
        self._before_update()
        if artefact.strides is None:
            # Only the gradients themselves show how the compiler lays them out.
            loss, grads = artefact(batch.tensors, self.plan.seed)
            updater = self._updater(artefact.layout, artefact.strides, artefact.gradients)
            return self._updated(updater, lambda: (loss, *updater(grads)))
        updater = self._updater(artefact.layout, artefact.strides, artefact.gradients)

        def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            loss, grads = artefact(tensors, self.plan.seed)
            return loss, *updater(grads)

        key = id(artefact), id(updater), batch.shapes()
        call = self._replayed(artefact, key, run, batch.tensors, lambda: [*artefact.tensors(), *self._written(updater)])
        return self._updated(updater, lambda: call(batch.tensors))

    def _updater(self, layout: Layout, strides: Any, like: Like) -> Updater | FusedUpdate:
        """The update for gradients of `layout`, its numbers (learning rates …) as the groups have them now."""
        if self._watch.disturbed():
            self._forget_updates()
        updater = self._updaters.get((layout, strides))
        if updater is None or not updater.holds():
            updater = self._build(layout, strides, like)
        if updater is not self._current:
            updater.binding.resync()
            self._current = updater
        return updater

    def _build(self, layout: Layout, strides: Any, like: Like) -> Updater | FusedUpdate:
        with compiling():
            updater = self.plan.build(layout, like())
        if self._watch.settle():
            # Parameters that moved together part here: updates that took their counters for one are void.
            self._forget_updates()
        replaced = self._updaters.get((layout, strides))
        self._updaters[layout, strides] = updater
        if replaced is not None:
            self._replays.forget(id(replaced))
        return updater

    def _forget_updates(self) -> None:
        self._updaters.clear()
        self._emitted.clear()
        self._replays.clear()
        self._current = None

    def _before_update(self) -> None:
        """Run the optimizer's own hooks, before the groups' numbers are read: a hook may set them."""
        with self._watch.own():
            for hook in self.optimizer._optimizer_step_pre_hooks.values():
                hook(self.optimizer, (), {})

    def _updated(self, updater: Updater | FusedUpdate, run: Callable[[], Sequence[Tensor]]) -> StepResult:
        """Run what ends with an update, and the optimizer's own hooks after it."""
        loss, finite, norm, scale = run()
        self._buffers.settle(finite)
        # Compiled code raises no version; other shadows of these masters, and autograd, go by it.
        torch.autograd.graph.increment_version(updater.binding.params)
        self.plan.shadows.note_update()
        # What schedulers look for before they step.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        with self._watch.own():
            for hook in self.optimizer._optimizer_step_post_hooks.values():
                hook(self.optimizer, (), {})
        self._floor.look()
        return StepResult(loss, finite, finite, scale, norm)

    def state_dict(self) -> dict[str, Any]:
        """Loss scale (every field, and GradScaler's five keys) and the open window. Reads the device."""
        return {**to_dict(self.rule, self.state), "window": self._window.state()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, or what a `torch.amp.GradScaler` did.

        Raises:
          TrainingError: MP501, when GradScaler's five keys are not all there.
        """
        rule, state = from_dict(saved, self.rule)
        for mine, value in zip(self.state, state, strict=True):
            mine.fill_(value)
        self.plan.seed.copy_(self.state.scale * (1.0 / self.plan.accumulate))
        self._window.load(saved.get("window", {"count": 0, "sums": {}}), self.artefacts.named, self._order())
        self._forget_updates()
        self.rule = self.plan.rule = rule
        self._floor = FloorWatch(rule, self.state)

    @property
    def graph(self) -> fx.GraphModule:
        """The emitted step, as it stands after the last call: one graph; calling it runs a step.

        Its inputs are `self.emitted()[0].arguments(batch tensors)`; call it under ``torch.no_grad()``.

        Raises:
          TrainingError: MP542, before the first update.
        """
        return self.emitted()[0].module

    def emitted(self) -> tuple[Emitted, Joint]:
        """The emitted step with its live inputs, and the joint graph that it was woven from."""
        artefact, layout, like = self._latest()
        updater = self._updater(layout, artefact.strides if self.plan.accumulate == 1 else None, like)
        key = id(artefact), id(updater)
        if key not in self._emitted:
            window = self._window.sums if self.plan.accumulate > 1 else None
            with compiling():
                self._emitted = {key: emit(artefact, updater, window)}
        return self._emitted[key]

    @property
    def compile_seconds(self) -> float:
        """Seconds that the passes took for the graphs compiled so far."""
        return sum(artefact.joint.forward.plan.seconds for artefact in self.artefacts)

    @property
    def saved_bytes(self) -> tuple[int, int]:
        """(all, those in FP32): what the last call's forward kept for its backward, parameters and shadows apart.

        Known where forward and backward are compiled; zero with backend="eager".

        Raises:
          TrainingError: MP542, before the first update.
        """
        return self._latest()[0].saved_bytes()

    def export_onnx(self, path: Any) -> Any:
        """Write the step of the last batch as one plain ONNX model, whose state goes in and comes out.

        Raises:
          TrainingError: MP542. OnnxError: MP602, MP603 (nothing is written), MP607, MP608.
        """
        from mpcompile.onnx.export.whole_step import export_step

        return export_step(self, self._latest()[0], path)

    def report(self) -> Any:
        """What was decided for each node of the emitted step, and why. See `mpcompile.report.model.Report`."""
        from mpcompile.report.model import build_report

        emitted, joint = self.emitted()
        plan = joint.forward.plan
        return build_report(precision_graph(emitted, joint), plan.policy, plan.row, steps=plan.steps)

    def explain_overflow(self, *args: Any, **kwargs: Any) -> Overflow | None:
        """Run a batch again, node by node, and name the first node that makes a non-finite number; None if none does.

        The run is made with the loss scale before the last back-off, then with the present one. Nothing is changed:
        no weight, no state, no random number. Dropout draws anew, so name the batch of the step that was skipped.
        """
        batch = Batch(args, kwargs)
        artefact = self.artefacts.find(batch)
        with compiling():
            joint = artefact.plain_joint()
        with torch.random.fork_rng(), torch.no_grad():
            inputs = [t.clone() if isinstance(t, Tensor) else t for t in artefact.inputs(batch.tensors)]
            names = origins(joint)
            for factor in (1.0 / self.rule.backoff, 1.0) if self.rule.kind == "dynamic" else (1.0,):
                found = explain(joint, artefact.seeded(inputs, self.plan.seed * factor), self.plan.seed * factor, names)
                if found is not None:
                    return found
        return None

    @contextlib.contextmanager
    def full_masters(self) -> Iterator[None]:
        """With ``masters="split"``: the model's parameters are FP32 inside, for use apart from the step."""
        with self.plan.split.joined() if self.plan.split is not None else contextlib.nullcontext():
            yield

    def join_masters(self) -> None:
        """With ``masters="split"``: the model's parameters are FP32 from here on, until the step is called again."""
        if self.plan.split is not None:
            self.plan.split.keep_only(set())
            self._forget_updates()

    def _latest(self) -> tuple[Artefact, Layout, Like]:
        """What the last update ran.

        Raises:
          TrainingError: MP542.
        """
        if self._last is None:
            raise TrainingError("MP542", "the step has no graph yet", try_="call it once with a batch")
        return self._last

    def _on_new(self, artefact: Artefact) -> None:
        """Another graph: updates may lack its shadows, and what it reads in FP32 cannot be split."""
        self._forget_updates()
        pairs = zip(artefact.joint.forward.inputs, artefact.fixed, strict=True)
        self.plan.whole |= {id(held) for one, held in pairs if one.kind == "param"}
        if self.plan.split is not None:
            self.plan.split.keep_only({id(p) for p in self.model.parameters()} - self.plan.whole)

    def _trained(self) -> set[int]:
        """Ids of the parameters that the optimizer updates."""
        return {id(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}

    def _order(self) -> list[int]:
        """Ids of the parameters, as the optimizer lists them."""
        return [id(p) for group in self.optimizer.param_groups for p in group["params"]]
