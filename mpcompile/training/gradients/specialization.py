"""Forward and backward for one signature of the batch, and the table of those that were compiled.

The first batch is compiled for its own sizes.  When a later one differs, the dimensions that differ become symbolic,
so that changing batch sizes cost one more compilation and not one each.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.aten.graphs import outputs_of, values_of
from mpcompile.aten.write import has_user_low_cast
from mpcompile.compiler import log_plan
from mpcompile.errors import MPCompileError, TrainingError
from mpcompile.progress import stage
from mpcompile.runtime.inductor import roundings_kept
from mpcompile.runtime.weight_copies import WeightCopies
from mpcompile.shadows.low_buffers import LowBuffers
from mpcompile.shadows.step_shadows import ShadowSet
from mpcompile.torch_internals.patches import COMPILING
from mpcompile.torch_internals.tensors import foreach_copy
from mpcompile.training.accumulation import Layout
from mpcompile.training.distributed.gathered_weights import gather_weights
from mpcompile.training.distributed.in_joint import reduce_joint
from mpcompile.training.distributed.reduce import Reducer
from mpcompile.training.distributed.scatter import Scatterer
from mpcompile.training.gradients.batch import TENSOR, Batch
from mpcompile.training.gradients.compile import Run, compile_joint, decompositions
from mpcompile.training.gradients.forward import Forward, Input, capture, owned
from mpcompile.training.gradients.joint import Joint, trace
from mpcompile.training.gradients.refusals import refuse_gradient, refuse_hooks, refuse_masters, refuse_no_gradient
from mpcompile.training.gradients.traced_calls import calls_of
from mpcompile.training.gradients.weight_copies import lift
from mpcompile.training.identity import ModelIdentity
from mpcompile.training.plain_values import PlainValues

_REQUIRES_GRAD = operator.attrgetter("requires_grad")

# So many values of the arguments that are no tensors are compiled before a word is said.
MANY_VALUES = 8


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Tracing and compiling under a caller's `no_grad` too, and without a draw from the user's random numbers."""
    with COMPILING, torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        yield


