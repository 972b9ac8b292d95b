"""The training step: forward, backward and update, emitted as one graph and run without asking the device anything.

`TrainStep` owns what lives between steps (loss scale, gradient buffers, shadows) and what is compiled: one forward and
backward per signature of the batch (`Artefact`), one update per set of gradients.  Everything it does per step is a
fixed number of calls, however many parameters there are.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mpcompile.aten.capture import autocast_off
from mpcompile.errors import TrainingError
from mpcompile.hardware import settle_policy
from mpcompile.shadows.step_shadows import ShadowSet
from mpcompile.training.accumulation import Layout, Window
from mpcompile.training.cuda_graph import Replays, Run
from mpcompile.training.distributed.ranks import find_ranks, plain
from mpcompile.training.distributed.team import Team, facts_of
from mpcompile.training.emitted.weave import Emitted
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.gradients.forward import OUTSIDE
from mpcompile.training.gradients.joint import Joint
from mpcompile.training.gradients.specialization import Artefact, Artefacts, compiling
from mpcompile.training.identity import ModelIdentity
from mpcompile.training.inspection import Inspection, Like
from mpcompile.training.loss_scale.floor_monitor import FloorWatch
from mpcompile.training.loss_scale.scale import LossScale
from mpcompile.training.optimizer.build import Plan, Update
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.monitor import OptimizerWatch, Seen
from mpcompile.training.optimizer.split import SplitMasters
from mpcompile.training.options import check_options
from mpcompile.training.result import StepResult
from mpcompile.training.saved_step import SavedStep
from mpcompile.training.skipped_buffers import SkippedBuffers
from mpcompile.training.windows import Windows


class TrainStep(SavedStep, Windows, Inspection):
    """`mp.train_step(optimizer, …)`: one call is one (micro)batch.

    Args:
      owner: the `MixedPrecisionModule`.
      optimizer: any dense `torch.optim` optimizer, a host's wrapper around one (it is taken off), or a list of them on
        one loss: one norm, one clip, one skip for all. Parameters that the model does not own are trained where the
        loss reads them.
      loss_fn: ``loss_fn(model, *args, **kwargs) -> scalar``; without it the model's output is or has the loss.
      scale: "auto" (dynamic for FP16, none for BF16), a number, or a `LossScale`.
      max_grad_norm: clip the unscaled gradients to this global norm.
      accumulate: calls per update; gradients are averaged over them.
      masters: "full" (the model's FP32 parameters) or "split" (BF16 shadow and 16 low bits).
      backend: "inductor" or "eager"; the module's own by default.
      cuda_graph: "auto" captures the step in a CUDA graph where shapes are static.
      chunk_loss: take the loss of a large vocabulary in chunks of rows, so that its logits are never held whole.
      recompute: make cheap chains (an activation, a normalization's output) again in the backward instead of keeping them:
        less memory, and on CUDA a longer step. "auto" does so on a CPU alone, where it costs nothing (decision 0014).
      process_group, mesh: the ranks that train together, each with a share of the batch: a process group, or a mesh of one
        dimension. A DistributedDataParallel inside of the wrapper is known by itself.

    Raises:
      TrainingError: MP5xx.
    """

    def __init__(
        self,
        owner: Any,
        optimizer: Any,
        loss_fn: Callable[..., Any] | None = None,
        *,
        scale: str | float | LossScale = "auto",
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        masters: Literal["full", "split"] = "full",
        backend: str | None = None,
        cuda_graph: Literal["auto"] | bool = "auto",
        chunk_loss: bool = True,
        recompute: Literal["auto"] | bool = "auto",
        process_group: Any = None,
        mesh: Any = None,
    ) -> None:
        given: dict[str, Any] = {
            "scale": scale,
            "max_grad_norm": max_grad_norm,
            "accumulate": accumulate,
            "masters": masters,
            "backend": backend,
            "cuda_graph": cuda_graph,
            "chunk_loss": chunk_loss,
            "recompute": recompute,
            "process_group": process_group,
            "mesh": mesh,
        }
        self._made_of = owner, optimizer, loss_fn, given
        self.model, self.optimizer, self.backend = plain(owner.model), optimizer, backend or owner.backend
        self.optimizers = Optimizers(optimizer)
        self.optimizers.refuse_untrained(self.model.parameters() if loss_fn is None else None)
        self.device = self._where()
        self.policy = settle_policy(owner.settings.policy, self.device.type)
        check_options(self.policy.low, **{**given, "backend": self.backend}, loss_fn=loss_fn)
        accumulate = int(accumulate)
        told = find_ranks(owner.model, process_group, mesh, self.device)
        self.team = Team(told, self.policy.reduce == "low", accumulate)
        self.team.check()
        self.ranks, self.sums_reducer, added = self.team.ranks, self.team.of_sums, accumulate * self.team.size
        self.identity = ModelIdentity([self.model, loss_fn], self.optimizers.params)
        self.rule = LossScale.of(scale, self.policy.low)
        self.state = self.rule.initial(self.device)
        self.watch = OptimizerWatch(self.optimizers)
        self._window = Window(accumulate, self.policy.grads == "low")
        seed, shadows = self.state.scale * (1.0 / added), ShadowSet()
        self.plan = Plan(
            optimizers=self.optimizers,
            named=lambda: self.artefacts.named,
            rule=self.rule,
            state=self.state,
            seed=seed,
            shadows=shadows,
            backend=self.backend,
            max_grad_norm=max_grad_norm,
            accumulate=accumulate,
            added=added,
            split=SplitMasters(self.model, self.optimizers, self.watch) if masters == "split" else None,
        )
        self.artefacts = Artefacts(
            model=self.model,
            loss_fn=loss_fn,
            settings=owner.settings,
            backend=self.backend,
            dynamic=owner.dynamic,
            trained=self._trained,
            identity=self.identity,
            shadows=shadows,
            seed=seed,
            chunk_loss=chunk_loss,
            recompute=self.device.type == "cpu" if recompute == "auto" else recompute,
            on_new=self._on_new,
            outside=self._outside,
            around=self.plan.split.joined if self.plan.split is not None else contextlib.nullcontext,
            reducer=self.team.in_graph,
        )
        self._replays = Replays(False if self.backend == "eager" else cuda_graph, self.device)
        self._updaters: dict[Any, Update] = {}
        self._buffers = SkippedBuffers(self.ranks)
        self._floor = FloorWatch(self.rule, self.state)
        self._last: tuple[Artefact, Layout, Like] | None = None
        self._emitted: dict[Any, tuple[Emitted, Joint]] = {}
        self._moves = 0
        self._no, self._yes = (torch.tensor(value, device=self.device) for value in (False, True))
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
        self.follow()
        batch = Batch(args, kwargs)
        artefact = self.artefacts.find(batch)
        self.team.agree(artefact.layout, lambda: facts_of(self))
        self.plan.shadows.bring_up_to_date()
        self._buffers.remember(artefact, artefact.written(), first=self._window.count == 0)
        if self.plan.accumulate == 1:
            self._last = artefact, artefact.layout, artefact.gradients
            result = self._whole(artefact, batch)
        else:
            result = self._in_window(artefact, batch)
        if artefact.writes:
            batch.write_back()
        if self._log is not None:
            self._log.note(result, result.stepped is not self._no, (args, kwargs))
        return result

    def follow(self) -> bool:
        """Take in what became of the model and of the optimizers since the last call; True when graphs are void.

        Raises:
          TrainingError: MP525, MP535, MP522 (the model is on another device).
        """
        self.team.check()
        self.optimizers.refuse()
        seen = self.watch.look()
        self._moves += Seen.NUMBERS in seen
        renewed = self.identity.changed() or Seen.PARAMS in seen
        if renewed:
            self._renew()
        elif Seen.GROUPS in seen:
            self._forget_updates()
        return renewed or Seen.GROUPS in seen

    def _renew(self) -> None:
        """What was compiled is of other tensors, modules or hooks than there are now: make it anew."""
        if self._where() != self.device:
            raise TrainingError(
                "MP522",
                f"the model was moved from {self.device} to {self._where()}",
                why="the step's loss scale, sums and graphs are where it was",
                try_="make another step: mp.train_step(optimizer, …), and load this one's state_dict()",
            )
        before = self.artefacts.named
        if self.plan.split is not None:
            self.plan.split.drop_replaced()
        self.artefacts.shadows = self.plan.shadows = ShadowSet()
        self.artefacts.clear()
        self._buffers.clear()
        self.identity.take()
        named = self.artefacts.named
        self._window.forget([name for name, held in before.items() if named.get(name) is not held])
        self._forget_updates()

    def _in_window(self, artefact: Artefact, batch: Batch) -> StepResult:
        if artefact.layout not in self._window:
            self._window.prepare(artefact.layout, self.artefacts.named, list(map(id, self.optimizers.params())))
            self._forget_updates()

        def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            loss, grads = artefact(tensors, self.plan.seed)
            self._window.add(artefact.layout, grads)
            return (loss,)

        sums = list(self._window.sums.values())
        key = id(artefact), self._window.count == 0, batch.shapes()
        call = self._replayed(artefact, key, run, batch.tensors, lambda: [*artefact.tensors(), *sums])
        (loss,) = call(batch.tensors)
        self._window.note(artefact.layout)
        self._recent = artefact
        if not self._window.full:
            return self._not_yet(loss)
        return self._close(loss)

    def _replayed(
        self, artefact: Artefact, key: tuple[Any, ...], run: Run, tensors: Sequence[Tensor], fixed: Like
    ) -> Run:
        """`run`, or its replay. A recording reads a copy of the batch: what the model writes to it would be lost."""
        return run if artefact.writes else self._replays.find(key, run, tensors, fixed)

    def _written(self, updater: Update) -> list[Tensor]:
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

    def _updater(self, layout: Layout, strides: Any, like: Like) -> Update:
        """The update for gradients of `layout`, its numbers (learning rates …) as the groups have them now."""
        seen = self.watch.look() | self.watch.look_at_state()
        self._moves += Seen.NUMBERS in seen
        if seen & ~Seen.NUMBERS:
            self._forget_updates()
        updater = self._updaters.get((layout, strides))
        if updater is None or not (updater.epoch == self._moves or updater.holds()):
            updater = self._build(layout, strides, like)
        updater.epoch = self._moves
        if any(counters.ran is None or counters.ran() is not updater for counters in self.watch.counters):
            updater.binding.resync()
            for counters in self.watch.counters:
                counters.ran = weakref.ref(updater)
        return updater

    def _build(self, layout: Layout, strides: Any, like: Like) -> Update:
        with compiling():
            updater = self.plan.build(layout, like())
        if self.watch.settle() & Seen.COUNTERS:
            # Parameters that moved together part here: updates that took their counters for one are void.
            self._forget_updates()
        self._after_split()
        replaced = self._updaters.get((layout, strides))
        self._updaters[layout, strides] = updater
        if replaced is not None:
            self._replays.forget(id(replaced))
        return updater

    def _forget_updates(self) -> None:
        self._updaters.clear()
        self._emitted.clear()
        self._replays.clear()

    def _before_update(self) -> None:
        """Run the optimizers' own hooks, before the groups' numbers are read: a hook may set them."""
        with self.watch.own():
            for one in self.optimizers:
                for hook in one._optimizer_step_pre_hooks.values():
                    hook(one, (), {})

    def _updated(self, updater: Update, run: Callable[[], Sequence[Tensor]]) -> StepResult:
        """Run what ends with an update, and the optimizer's own hooks after it."""
        loss, finite, norm, scale = run()
        self._buffers.settle(finite)
        # Compiled code raises no version; other shadows of these masters, and autograd, go by it.
        torch.autograd.graph.increment_version(updater.binding.params)
        self.plan.shadows.note_update()
        self.optimizers.note_step()
        for counters in self.watch.counters:
            counters.note()
        with self.watch.own():
            for one in self.optimizers:
                for hook in one._optimizer_step_post_hooks.values():
                    hook(one, (), {})
        self._floor.look()
        return StepResult(loss, finite, finite, scale, norm)

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
            self._after_split()

    def _on_new(self, artefact: Artefact) -> None:
        """Another graph: updates may lack its shadows, and what it reads in FP32 cannot be split."""
        self._forget_updates()
        pairs = zip(artefact.joint.forward.inputs, artefact.fixed, strict=True)
        self.plan.whole |= {id(held) for one, held in pairs if one.kind == "param"}
        if self.plan.split is not None:
            self.plan.split.keep_only({id(p) for p in self.model.parameters()} - self.plan.whole)
        self._after_split()

    def _after_split(self) -> None:
        """Splitting gives parameters another type: that is no change from outside."""
        if self.plan.split is not None:
            self.identity.take()

    def _where(self) -> torch.device:
        """Where the model lives; one without tensors, where its optimizer's do."""
        tensors = itertools.chain(self.model.parameters(), self.model.buffers(), self.optimizers.params())
        return next((t.device for t in tensors), torch.device("cpu"))

    def _trained(self) -> set[int]:
        """Ids of the parameters that the optimizers update."""
        return {id(p) for p in self.optimizers.params() if p.requires_grad}

    def _outside(self) -> dict[str, Tensor]:
        """What the optimizers hold and neither the model nor the loss owns, by names of their own."""
        owned = {id(t) for t in self.identity.tensors_of_modules()}
        groups = enumerate(self.optimizers.groups)
        pairs = ((f"{OUTSIDE}{g}.{i}", p) for g, group in groups for i, p in enumerate(group["params"]))
        return {name: p for name, p in pairs if id(p) not in owned}
