"""The update, bound to an optimizer's live state and compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import LOW_DTYPES
from mpcompile.aten.graphs import inputs_of
from mpcompile.runtime.inductor import roundings_kept
from mpcompile.runtime.weight_copies import WeightCopies
from mpcompile.shadows.step_shadows import ShadowSet
from mpcompile.torch_internals.tensors import pytree
from mpcompile.training.accumulation import Layout
from mpcompile.training.distributed.shared_update import SharedUpdate
from mpcompile.training.distributed.shares import Shares
from mpcompile.training.gradients.compile import Run, decompositions, run_update
from mpcompile.training.loss_scale.scale import LossScale, ScaleState
from mpcompile.training.optimizer import fused_update, kernel_update
from mpcompile.training.optimizer.binding import Binding, bind, can_fuse, follow
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.low_states import LowStates, claim
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


Whole = Updater | fused_update.FusedUpdate | kernel_update.KernelUpdate
Update = Whole | SharedUpdate
Like = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class _Parts:
    """What one update is built of.

    Fields:
      halves: parameter's number -> int16 low half, of its shape; shadows: those that the update writes.
      lows: number of a state tensor that is low -> the scales of its codes, if it is codes.
      grads: examples of the gradients, in the layout's order.
    """

    spec: Spec
    binding: Binding
    halves: dict[int, Tensor]
    lows: dict[int, Tensor | None]
    shadows: list[Tensor]
    grads: Sequence[Tensor]


@dataclass
class UpdateContext:
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
    # FP8 copies of weights, which are written after each update's shadows.
    copies: WeightCopies = field(default_factory=WeightCopies)
    # A rank's shares of what is updated, where it is shared out; how often that began or ended.
    shares: Shares | None = None
    shares_epoch: int = 0
    low_states: LowStates | None = None
    # Parameters that a graph reads in FP32: these are never split.
    whole: set[int] = field(default_factory=set)
    builds: dict[Layout, int] = field(default_factory=dict)

    def build(self, layout: Layout, grads: Sequence[Tensor], *, fused: bool = True) -> Update:
        """The update for gradients of `layout`.

        Args:
          grads: examples of them.
          fused: False gives the update in elementary operations, to be exported.

        Raises:
          TrainingError: MP521, MP522.
        """
        if self.shares is None:
            return self._build(layout, grads, fused)
        self.shares.adopt()
        made = self._build(layout, grads, fused)
        self.shares.link()
        return SharedUpdate(made, self.shares)

    @property
    def updated(self) -> Optimizers:
        """The optimizers of what is updated here: the user's, or those of the rank's share."""
        return self.optimizers if self.shares is None else self.shares.optimizers

    def summed(self) -> dict[str, Tensor]:
        """What a window's sums are of, by name: parameters, or the rank's pieces of them."""
        return self.named() if self.shares is None or self.shares.of_sums else self.shares.named

    def of_rank(self, layout: Layout, strides: Any, like: Like) -> tuple[Layout, Any, Like]:
        """What reaches this rank's update of a window's sums: their layout, strides, and what gives examples."""
        if self.shares is None or self.accumulate == 1 or not self.shares.of_sums:
            return layout, strides, like
        return self.shares.layout.mine, None, self.shares.examples

    def _build(self, layout: Layout, grads: Sequence[Tensor], fused: bool) -> Whole:
        parts = self._parts(layout, grads)
        if not fused:
            return self._traced(parts, self.backend)
        # What is emitted is never run by us: nothing compiles it.
        ours = kernel_update.build(
            parts.spec,
            parts.binding,
            self.state,
            self.seed,
            parts.halves,
            parts.lows,
            parts.shadows,
            grads,
            lambda: self._aten(layout, parts, "eager"),
        )
        return ours or self._aten(layout, parts, self.backend)

    def _parts(self, layout: Layout, grads: Sequence[Tensor]) -> _Parts:
        parameters = self.named() if self.shares is None else self.shares.named
        parts: dict[int, list[int]] = {}
        for position, (name, _) in enumerate(layout):
            parts.setdefault(id(parameters[name]), []).append(position)
        with self.split.joined() if self.split is not None else contextlib.nullcontext():
            trained = {id(parameters[name]): parameters[name] for name, _ in layout}
            claim(self.optimizers, self.low_states)
            binding = bind(
                self.updated, list(trained.values()), self.low_states.take if self.low_states is not None else None
            )
        index = {id(p): i for i, p in enumerate(binding.params)}
        pairs = (self.shadows.masters, self.shadows.shadows) if self.shares is None else self.shares.shadows()
        held = [(index[id(m)], s) for m, s in zip(*pairs, strict=True) if id(m) in index]
        halves, held = self._halves(binding, held)
        lows = self._lows(binding)
        spec = Spec(
            self.rule,
            tuple(tuple(parts[id(p)]) for p in binding.params),
            tuple((i, s.dtype) for i, s in held),
            self.max_grad_norm,
            self.added,
            tuple(halves),
            None if self.shares is None else self.shares.ranks,
            self.low_states.kind if self.low_states is not None else "fp32",
            tuple(lows),
        )
        return _Parts(spec, binding, halves, lows, [shadow for _, shadow in held], grads)

    def _aten(self, layout: Layout, parts: _Parts, backend: str) -> Updater | fused_update.FusedUpdate:
        """The update in ATen's operations."""
        # A fused kernel holds betas and weight decay as constants: a schedule that moves them gets the traced update.
        self.builds[layout] = self.builds.get(layout, 0) + 1
        often = self.builds[layout] > MOST_FUSED or parts.halves or parts.lows
        binding = parts.binding
        if not often and can_fuse(self.updated, binding.params) and fused_update.serves(binding):
            binding.fused = True
            return fused_update.build(parts.spec, binding, self.state, self.seed, parts.shadows, parts.grads, backend)
        return self._traced(parts, backend)

    def _lows(self, binding: Binding) -> dict[int, Tensor | None]:
        """The numbers of the binding's state tensors that are low, with the scales of those that are codes."""
        if self.low_states is None:
            return {}
        places = ((n, self.low_states.place(binding.params[i], key)) for n, (i, key) in enumerate(binding.tensors))
        return {number: place[0] for number, place in places if place is not None}

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

    def _traced(self, parts: _Parts, backend: str) -> Updater:
        spec, binding, shadows = parts.spec, parts.binding, parts.shadows
        now = binding.numbers()
        numbers = torch.tensor(now, dtype=torch.float64, device=self.seed.device)
        given = Operands(
            numbers,
            self.state,
            [s.value for s in binding.shared],
            binding.params,
            binding.state_tensors(),
            list(parts.halves.values()),
            [scales for scales in parts.lows.values() if scales is not None],
            list(parts.grads),
        )
        bases = [s.base for s in binding.shared]
        # A kernel that finds a block's scale, stores it in place and decodes again would decode by the new one.
        backend = "eager" if parts.lows else backend

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