@dataclass
class Specialization:
    """Forward and backward, ready to run.

    Fields:
      fixed: the inputs that are not of the batch, in their places (None where the batch goes).
      args: (place, number among the batch's tensors).
      layout: what each gradient is: (parameter's name, dtype).
      buffers: the model's tensors that leading outputs replace: (output, tensor).
      writes: inputs of the batch that the model writes to: (output, number among the batch's tensors).
      strides: how each gradient lies in memory; None until the first run.
      sent: as `layout`, of the gradients that travel, where a rank is given its share of them alone.
      saved: fakes of what the forward makes and keeps for the backward (none where it runs op by op).
      copies: FP8 copies of weights, or the rank's shares of them, which the graph that is run reads before the seed.
    """

    joint: Joint
    run: Run
    fixed: list[Any]
    args: list[tuple[int, int]]
    layout: Layout
    buffers: list[tuple[int, Tensor]]
    writes: list[tuple[int, int]]
    named: dict[str, Tensor]
    saved: list[Tensor]
    sent: Layout
    guard: str | None = None
    strides: tuple[tuple[int, ...], ...] | None = None
    reducer: Reducer | Scatterer | None = None
    copies: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        self._from, self._held = [i for i, _ in self.buffers], [held for _, held in self.buffers]
        low, written = set(self.joint.forward.low_buffers), set(map(id, self._held))
        pairs = zip(self.joint.forward.inputs, self.fixed, strict=True)
        kinds = ("buffer", "constant")
        # What the forward itself writes to is its own.
        self._low = [t for one, t in pairs if one.kind in kinds and one.name in low and id(t) not in written]
        self._low_buffers = LowBuffers()
        self._count = len(self.buffers) + len(self.writes)
        self.replayable = not (self.writes or any(one.host for one in calls_of(self.joint.forward.module).values()))

    def plain_joint(self) -> Joint:
        """Forward and backward as ATen has them, without the backend's decompositions."""
        return trace(self.joint.forward)

    def emitted_joint(self) -> Joint:
        """`plain_joint`, with what its ranks send."""
        joint = self.plain_joint()
        if self.reducer is not None:
            reduce_joint(joint, self.reducer)
            if self._gathers:
                gather_weights(joint, self.reducer)  # type: ignore[arg-type]
        return joint

    @property
    def shares(self) -> Sequence[Tensor]:
        """The rank's shares of weights, which the emitted graph reads between the forward's inputs and the seed."""
        return self.copies if self._gathers else ()

    @property
    def _gathers(self) -> bool:
        return isinstance(self.reducer, Scatterer) and self.reducer.full is not None

    def __call__(self, tensors: Sequence[Tensor], seed: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """(loss, gradients) of a batch, times the seed; buffers are brought up to date."""
        inputs = self.inputs(tensors)
        outputs = self.run([*map(inputs.__getitem__, self.joint.places), *self.copies, seed])
        count = self._count
        if self._held:
            with torch.no_grad():
                foreach_copy(self._held, [outputs[i] for i in self._from])
        for output, number in self.writes:
            tensors[number].detach().copy_(outputs[output])
        grads = outputs[count + 1 :]
        if self.strides is None:
            self.strides = tuple(g.stride() for g in grads)
        return outputs[count], grads

    def look_at_buffers(self) -> None:
        """Before a run: buffers that are read in FP16 may have grown.

        Raises:
          RuntimeFailure: MP721.
        """
        self._low_buffers.look(self._low)

    def written(self) -> list[Tensor]:
        """The model's tensors that the forward writes to."""
        return self._held

    def tensors(self) -> list[Tensor]:
        """The model's tensors, shadows and their copies that the specialization reads, at their addresses."""
        fixed = map(self.fixed.__getitem__, self.joint.places)
        return [*(one for one in fixed if isinstance(one, Tensor)), *self.copies]

    def inputs(self, tensors: Sequence[Tensor]) -> list[Any]:
        """What the joint graph reads, without the seed."""
        inputs = list(self.fixed)
        for place, number in self.args:
            inputs[place] = tensors[number]
        return inputs

    def seeded(self, inputs: Sequence[Any], seed: Tensor) -> list[Any]:
        """`inputs` with another seed where the loss region reads it."""
        kinds = [one.kind for one in self.joint.forward.inputs]
        return [seed if kind == "seed" else given for kind, given in zip(kinds, inputs, strict=True)]

    def saved_bytes(self) -> tuple[int, int]:
        """(all, those in FP32) of what the forward keeps for the backward."""
        sizes = [(t.dtype, int(t.numel()) * t.element_size()) for t in self.saved]
        return sum(size for _, size in sizes), sum(size for dtype, size in sizes if dtype == torch.float32)

    def gradients(self) -> list[Tensor]:
        """Fake tensors such as the gradients are; the compiler may lay them out as it likes."""
        fakes: list[Tensor] = values_of(outputs_of(self.joint.module)[self._count + 1 :])
        if self.strides is None:
            return fakes
        with fakes[0].fake_mode:  # type: ignore[attr-defined]
            pairs = zip(fakes, self.strides, strict=True)
            return [torch.empty_strided(f.shape, s, dtype=f.dtype, device=f.device) for f, s in pairs]

    def is_decided(self, tensors: Sequence[Tensor]) -> bool:
        """True when Python would go the way that the graph went."""
        return all(one.holds(tensors) for one in self.joint.forward.decisions)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """True when the graph is right for tensors of these sizes."""
        fakes = self.joint.forward.examples
        if not fakes:
            return True
        for number, fake in fakes.items():
            sizes = zip(fake.shape, tensors[number].shape, strict=True)
            if any(_fixed_size(traced) not in (None, given) for traced, given in sizes):
                return False
        environment = next(iter(fakes.values())).fake_mode.shape_env  # type: ignore[attr-defined]
        if self.guard is None:
            # Asked for only now: Inductor, too, adds guards.
            self.guard = environment.produce_guards_expression(list(fakes.values())) or ""
        given = [tensors[number] for number in fakes]
        return not self.guard or bool(environment.evaluate_guards_expression(self.guard, given))


def _fixed_size(size: int | torch.SymInt) -> int | None:
    """The one size that a graph is for; None where it stayed symbolic. Tracing settles some that began so."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size


@dataclass
class SpecializationCache:
    """Finds, or makes, the specialization for a batch.

    Fields:
      epoch: how often another one was made, or all became void.
    """

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    settings: Any
    backend: str
    dynamic: bool | None
    trained: Callable[[], set[int]]
    identity: ModelIdentity
    shadows: ShadowSet
    seed: Tensor
    chunk_loss: bool
    recompute: bool
    on_new: Callable[[Specialization], None]
    outside: Callable[[], dict[str, Tensor]] = dict
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    # Averages the gradients in the graph itself; None for one process, and where a window's sums are averaged.
    reducer: Reducer | Scatterer | None = None
    # Where FP8 copies of weights are held; None: the graphs make them.
    copies: WeightCopies | None = None
    epoch: int = 0
    _exact: dict[Any, Specialization] = field(default_factory=dict)
    _alike: dict[Any, list[Specialization]] = field(default_factory=dict)
    _seen: dict[Any, list[tuple[torch.Size, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = PlainValues(self.loss_fn, lambda: self.identity.modules)
        self.named = {**owned(self.model, self.loss_fn)[0], **self.outside()}

    def clear(self) -> None:
        """What was compiled is void: the model, or what of it is trained, is another."""
        self.__post_init__()
        self.epoch += 1
        for table in (self._exact, self._alike, self._seen):
            table.clear()

    def __len__(self) -> int:
        return sum(map(len, self._alike.values()))

    def __iter__(self) -> Iterator[Specialization]:
        return (specialization for alike in self._alike.values() for specialization in alike)

    def find(self, batch: Batch) -> Specialization:
        """The specialization for a batch, made now if there is none yet.

        Raises:
          CaptureError: MP101. TrainingError: MP522, MP523, MP531, MP532, MP534, MP535, MP536.
        """
        if any(map(_REQUIRES_GRAD, batch.given)):
            refuse_gradient(batch)
        modes = self.identity.modes(), torch.get_default_dtype(), self.values.number()
        kind, shapes = (batch.signature(), modes), batch.shapes()
        try:
            found = self._exact.get((kind, shapes))
        except TypeError:
            batch.refuse_objects()
            raise
        if found is None or not found.is_decided(batch.tensors):
            batch.refuse_objects()
            refuse_hooks(self.model, self.named)
            alike = self._alike.setdefault(kind, [])
            found = next((a for a in alike if a.fits(batch.tensors) and a.is_decided(batch.tensors)), None)
            if found is None:
                with compiling(), self.around():
                    found = self._make(batch, self._moving(kind, shapes))
                alike.append(found)
                self._count_values(batch, modes)
            self._exact[kind, shapes] = found
        return found

    def _count_values(self, batch: Batch, modes: Any) -> None:
        """Say so when the values of constants are what makes graph after graph."""
        alike = [tree for (tree, *_), m in self._alike if m == modes and tree == batch.tree]
        if len(alike) == MANY_VALUES:
            warnings.warn(
                str(
                    TrainingError(
                        "MP533",
                        f"the step was compiled for {MANY_VALUES} values of its arguments that are not tensors",
                        why=f"the last were {[o for o in batch.others if o is not TENSOR]!r:.200}",
                        try_="pass a number that moves as a tensor",
                    )
                ),
                stacklevel=4,
            )

    def _moving(self, kind: Any, shapes: tuple[torch.Size, ...]) -> list[tuple[int, int]]:
        """The dimensions to keep symbolic: those in which the batches so far differ."""
        seen = self._seen.setdefault(kind, [])
        seen.append(shapes)
        places = [(i, d) for i, shape in enumerate(shapes) for d in range(len(shape))]
        if self.dynamic is False:
            return []
        return places if self.dynamic else [(i, d) for i, d in places if len({s[i][d] for s in seen}) > 1]

    def _make(self, batch: Batch, moving: list[tuple[int, int]]) -> Specialization:
        refuse_masters(self.named, self.trained())
        try:
            specialization = self._captured(batch, moving)
        except MPCompileError:
            if not moving:
                raise
            specialization = self._captured(batch, [])
        self.epoch += 1
        self.on_new(specialization)
        log_plan(specialization.joint.forward.plan)
        return specialization

    def _captured(self, batch: Batch, moving: list[tuple[int, int]]) -> Specialization:
        with stage("reading the step and deciding"):
            forward = self._capture(batch, moving)
        with stage("compiling the step"):
            return self._compiled(forward)

    def _capture(self, batch: Batch, moving: list[tuple[int, int]]) -> Forward:
        compiled = self.backend != "eager"
        with self.values.capturing():
            return capture(
                self.model,
                self.loss_fn,
                batch,
                self.settings,
                self.trained(),
                self.named,
                moving,
                chunk_loss=self.chunk_loss,
                compiled=compiled,
            )

    def _compiled(self, forward: Forward) -> Specialization:
        joint = trace(forward, decompositions(self.backend))
        tensors = {**forward.constants, **owned(self.model, self.loss_fn)[1], **self.named}
        fixed = [self._fixed(one, tensors) for one in forward.inputs]
        places = [(i, one.index) for i, one in enumerate(forward.inputs) if one.kind == "arg"]
        numbers = dict(places)
        buffers_ = [(k, fixed[i]) for k, i in enumerate(joint.mutated) if i not in numbers]
        writes = [(k, numbers[i]) for k, i in enumerate(joint.mutated) if i in numbers]
        refuse_no_gradient(joint, forward)
        copies = lift(joint, fixed, self.copies) if self.copies is not None else []
        values = values_of(outputs_of(joint.module)[len(joint.mutated) + 1 :])
        layout = sent = tuple((forward.inputs[i].name, v.dtype) for i, v in zip(joint.grads, values, strict=True))
        if self.reducer is not None:
            layout, sent = reduce_joint(joint, self.reducer)
        full = isinstance(self.reducer, Scatterer) and self.reducer.full is not None
        copies += gather_weights(joint, self.reducer) if full else []  # type: ignore[arg-type]
        with roundings_kept(has_user_low_cast(forward.plan.graph)):
            run, saved = compile_joint(
                joint, self.backend, recompute=self.recompute, sends=self.reducer is not None, gathers=full
            )
        return Specialization(joint=joint, run=run, fixed=fixed, args=places, layout=layout, buffers=buffers_, writes=writes,
                        named=self.named, saved=saved, sent=sent, reducer=self.reducer, copies=copies)  # fmt: skip

    def _fixed(self, one: Input, tensors: dict[str, Tensor]) -> Any:
        if one.kind in ("arg", "seed"):
            return None if one.kind == "arg" else self.seed
        return self.shadows.get(tensors[one.name], one.dtype) if one.kind == "shadow" else tensors[one.name]
