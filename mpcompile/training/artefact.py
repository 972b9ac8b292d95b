"""Forward and backward for one signature of the batch, and the table of those that were compiled.

The first batch is compiled for its own sizes.  When a later one differs, the dimensions that differ become symbolic,
so that changing batch sizes cost one more compilation and not one each.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.errors import CaptureError
from mpcompile.training.forward import Batch, Forward, Input, capture
from mpcompile.training.graphs import outputs_of, values_of
from mpcompile.training.joint import Joint, trace
from mpcompile.training.parts import Run, decompositions, run_joint
from mpcompile.training.shadows import SHADOWS
from mpcompile.training.window import Layout

_VERSION = operator.attrgetter("_version")
_TRAINING = operator.attrgetter("training")
_REQUIRES_GRAD = operator.attrgetter("requires_grad")


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Tracing and compiling under a caller's `no_grad` too, and without a draw from the user's random numbers."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        yield


class ShadowSet:
    """The shadows that the compiled graphs read, kept equal to their masters.

    The update refreshes them; an edit of a master from outside (`load_state_dict`, in place) raises the master's
    version, which one comparison per step sees.
    """

    def __init__(self) -> None:
        self.masters: list[Tensor] = []
        self.shadows: list[Tensor] = []
        self._places: dict[tuple[int, torch.dtype], int] = {}
        self._versions: list[int] = []

    def __len__(self) -> int:
        return len(self.shadows)

    def get(self, master: Tensor, dtype: torch.dtype) -> Tensor:
        """The shadow of `master`, made now if it is new."""
        place = self._places.setdefault((id(master), dtype), len(self.shadows))
        if place == len(self.shadows):
            self.masters.append(master)
            self.shadows.append(SHADOWS.get(master, dtype))
            self._versions.append(master._version)
        return self.shadows[place]

    def bring_up_to_date(self) -> None:
        """Cast again if a master was edited since the last update."""
        if list(map(_VERSION, self.masters)) != self._versions:
            self.refresh()

    def refresh(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.shadows, self.masters)
        self.note_update()

    def note_update(self) -> None:
        """The shadows are those of the masters as they are now."""
        self._versions = list(map(_VERSION, self.masters))


@dataclass
class Artefact:
    """Forward and backward, ready to run.

    Fields:
      fixed: the inputs that are not of the batch, in their places (None where the batch goes).
      args: (place, number among the batch's tensors).
      layout: what each gradient is: (parameter's name, dtype).
      buffers: the model's tensors that the leading outputs replace.
      saved: fakes of what the forward makes and keeps for the backward (none where it runs op by op).
    """

    joint: Joint
    run: Run
    fixed: list[Any]
    args: list[tuple[int, int]]
    layout: Layout
    buffers: list[Tensor]
    named: dict[str, Tensor]
    saved: list[Tensor]
    guard: str | None = None

    def plain_joint(self) -> Joint:
        """Forward and backward as ATen has them, without the backend's decompositions."""
        return trace(self.joint.forward)

    def __call__(self, tensors: Sequence[Tensor], seed: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """(loss, gradients) of a batch, times the seed; buffers are brought up to date."""
        outputs = self.run([*self.inputs(tensors), seed])
        count = len(self.buffers)
        if count:
            torch._foreach_copy_(self.buffers, list(outputs[:count]))
        return outputs[count], outputs[count + 1 :]

    def tensors(self) -> list[Tensor]:
        """The model's tensors and shadows that the artefact reads, at their addresses."""
        return [one for one in self.fixed if isinstance(one, Tensor)]

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

    def gradients(self) -> list[Tensor]:
        """Fake tensors such as the gradients are."""
        return values_of(outputs_of(self.joint.module)[len(self.buffers) + 1 :])

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """True when the graph is right for tensors of these sizes."""
        fakes = {number: self.joint.forward.fakes[place] for place, number in self.args}
        for number, fake in fakes.items():
            sizes = zip(fake.shape, tensors[number].shape, strict=True)
            if any(_settled(traced) not in (None, given) for traced, given in sizes):
                return False
        environment = next(iter(fakes.values())).fake_mode.shape_env  # type: ignore[attr-defined]
        if self.guard is None:
            # Asked for only now: Inductor, too, adds guards.
            self.guard = environment.produce_guards_expression(list(fakes.values())) or ""
        given = [tensors[number] for number in fakes]
        return not self.guard or bool(environment.evaluate_guards_expression(self.guard, given))


def _settled(size: int | torch.SymInt) -> int | None:
    """The one size that a graph is for; None where it stayed symbolic. Tracing settles some that began so."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size


@dataclass
class Artefacts:
    """Finds, or makes, the artefact for a batch."""

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    settings: Any
    backend: str
    dynamic: bool | None
    trained: Callable[[], set[int]]
    shadows: ShadowSet
    seed: Tensor
    chunk_loss: bool
    on_new: Callable[[Artefact], None]
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    _exact: dict[Any, Artefact] = field(default_factory=dict)
    _alike: dict[Any, list[Artefact]] = field(default_factory=dict)
    _seen: dict[Any, list[tuple[torch.Size, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules = list(self.model.modules())
        self._parameters = list(self.model.parameters())
        self.named: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))

    def clear(self) -> None:
        self.__post_init__()
        for table in (self._exact, self._alike, self._seen):
            table.clear()

    def __len__(self) -> int:
        return sum(map(len, self._alike.values()))

    def __iter__(self) -> Iterator[Artefact]:
        return (artefact for alike in self._alike.values() for artefact in alike)

    def find(self, batch: Batch) -> Artefact:
        modes = tuple(map(_TRAINING, self._modules)), tuple(map(_REQUIRES_GRAD, self._parameters))
        kind, shapes = (batch.kind(), modes), batch.shapes()
        found = self._exact.get((kind, shapes))
        if found is None:
            alike = self._alike.setdefault(kind, [])
            found = next((a for a in alike if a.fits(batch.tensors)), None)
            if found is None:
                with compiling(), self.around():
                    found = self._make(batch, self._moving(kind, shapes))
                alike.append(found)
            self._exact[kind, shapes] = found
        return found

    def _moving(self, kind: Any, shapes: tuple[torch.Size, ...]) -> list[tuple[int, int]]:
        """The dimensions to keep symbolic: those in which the batches so far differ."""
        seen = self._seen.setdefault(kind, [])
        seen.append(shapes)
        places = [(i, d) for i, shape in enumerate(shapes) for d in range(len(shape))]
        if self.dynamic is False:
            return []
        return places if self.dynamic else [(i, d) for i, d in places if len({s[i][d] for s in seen}) > 1]

    def _make(self, batch: Batch, moving: list[tuple[int, int]]) -> Artefact:
        try:
            forward = self._capture(batch, moving)
        except CaptureError:
            if not moving:
                raise
            forward = self._capture(batch, [])
        artefact = self._compiled(forward)
        self.on_new(artefact)
        return artefact

    def _capture(self, batch: Batch, moving: list[tuple[int, int]]) -> Forward:
        compiled = self.backend != "eager"
        return capture(
            self.model,
            self.loss_fn,
            batch,
            self.settings,
            self.trained(),
            moving,
            chunk_loss=self.chunk_loss,
            compiled=compiled,
        )

    def _compiled(self, forward: Forward) -> Artefact:
        joint = trace(forward, decompositions(self.backend))
        tensors: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        tensors.update(self.model.named_buffers(remove_duplicate=False))
        tensors.update(forward.constants)
        fixed = [self._fixed(one, tensors) for one in forward.inputs]
        places = [(i, one.index) for i, one in enumerate(forward.inputs) if one.kind == "arg"]
        layout = tuple((forward.inputs[i].name, forward.inputs[i].dtype) for i in joint.grads)
        run, saved = run_joint(joint, self.backend)
        buffers = [fixed[i] for i in joint.mutated]
        return Artefact(joint, run, fixed, places, layout, buffers, self.named, saved)

    def _fixed(self, one: Input, tensors: dict[str, Tensor]) -> Any:
        if one.kind in ("arg", "seed"):
            return None if one.kind == "arg" else self.seed
        return self.shadows.get(tensors[one.name], one.dtype) if one.kind == "shadow" else tensors[one.name]
