"""The update, bound to an optimizer's live state and compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpcompile.aten.facts import LOW_DTYPES
from mpcompile.aten.graphs import inputs_of
from mpcompile.runtime.inductor import roundings_kept
from mpcompile.shadows.step_shadows import ShadowSet
from mpcompile.training.accumulation import Layout
from mpcompile.training.gradients.compile import Run, decompositions, run_update
from mpcompile.training.loss_scale.scale import LossScale, ScaleState
from mpcompile.training.optimizer import fused_update as fused
from mpcompile.training.optimizer import kernel_update
from mpcompile.training.optimizer.binding import Binding, bind, can_fuse, follow
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.split import SplitMasters
from mpcompile.training.optimizer.traced_update import InPlace, Operands, Spec, in_place, trace

# So often a fused update may be made again for other numbers.
MOST_FUSED = 3


@dataclass
class Updater:
    """One update, ready to run: every input in its place but the gradients.

    Fields:
      epoch: the step's count of moves of the groups' numbers that were taken in.
    """

    binding: Binding
    make: Callable[[], InPlace]
    run: Run
    before: list[Any]
    after: list[Any]
    numbers: Tensor
    seen: list[float]
    seed: Tensor
    scale: ScaleState
    epoch: int = -1

    def __call__(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """(finite, norm, scale) after the update; everything else is written in place."""
        return self.run([*self.before, *grads, *self.after])

    def emit(self) -> tuple[fx.GraphModule, list[Tensor | int]]:
        """The update's graph, and what each input is: a live tensor, or the number of a gradient."""
        module = self.make().module
        count = len(inputs_of(module)) - len(self.before) - len(self.after)
        return module, [*self.before, *range(count), *self.after]

    def holds(self) -> bool:
        """Take in the groups' numbers; False when they need another graph (a weight decay that began, say)."""
        seen = follow(self.binding, self.seen, self.numbers, range(len(self.seen)))
        self.seen = self.seen if seen is None else seen
        return seen is not None


Update = Updater | fused.FusedUpdate | kernel_update.KernelUpdate


@dataclass
class Plan:
    """What all updates of one step share."""

    optimizers: Optimizers
    named: Callable[[], dict[str, Tensor]]
    rule: LossScale
    state: ScaleState
    seed: Tensor
    shadows: ShadowSet
    backend: str
    max_grad_norm: float | None
    accumulate: int
    # How many gradients are added up: of the microbatches of a window, times the ranks.
    added: int
    split: SplitMasters | None = None
    # Parameters that a graph reads in FP32: these are never split.
    whole: set[int] = field(default_factory=set)
    builds: dict[Layout, int] = field(default_factory=dict)
    # False: the update in elementary operations, to be exported.
    kernels: bool = True

    def build(self, layout: Layout, grads: Sequence[Tensor]) -> Update:
        """The update for gradients of `layout`; `grads` are examples of them.

        Raises:
          TrainingError: MP521, MP522.
        """
        parameters = self.named()
        parts: dict[int, list[int]] = {}
        for position, (name, _) in enumerate(layout):
            parts.setdefault(id(parameters[name]), []).append(position)
        with self.split.joined() if self.split is not None else contextlib.nullcontext():
            trained = {id(parameters[name]): parameters[name] for name, _ in layout}
            binding = bind(self.optimizers, list(trained.values()))
        index = {id(p): i for i, p in enumerate(binding.params)}
        held = [
            (index[id(m)], s) for m, s in zip(self.shadows.masters, self.shadows.shadows, strict=True) if id(m) in index
        ]
        halves, held = self._halves(binding, held)
        spec = Spec(
            self.rule,
            tuple(tuple(parts[id(p)]) for p in binding.params),
            tuple((i, s.dtype) for i, s in held),
            self.max_grad_norm,
            self.added,
            tuple(halves),
        )
        shadows = [shadow for _, shadow in held]

        def aten(backend: str) -> Updater | fused.FusedUpdate:
            return self._aten(layout, spec, binding, halves, shadows, grads, backend)

        # What is emitted is never run by us: nothing compiles it.
        ours = self.kernels and kernel_update.build(
            spec, binding, self.state, self.seed, halves, shadows, grads, lambda: aten("eager")
        )
        return ours or aten(self.backend)

    def _aten(
        self,
        layout: Layout,
        spec: Spec,
        binding: Binding,
        halves: dict[int, Tensor],
        shadows: list[Tensor],
        grads: Sequence[Tensor],
        backend: str,
    ) -> Updater | fused.FusedUpdate:
        """The update in ATen's operations."""
        # A fused kernel holds betas and weight decay as constants: a schedule that moves them gets the traced update.
        self.builds[layout] = self.builds.get(layout, 0) + 1
        often = self.builds[layout] > MOST_FUSED or halves
        if not often and can_fuse(self.optimizers, binding.params) and fused.serves(binding):
            binding.fused = True
            return fused.build(spec, binding, self.state, self.seed, shadows, grads, backend)
        return self._traced(spec, binding, list(halves.values()), list(grads), shadows, backend)

    def _halves(
        self, binding: Binding, held: list[tuple[int, Tensor]]
    ) -> tuple[dict[int, Tensor], list[tuple[int, Tensor]]]:
        """The low halves of the parameters that are to be split, and the shadows of those that are not."""
        if self.split is None:
            return {}, held
        halves, rest = dict[int, Tensor](), list[tuple[int, Tensor]]()
        for i, shadow in held:
            if shadow.dtype == torch.bfloat16 and id(binding.params[i]) not in self.whole:
                self.split.take(binding.params[i], shadow)
            low = self.split.low_of(binding.params[i])
            if low is None:
                rest.append((i, shadow))
            else:
                halves[i] = low
        return halves, rest

    def _traced(
        self,
        spec: Spec,
        binding: Binding,
        low: list[Tensor],
        grads: list[Tensor],
        shadows: list[Tensor],
        backend: str,
    ) -> Updater:
        now = binding.numbers()
        numbers = torch.tensor(now, dtype=torch.float64, device=self.seed.device)
        given = Operands(
            numbers, self.state, [s.value for s in binding.shared], binding.params, binding.state_tensors(), low, grads
        )
        bases = [s.base for s in binding.shared]

        def make(table: Any = None) -> InPlace:
            return in_place(trace(spec, binding, given, table), given, self.seed, bases, shadows)

        emitted = make(decompositions(backend))
        before, after = pytree.tree_leaves(given._replace(grads=[])), [self.seed, *bases, *shadows]
        # An optimizer that computes in a low type (Muon) means its roundings.
        with roundings_kept(rounds_itself(emitted.module)):
            run = run_update(emitted, backend)
        return Updater(binding, make, run, before, after, numbers, now, self.seed, self.state)


def rounds_itself(update: fx.GraphModule) -> bool:
    """True when an update computes with low values of its own; shadows are only stored."""
    made = (n for n in update.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor))
    low = (n for n in made if n.meta["val"].dtype in LOW_DTYPES)
    return any(user.target is not torch.ops.aten.copy_.default for n in low for user in n.users)
