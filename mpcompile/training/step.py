"""The training step: forward, backward and update, emitted as one graph and run without asking the device anything.

`TrainStep` is what users call. It owns what lives between steps (loss scale, sums of gradients, shadows) and says when
what was compiled is void; `Runner` runs a batch, `SpecializationCache` holds one forward and backward per signature of the batch,
`UpdateCache` one update per set of gradients.  Everything per step is a fixed number of calls, however many parameters
there are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from mpcompile.aten.capture import autocast_off
from mpcompile.aten.facts import TORCH_DTYPES
from mpcompile.errors import TrainingError
from mpcompile.hardware import resolve_policy
from mpcompile.shadows.step_shadows import ShadowSet
from mpcompile.training.accumulation import GradAccumulator
from mpcompile.training.cuda_graph import Recorded, Replays
from mpcompile.training.distributed.in_joint import read_whole
from mpcompile.training.distributed.ranks import find_ranks, plain
from mpcompile.training.distributed.sharing import Sharing, refuse_shard
from mpcompile.training.distributed.team import Team, facts_of
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.gradients.forward import OUTSIDE
from mpcompile.training.gradients.specialization import Specialization, SpecializationCache
from mpcompile.training.identity import ModelIdentity
from mpcompile.training.inspection import Inspection
from mpcompile.training.loss_scale.scale import LossScale
from mpcompile.training.optimizer.build import UpdateContext
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.low_states import LowStates
from mpcompile.training.optimizer.monitor import OptimizerMonitor, Seen
from mpcompile.training.optimizer.split import SplitMasters
from mpcompile.training.optimizer.update_cache import UpdateCache
from mpcompile.training.options import Options, StepOptions, check_options
from mpcompile.training.result import StepResult
from mpcompile.training.runner import Runner
from mpcompile.training.saved_step import SavedStep

# What `train_step` takes, and the model.
_SETTLED = frozenset({"model", "optimizer", "loss_fn", "policy", "backend", *StepOptions.__annotations__})


class TrainStep(SavedStep, Sharing, Recorded, Inspection):
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
      states: how the optimizer's moments are held between steps: "fp32", "bf16" or "8bit" (a scale for every 256);
        checkpoints hold FP32.
      backend: "inductor" or "eager"; the module's own by default.
      cuda_graph: "auto" captures the step in a CUDA graph where shapes are static.
      chunk_loss: take the loss of a large vocabulary in chunks of rows, so that its logits are never held whole.
      recompute: make cheap chains (an activation, a normalization's output) again in the backward instead of keeping them:
        less memory, and on CUDA a longer step. "auto" does so on a CPU alone, where it costs nothing (decision 0014).
      process_group, mesh: the ranks that train together, each with a share of the batch: a process group, or a mesh of one
        dimension. A DistributedDataParallel inside of the wrapper is known by itself.
      shard: "none": every rank updates all; "update": each updates a share (ZeRO 1), and holds masters and moments of it
        alone, 12 bytes a parameter divided by the ranks. State dicts are then calls of all ranks. "full": each holds a
        share of the weights as well (ZeRO 3); graphs gather what they read, and let it go.

    Raises:
      TrainingError: MP5xx.
    """

    def __init__(
        self,
        owner: Any,
        optimizer: Any,
        loss_fn: Callable[..., Any] | None = None,
        *,
        backend: str | None = None,
        **given: Unpack[StepOptions],
    ) -> None:
        options = Options(backend=backend, **given)
        self._made_of = owner, optimizer, loss_fn, vars(options)
        self.model, self.optimizer, self.backend = plain(owner.model), optimizer, backend or owner.backend
        self.optimizers = Optimizers(optimizer)
        self.optimizers.refuse_untrained(self.model.parameters() if loss_fn is None else None)
        self.device = self._where()
        self.policy = resolve_policy(owner.settings.policy, self.device.type)
        check_options(self.policy.low, **{**vars(options), "backend": self.backend}, loss_fn=loss_fn)
        told = find_ranks(owner.model, options.process_group, options.mesh, self.device)
        refuse_shard(options.shard, told, options.masters)
        full = TORCH_DTYPES[self.policy.low] if options.shard == "full" else None
        self.team = Team(told, self.policy.reduce == "low", int(options.accumulate), options.shard != "none", full)
        self.team.check()
        self.ranks, self.sums_reducer = self.team.ranks, self.team.of_sums
        self.identity = ModelIdentity([self.model, loss_fn], self.optimizers.params)
        self.rule = LossScale.of(options.scale, self.policy.low)
        self.state = self.rule.initial(self.device)
        self.monitor = OptimizerMonitor(self.optimizers)
        self.accumulator = GradAccumulator(int(options.accumulate), self.policy.grads == "low")
        self.context = self._context(options)
        self.specializations = self._specializations(loss_fn, options)
        group = self.ranks.group if self.ranks is not None else None
        replays = Replays(False if self.backend == "eager" else options.cuda_graph, self.device, group=group)
        self.updates = UpdateCache(
            context=self.context,
            monitor=self.monitor,
            specializations=self.specializations,
            accumulator=self.accumulator,
            replays=replays,
            on_built=self._after_split,
        )
        self._prepare_shares()
        self.runner = Runner(self.updates, self.team, self._share_out)

    def __setattr__(self, name: str, value: Any) -> None:
        """Options are settled when the step is made: to set one later would change nothing.

        Raises:
          TrainingError: MP541.
        """
        if name in _SETTLED and "runner" in self.__dict__:
            raise TrainingError("MP541", f"step.{name} cannot be set", why="the step was made with it",
                                try_="make another step, and load this one's state_dict()")  # fmt: skip
        super().__setattr__(name, value)

    def _context(self, options: Options) -> UpdateContext:
        """What all updates share."""
        added = int(options.accumulate) * self.team.size
        return UpdateContext(
            optimizers=self.optimizers,
            named=lambda: self.specializations.named,
            rule=self.rule,
            state=self.state,
            seed=self.state.scale * (1.0 / added),
            shadows=ShadowSet(),
            backend=self.backend,
            max_grad_norm=self.optimizers.clip_norm(options.max_grad_norm),
            accumulate=int(options.accumulate),
            added=added,
            split=SplitMasters(self.model, self.optimizers, self.monitor) if options.masters == "split" else None,
            low_states=LowStates(options.states, self.optimizers, self.monitor) if options.states != "fp32" else None,
        )

    def _specializations(self, loss_fn: Callable[..., Any] | None, options: Options) -> SpecializationCache:
        """The table of forwards and backwards, empty."""
        owner, plan = self._made_of[0], self.context
        return SpecializationCache(
            model=self.model,
            loss_fn=loss_fn,
            settings=owner.settings,
            backend=self.backend,
            dynamic=owner.dynamic,
            trained=self._trained,
            identity=self.identity,
            shadows=plan.shadows,
            seed=plan.seed,
            chunk_loss=options.chunk_loss,
            recompute=self.device.type == "cpu" if options.recompute == "auto" else options.recompute,
            on_new=self._on_new,
            outside=self._outside,
            around=self._wide,
            reducer=self.team.in_graph,
            # A split master is its own shadow, and so is one in shares: an edit of it is no cast that would be counted.
            copies=plan.copies if plan.split is None and self.team.scatterer is None else None,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> StepResult:
        """Run one (micro)batch; update the masters at the end of the window.

        The step holds its own casts: an ambient autocast, `no_grad` or `inference_mode` changes nothing.
        """
        try:
            if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(self.device.type):
                with torch.inference_mode(False), autocast_off():
                    return self._call(args, kwargs)
            return self._call(args, kwargs)
        except RuntimeError as error:
            lost = self.team.lost(error)
            if lost is None:
                raise
            raise lost from error

    def _call(self, args: Any, kwargs: Any) -> StepResult:
        self.follow()
        batch = Batch(args, kwargs)
        specialization = self.specializations.find(batch)
        self.team.agree(specialization.sent, lambda: facts_of(self))
        result = self.runner.run(specialization, batch)
        if self._log is not None:
            self._log.note(result, result.stepped is not self.runner.no, (args, kwargs))
        return result

    @property
    def pending(self) -> int:
        """Microbatches that are summed in the open window, and in no update yet. Asks no device anything."""
        return self.accumulator.count

    def end_window(self) -> StepResult:
        """Update now, on the open window as it is: the last of an epoch may be short.

        Its sum is divided by `accumulate`, as by a loop that divides each loss by it. Without an open window nothing is
        done.

        Returns:
          As a call gives it; `loss` is NaN, for there is no batch.
        """
        self.follow()
        result = self.runner.end_window()
        if self._log is not None and result.stepped is not self.runner.no:
            self._log.note(result, True, None)
        return result

    def follow(self) -> bool:
        """Take in what became of the model and of the optimizers since the last call; True when graphs are void.

        Raises:
          TrainingError: MP525, MP535, MP522 (the model is on another device).
        """
        self.team.check()
        self._look_at_shares()
        self.optimizers.refuse()
        seen = self.monitor.look()
        renewed = self.identity.changed() or Seen.PARAMS in seen
        if renewed:
            self._renew()
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
        self._give_back(anew=True)
        before = self.specializations.named
        if self.context.split is not None:
            self.context.split.drop_replaced()
        self.specializations.shadows = self.context.shadows = ShadowSet()
        self.specializations.clear()
        self.context.copies.clear()
        self.runner.clear()
        self.identity.take()
        # A parameter that left the model is still the optimizer's, with the gradients that this window has of it.
        named = self.specializations.named
        names = {id(held): name for name, held in named.items()}
        moved = {name: names.get(id(held)) for name, held in before.items() if named.get(name) is not held}
        self.accumulator.follow(moved)

    @contextlib.contextmanager
    def full_masters(self) -> Iterator[None]:
        """Split masters, low states and shares are FP32 and whole inside, for use apart from the step.

        With ``shard="update"`` or ``"full"`` it is a call of all ranks; MP548 where not all come.
        """
        shares, lows = self.context.shares, self.context.low_states
        with contextlib.ExitStack() as stack:
            stack.enter_context(shares.joined() if shares is not None else self._wide())
            if lows is not None:
                stack.enter_context(lows.expanded())
            yield

    def _wide(self) -> contextlib.AbstractContextManager[None]:
        """The parameters are FP32 inside, to capture a graph of them; no rank waits for another."""
        if self.context.shares is not None:
            return self.context.shares.widened()
        return self.context.split.joined() if self.context.split is not None else contextlib.nullcontext()

    def join_masters(self) -> None:
        """As `full_masters`, from here on until the step is called again; the optimizer's state is whole too."""
        self._give_back()
        if self.context.low_states is not None:
            self.context.low_states.expand()
        if self.context.split is not None:
            self.context.split.keep_only(set())
            self._after_split()

    def _on_new(self, specialization: Specialization) -> None:
        """Another graph: updates may lack its shadows, and what it reads in FP32 cannot be split."""
        pairs = zip(specialization.joint.forward.inputs, specialization.fixed, strict=True)
        self.context.whole |= {id(held) for one, held in pairs if one.kind == "param"}
        if self.context.split is not None:
            self.context.split.keep_only({id(p) for p in self.model.parameters()} - self.context.whole)
        if self.team.scatterer is not None:
            self.team.scatterer.note(read_whole(specialization.joint))
        self._after_split()

    def _after_split(self) -> None:
        """Splitting gives parameters another type: that is no change from outside."""
        if self.context.split is not None:
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
