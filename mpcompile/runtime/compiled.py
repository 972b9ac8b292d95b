"""What Dynamo's bytecode calls: a compiled graph with its shadows brought up to date first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpcompile.errors import RuntimeFailure
from mpcompile.shadows.low_buffers import LowBuffers
from mpcompile.shadows.low_gradients import use_shadows
from mpcompile.shadows.table import SHADOWS, ShadowGroup
from mpcompile.torch_internals.groups import active_ddp
from mpcompile.torch_internals.tensors import FakeTensor, is_batched


class CompiledGraph:
    """What Dynamo's bytecode calls: the inner graph, with its shadows brought up to date first.

    `parameters` receives the ids of those that the graph is first called with; `lifted` are the numbers of the shadows
    that the graph is differentiated by, in groups whose gradients are cast together;
    `buffers` are the places of those that the graph reads in FP16.
    """

    # Calls of all graphs so far: a call of a model that leaves it as it was ran none.
    runs = 0

    def __init__(
        self,
        inner: Callable[..., Any],
        shadows: list[tuple[int, torch.dtype]],
        parameters: set[int],
        lifted: Sequence[Sequence[int]] = (),
        *,
        differentiable_twice: bool,
        buffers: Sequence[int] = (),
    ):
        self.inner, self.differentiable_twice = inner, differentiable_twice
        self.parameters: set[int] | None = parameters
        self.places = [place for place, _ in shadows]
        self.shadows = ShadowGroup(SHADOWS, [dtype for _, dtype in shadows])
        self.buffers, self.low_buffers = list(buffers), LowBuffers()
        self.lifted = [(group, [self.places[number] for number in group]) for group in lifted]

    def __call__(self, *args: Any) -> Any:
        CompiledGraph.runs += 1
        if self.parameters is not None:
            self.parameters.update(id(a) for a in args if isinstance(a, torch.nn.Parameter))
            self.parameters = None
        masters = [args[place] for place in self.places]
        shadows = self._shadows(masters) if masters else []
        if self.lifted and torch.is_grad_enabled():
            shadows = list(shadows)
            low = active_ddp() is None
            for group, places in self.lifted:
                used = use_shadows([args[place] for place in places], [shadows[number] for number in group], low=low)
                for number, shadow in zip(group, used, strict=True):
                    shadows[number] = shadow
        outputs = self._run(args, shadows) if self.buffers else self.inner(*args, *shadows)
        if not self.differentiable_twice and torch.is_grad_enabled():
            _refuse_double_backward(outputs)
        return outputs

    def _run(self, args: Sequence[Any], shadows: Sequence[Any]) -> Any:
        """The graph, with a look at the buffers that it reads in FP16."""
        held = [args[place] for place in self.buffers]
        if isinstance(held[0], FakeTensor):
            return self.inner(*args, *shadows)
        self.low_buffers.look(held)
        outputs = self.inner(*args, *shadows)
        self.low_buffers.note(held)
        return outputs

    def _shadows(self, masters: list[Any]) -> list[Any]:
        """The shadows of `masters`; stand-ins where Dynamo looks at what its pieces give (a bucket of gradients each)."""
        if isinstance(masters[0], FakeTensor):
            return [torch.empty_like(m, dtype=d) for m, d in zip(masters, self.shadows.dtypes, strict=True)]
        return self.shadows.get(masters)


def _refuse_double_backward(outputs: Any) -> None:
    """Say clearly, when a backward is asked to build a graph or to run for many gradients, that the compiled one cannot."""
    for output in outputs if isinstance(outputs, (list, tuple)) else (outputs,):
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            output.grad_fn.register_prehook(_check_no_graph)
            return


def _check_no_graph(grads: Any) -> None:
    if any(map(is_batched, grads)):
        raise RuntimeFailure(
            "MP706",
            "a batched backward (is_grads_batched=True, jacobian(vectorize=True)) through a compiled graph",
            why="compiled kernels take one gradient at a time",
            try_='mpcompile(model, ..., backend="eager"), or a backward for each gradient',
        )
    # The engine runs hooks in the grad mode of the backward: enabled means create_graph=True.
    if torch.is_grad_enabled():
        raise RuntimeFailure(
            "MP701",
            "double backward (create_graph=True) through a compiled graph",
            why="AOTAutograd, which made the compiled backward, has no double backward",
            try_='mpcompile(model, ..., backend="eager")',
        )
