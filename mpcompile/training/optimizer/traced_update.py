"""The update half of a step as one functional ATen graph.

unscale -> finite? -> clip -> the optimizer's own update -> select or skip -> shadows, and the loss scale's transition.
All arithmetic is FP32; 1/scale is FP64, rounded.  A step that is skipped returns every weight, moment and counter as
it was, bit for bit.  The graph is traced once for a set of parameters; learning rates and the like are inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from mpcompile.aten.graphs import outputs_of
from mpcompile.errors import TrainingError
from mpcompile.runtime.state_codes import phase
from mpcompile.torch_internals.inductor import with_equal_nodes_merged
from mpcompile.torch_internals.tensors import DataDependentOutputException, FakeTensor, FakeTensorMode, pytree
from mpcompile.training.distributed.one_decision import decide
from mpcompile.training.distributed.ranks import Ranks
from mpcompile.training.loss_scale.scale import LossScale, ScaleState, inverse, transition
from mpcompile.training.optimizer.binding import Binding, untraceable
from mpcompile.training.optimizer.low_states import SIGNED, decode, encode
from mpcompile.training.optimizer.split import join, split
from mpcompile.training.optimizer.tensor_numbers import UndecidableError


class Operands(NamedTuple):
    """What the update reads, in the order of the graph's inputs.

    Fields:
      numbers: FP64 vector of the groups' numbers.
      scale: the loss scale's state.
      shared: 0-dim, one per `Binding.shared`.
      params, states: FP32 tensors; a split parameter is its BF16 half, and `low` the other halves (`Spec.split`).
      scales: of the states that are held in codes, in their order (`mpcompile.runtime.state_codes`).
      grads: raw gradients, still scaled, any float dtype; `Spec.parts` says whose.
    """

    numbers: Tensor
    scale: ScaleState
    shared: list[Tensor]
    params: list[Tensor]
    states: list[Tensor]
    low: list[Tensor]
    scales: list[Tensor]
    grads: list[Tensor]


class Outcome(NamedTuple):
    """What the update gives.

    Fields:
      finite: 0-dim bool; norm: 0-dim FP32, of the unscaled gradients before clipping.
      scale: the next state; seed: the next backward's seed.
      shared: 0-dim; params, states: the next values; shadows: low copies of the next params.
    """

    finite: Tensor
    norm: Tensor
    seed: Tensor
    scale: ScaleState
    shared: list[Tensor]
    params: list[Tensor]
    states: list[Tensor]
    low: list[Tensor]
    scales: list[Tensor]
    shadows: list[Tensor]


@dataclass(frozen=True)
class Spec:
    """What one update is.

    Fields:
      parts: per parameter, the positions in `grads` that are summed.
      shadows: (parameter, low dtype) of each shadow.
      accumulate: microbatches whose gradients were summed.
      split: the parameters that are given in two halves.
      ranks: among whom the gradients are shared out; None where all are here.
      states: how moments are held that are low, "bf16" or "8bit"; lows: the numbers of those state tensors.
    """

    rule: LossScale
    parts: tuple[tuple[int, ...], ...]
    shadows: tuple[tuple[int, torch.dtype], ...] = ()
    max_grad_norm: float | None = None
    accumulate: int = 1
    split: tuple[int, ...] = ()
    ranks: Ranks | None = None
    states: str = "fp32"
    lows: tuple[int, ...] = ()


def unscaled(spec: Spec, grads: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """One FP32 gradient per parameter, divided by the loss scale."""
    summed = [_sum([grads[i] for i in part]) for part in spec.parts]
    if spec.rule.is_off:
        return summed
    factor = inverse(scale)
    return [g * factor for g in summed]


def check(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(finite, norm) over all gradients: 0-dim bool, 0-dim FP32."""
    largest = [g.abs().amax() for g in grads if g.numel()]
    norms = torch.stack([torch.linalg.vector_norm(g) for g in grads])
    # Parameters without elements have gradients without any: nothing of them is infinite.
    found = torch.stack(largest) if largest else norms
    return torch.isfinite(found).all(), torch.linalg.vector_norm(norms)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` multiplies by."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def update(spec: Spec, binding: Binding, given: Operands) -> Outcome:
    """One update; traced, or run as it is. Pure: `given` is left alone."""
    grads = unscaled(spec, given.grads, given.scale.scale)
    finite, norm = check(grads)
    if spec.ranks is not None:
        broken, norms = decide(spec.ranks, ~finite, norm * given.scale.scale)
        finite, norm = (broken == 0).all(), torch.linalg.vector_norm(norms) * inverse(given.scale.scale)
    if spec.max_grad_norm is not None:
        factor = clip_factor(norm, spec.max_grad_norm)
        grads = [g * factor for g in grads]
    old = list(given.params)
    for i, low in zip(spec.split, given.low, strict=True):
        old[i] = join(old[i], low)
    held = _read_states(spec, given)
    params, states = [p.clone() for p in old], [s.clone() for s in held]
    after = binding.apply(given.numbers, [s.double() for s in given.shared], params, grads, states)
    chosen = [
        torch.where(finite, new.to(before.dtype), before)
        for new, before in zip([*after, *params, *states], [*given.shared, *old, *held], strict=True)
    ]
    n, m = len(after), len(params)
    scale = transition(spec.rule, given.scale, finite)
    new_params = chosen[n : n + m]
    shadows = [new_params[i].to(dtype) for i, dtype in spec.shadows]
    halves = {i: split(new_params[i]) for i in spec.split}
    new_params = [halves[i][0] if i in halves else p for i, p in enumerate(new_params)]
    low_bits = [halves[i][1] for i in spec.split]
    seed = scale.scale * (1.0 / spec.accumulate)
    new_states, blocks = _store_states(spec, binding, given, chosen[n + m :], finite)
    return Outcome(finite, norm, seed, scale, chosen[:n], new_params, new_states, low_bits, blocks, shadows)


def _read_states(spec: Spec, given: Operands) -> list[Tensor]:
    """The states as the optimizer computes with them: low ones in FP32."""
    states, scales = list(given.states), iter(given.scales)
    for number in spec.lows:
        states[number] = decode(states[number], next(scales) if spec.states == "8bit" else None)
    return states


def _store_states(
    spec: Spec, binding: Binding, given: Operands, new: Sequence[Tensor], finite: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """(states as they are held, scales of those that are codes); as they were, bit for bit, where a step is skipped."""
    states, scales, old_scales = list(new), list[Tensor](), iter(given.scales)
    for number in spec.lows:
        signed = SIGNED[binding.tensors[number][1]]
        low, blocks = encode(new[number], signed, spec.states, phase(given.scale.steps, signed))
        states[number] = torch.where(finite, low, given.states[number])
        if blocks is not None:
            scales.append(torch.where(finite, blocks, next(old_scales)))
    return states, scales


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


@dataclass
class Traced:
    """A traced function of flat tensors: `module(*leaves)` gives the flat outputs."""

    module: fx.GraphModule
    fakes: list[Any]


def trace(
    spec: Spec, binding: Binding, given: Operands, decompositions: dict[Any, Callable[..., Any]] | None = None
) -> Traced:
    """`update` as a functional graph with flat inputs (the leaves of `Operands`) and outputs (those of `Outcome`).

    Raises:
      TrainingError: MP521, when the optimizer's code decides by values of tensors.
    """
    leaves, tree = pytree.tree_flatten(given)
    problem: Exception | None = None
    for capturable in (False, True):
        binding.capturable = capturable

        def flat(*tensors: Tensor) -> list[Tensor]:
            return pytree.tree_leaves(update(spec, binding, pytree.tree_unflatten(tensors, tree)))

        try:
            traced = trace_functional(flat, leaves, decompositions)
            _refuse_idle(spec, binding, traced)
            return traced
        except (UndecidableError, DataDependentOutputException, GuardOnDataDependentSymNode) as error:
            problem = error
    raise untraceable(binding.optimizers, str(problem).splitlines()[0]) from problem


def _refuse_idle(spec: Spec, binding: Binding, traced: Traced) -> None:
    """Refuse an update that writes to no parameter: its step steps something else.

    Raises:
      TrainingError: MP525.
    """
    # finite, norm, seed, the scale's state, the counters; then the parameters.
    first = 3 + len(ScaleState._fields) + len(binding.shared)
    chosen = outputs_of(traced.module)[first : first + len(binding.params)]
    idle = [n.target is torch.ops.aten.where.self and n.args[1] is n.args[2] for n in chosen]
    if all(idle) and not spec.split:
        raise TrainingError(
            "MP525",
            f"the step of {binding.optimizers.name} writes to none of its parameters",
            why="it steps something else, or nothing",
            try_="the drop-in way: loss = mp(x); loss.backward(); optimizer.step()",
        )


def trace_functional(
    function: Callable[..., Any], leaves: Sequence[Any], decompositions: dict[Any, Callable[..., Any]] | None = None
) -> Traced:
    """A functional ATen graph of `function`, copies of unchanged values left out."""
    mode = next((t.fake_mode for t in leaves if isinstance(t, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [t if isinstance(t, FakeTensor) else mode.from_tensor(t.detach(), static_shapes=True) for t in leaves]
    with mode, torch.no_grad():
        module = make_fx(torch.func.functionalize(function), decompositions, _allow_non_fake_inputs=True)(*fakes)
    _tidy(module)
    return Traced(module, fakes)


def _tidy(module: fx.GraphModule) -> None:
    """Clones of a functional graph are the value itself; equal nodes are one."""
    for target in (torch.ops.aten.clone.default, torch.ops.aten.detach.default):
        for node in module.graph.find_nodes(op="call_function", target=target):
            if not node.kwargs.get("memory_format"):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
    module.graph = with_equal_nodes_merged(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()


@dataclass
class InPlace:
    """The update as it runs: (*operand leaves, seed, *bases, *shadows) -> (finite, norm, scale), the rest in place."""

    module: fx.GraphModule
    fakes: list[Any]


def in_place(
    traced: Traced, given: Operands, seed: Tensor, bases: Sequence[Tensor], shadows: Sequence[Tensor]
) -> InPlace:
    """End the functional update with the writes: every next value is copied over the one it follows."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in traced.module.graph.nodes:
        if node.op != "output":
            env[node] = graph.node_copy(node, lambda n: env[n])
    outputs = [env[n] for n in outputs_of(traced.module)]
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    counts = [len(pytree.tree_leaves(part)) for part in given]
    starts = dict(zip(given._fields, [sum(counts[:i]) for i in range(len(counts))], strict=True))
    written = [*range(starts["scale"], starts["grads"])]
    mode = next(t.fake_mode for t in traced.fakes if isinstance(t, FakeTensor))
    after = graph._root.prev if not inputs else inputs[-1]
    targets = [inputs[i] for i in written]
    fakes = list(traced.fakes)
    named = [
        ("seed", seed),
        *((f"counters_{i}", b) for i, b in enumerate(bases)),
        *((f"shadow_{i}", s) for i, s in enumerate(shadows)),
    ]
    for name, tensor in named:
        with graph.inserting_after(after):
            after = graph.placeholder(name)
        after.meta["val"] = mode.from_tensor(tensor.detach(), static_shapes=True)
        fakes.append(after.meta["val"])
        targets.append(after)
    finite, norm, next_seed, *values = outputs
    moved = values[: len(written)]
    counters = moved[starts["shared"] - starts["scale"] :][: len(bases)]
    for target, value in zip(targets, [*moved, next_seed, *counters, *values[len(written) :]], strict=True):
        if target is not value:
            graph.call_function(torch.ops.aten.copy_.default, (target, value)).meta["val"] = target.meta["val"]
    graph.output((finite, norm, moved[0]))
    return InPlace(fx.GraphModule(traced.module, graph), fakes)
