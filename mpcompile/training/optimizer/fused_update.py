"""The update by ATen's fused kernel, for the optimizers that have one.

Gradients reach the kernel a group at a time, through one FP32 buffer that stays in the cache: nothing holds them all
in FP32 beside their low originals.  The kernel skips itself where `found_inf` is 1.  A few calls a group, nothing
compiled per parameter, and on a CPU a third of the time of a compiled update (docs/explanation/training-step.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mpcompile.training.gradients.compile import Run, compile_inference, decompositions
from mpcompile.training.loss_scale.scale import ScaleState, inverse, transition
from mpcompile.training.optimizer.binding import Binding, follow
from mpcompile.training.optimizer.traced_update import Spec, clip_factor, trace_functional

# Below this many elements a compiled update, all in one kernel launch sequence of its own, is faster.
SMALL = 1 << 20
# Elements of the buffer: 4 MB stay in a CPU's cache; on a GPU launches cost more than a pass over memory.
ROOM = {"cpu": 1 << 20, "cuda": 1 << 24}


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `start + length` of a parameter (all of it where `length` is -1); `last` of its pieces.

    `order` names the dimensions as they lie in memory, where that is not their own order (channels_last weights).
    """

    param: int
    start: int = 0
    length: int = -1
    last: bool = True
    order: tuple[int, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of the parameter, or of anything that has its shape; contiguous where it lies as the parameter."""
        tensor = tensor.permute(self.order) if self.order else tensor
        return tensor if self.length < 0 else tensor.narrow(0, self.start, self.length)


Group = tuple[Piece, ...]
Settle = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Step = Callable[[Tensor, Sequence[Tensor]], None]


def serves(binding: Binding) -> bool:
    """True when the fused kernel is right and faster: many elements, and every state laid out as its parameter (the
    kernels go by address).
    """
    states = [(binding.params[i], t) for (i, _), t in zip(binding.tensors, binding.state_tensors(), strict=True)]
    return (
        sum(p.numel() for p in binding.params) >= SMALL
        and all(Piece(0, order=_order(p)).of(p).is_contiguous() for p in binding.params)
        and all(state.stride() == param.stride() for param, state in states)
    )


def _order(param: Tensor) -> tuple[int, ...]:
    """The dimensions from the slowest to the fastest; () where that is their own order."""
    if param.is_contiguous():
        return ()
    return tuple(sorted(range(param.dim()), key=param.stride, reverse=True))


def grouped(params: Sequence[Tensor], room: int) -> list[Group]:
    """The parameters in groups of at most `room` elements each; larger ones in pieces of rows."""
    groups, members, taken = list[Group](), list[Piece](), 0
    for piece, size in _pieces(params, room):
        if members and taken + size > room:
            groups.append(tuple(members))
            members, taken = [], 0
        members.append(piece)
        taken += size
    return [*groups, tuple(members)]


def _pieces(params: Sequence[Tensor], room: int) -> Iterator[tuple[Piece, int]]:
    for i, param in enumerate(params):
        order, count = _order(param), param.numel()
        if count <= room or param.dim() == 0:
            yield Piece(i, order=order), count
            continue
        total = Piece(i, order=order).of(param).shape[0]
        row = count // total
        rows = max(1, room // row)
        for start in range(0, total, rows):
            length = min(rows, total - start)
            yield Piece(i, start, length, start + length == total, order), length * row


def alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The tensors' numbers, those of one dtype and layout together: for a list that mixes them, CUDA's `_foreach`
    functions launch a kernel per tensor.
    """
    found: dict[tuple[torch.dtype, bool], list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault((tensor.dtype, tensor.is_contiguous()), []).append(i)
    return list(found.values())


def non_finite(grads: Sequence[Tensor], kinds: Sequence[Sequence[int]]) -> Tensor:
    """0-dim FP32: 1 where any element of any gradient is infinite or NaN, else 0. Exact: no sum can overflow.

    Args:
      kinds: the gradients' numbers, as `alike` gives them.
    """
    device = grads[0].device
    if device.type == "cpu":
        # By far the fastest look that ATen has here; times 1 changes nothing.
        found = torch.zeros((), device=device)
        # It writes, which an expanded tensor (the gradient of a sum) does not allow.
        dense = [grad.contiguous() if 0 in grad.stride() else grad for grad in grads]
        torch._amp_foreach_non_finite_check_and_unscale_(dense, found, torch.ones((), device=device))
        return found
    # CUDA's kernel of that name refuses BF16.
    largest = [torch.stack(torch._foreach_norm([grads[i] for i in kind], math.inf)) for kind in kinds]
    return torch.stack([~torch.isfinite(each).all() for each in largest]).any().float()


def settle(spec: Spec, found: Tensor, state: ScaleState, seed: Tensor) -> tuple[Tensor, ...]:
    """Move the loss scale; returns (finite, factor that unscales, scale, *state, seed), all new."""
    finite = found == 0
    after = transition(spec.rule, state, finite)
    return finite, inverse(state.scale), after.scale.clone(), *after, after.scale * (1.0 / spec.accumulate)


@dataclass(frozen=True)
class Plot:
    """Where a group's gradients lie in the buffer; the same at every step.

    Fields:
      size: elements; like: tensors of the pieces' shapes, without data.
      first: (piece, number of its first gradient); kinds: the numbers of those that one call copies.
      more: (place among the pieces, piece, number of another gradient).
    """

    size: int
    like: list[Tensor]
    first: list[tuple[Piece, int]]
    kinds: list[list[int]]
    more: list[tuple[int, Piece, int]]


def _plot(spec: Spec, params: Sequence[Tensor], group: Group, grads: Sequence[Tensor]) -> Plot:
    like = [torch.empty(piece.of(params[piece.param]).shape, device="meta") for piece in group]
    parts = [spec.parts[piece.param] for piece in group]
    first = [(piece, part[0]) for piece, part in zip(group, parts, strict=True)]
    kinds = alike([piece.of(grads[i]) for piece, i in first])
    more = [(n, piece, i) for n, (piece, part) in enumerate(zip(group, parts, strict=True)) for i in part[1:]]
    return Plot(sum(t.numel() for t in like), like, first, kinds, more)


@dataclass(frozen=True)
class Flow:
    """The way of the gradients through the update: the same calls when it runs and when it is emitted."""

    spec: Spec
    groups: list[Group]
    plots: list[Plot]
    kinds: list[list[int]]

    @classmethod
    def of(cls, spec: Spec, params: Sequence[Tensor], groups: list[Group], grads: Sequence[Tensor]) -> Flow:
        return cls(spec, groups, [_plot(spec, params, group, grads) for group in groups], alike(grads))

    def run(self, grads: Sequence[Tensor], settle: Settle, steps: Sequence[Step]) -> tuple[Tensor, Tensor, Tensor]:
        """(finite, norm, scale).

        Args:
          settle: from `non_finite`'s result, (finite, factor that unscales, scale), the state being written in place.
          steps: per group, the optimizer's step of (found_inf, FP32 gradients).
        """
        found = non_finite(grads, self.kinds)
        finite, unscale, scale = settle(found)
        buffer = torch.empty(max(plot.size for plot in self.plots), device=found.device)
        factor, norm = None if self.spec.rule.is_off else unscale, None
        if self.spec.max_grad_norm is not None:
            norm = _norm([_norm(self.fill(plot, grads, buffer)) for plot in self.plots])
            norm = norm if factor is None else norm * factor
            clip = clip_factor(norm, self.spec.max_grad_norm)
            factor = clip if factor is None else factor * clip
        norms = []
        for plot, step in zip(self.plots, steps, strict=True):
            views = self.fill(plot, grads, buffer)
            if factor is not None:
                torch._foreach_mul_(views, factor)
            if norm is None:
                norms.append(_norm(views))
            step(found, views)
        return finite, _norm(norms) if norm is None else norm, scale

    def fill(self, plot: Plot, grads: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
        """A group's gradients, summed where a parameter has several, in views of `buffer`."""
        views = list(torch._C._nn.unflatten_dense_tensors(buffer.narrow(0, 0, plot.size), plot.like))
        pieces = [piece.of(grads[i]) for piece, i in plot.first]
        for kind in plot.kinds:
            torch._foreach_copy_([views[i] for i in kind], [pieces[i] for i in kind])
        for number, piece, i in plot.more:
            views[number].add_(piece.of(grads[i]))
        return views


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
    return norm


@dataclass
class FusedUpdate:
    """One fused update, ready to run (the same interface as `Updater`)."""

    flow: Flow
    binding: Binding
    look: Run
    steps: list[Step]
    scale: ScaleState
    seed: Tensor
    numbers: Tensor
    seen: list[float]
    places: list[int]
    shadows: list[Tensor]
    masters: list[Tensor]
    epoch: int = -1

    def __call__(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """(finite, norm, scale) after the update; everything else is written in place."""
        with torch.no_grad():
            results = self.flow.run(grads, self._settle, self.steps)
            if self.shadows:
                torch._foreach_copy_(self.shadows, self.masters)
        return results

    def _settle(self, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        finite, unscale, scale = self.look([found, *self.scale, self.seed])
        return finite, unscale, scale

    def emit(self) -> tuple[fx.GraphModule, list[Tensor | int]]:
        """The update's graph, and what each input is: a live tensor, or the number of a gradient."""
        spec, params = self.flow.spec, self.binding.params
        count = sum(map(len, spec.parts))
        groups = [(group, held(self.binding, group)) for group in self.flow.groups]
        own = list({id(t): t for _, tensors in groups for t in tensors}.values())
        place = {id(t): i for i, t in enumerate(own)}
        like = {i: p for part, p in zip(spec.parts, params, strict=True) for i in part}

        def whole(*leaves: Tensor) -> tuple[Tensor, ...]:
            grads, rest = leaves[:count], leaves[count:]
            state, seed, rates, rest = ScaleState(*rest[:6]), rest[6], rest[7], rest[8:]
            mine = {key: rest[i] for key, i in place.items()}

            def move(found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                finite, unscale, scale, *after = settle(spec, found, state, seed)
                for target, value in zip([*state, seed], after, strict=True):
                    target.copy_(value)
                return finite, unscale, scale

            def step(group: Group, tensors: list[Tensor]) -> Step:
                now = [mine[id(t)] for t in tensors]
                return lambda found, views: fused_step(self.binding, group, rates, found, views, now, self.places)

            results = self.flow.run(grads, move, [step(*one) for one in groups])
            for target, (i, _) in zip(rest[len(own) :], spec.shadows, strict=True):
                target.copy_(mine[id(params[i])])
            return results

        given: list[Tensor | int] = [*range(count), *self.scale, self.seed, self.numbers, *own, *self.shadows]
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [mode.from_tensor((like[t] if isinstance(t, int) else t).detach(), static_shapes=True) for t in given]
        with mode, torch.no_grad():
            return make_fx(whole, _allow_non_fake_inputs=True)(*fakes), given

    def holds(self) -> bool:
        """Take in the groups' numbers; False when a number that stands in the graph has changed."""
        seen = follow(self.binding, self.seen, self.numbers, self.places)
        self.seen = self.seen if seen is None else seen
        return seen is not None


def build(
    spec: Spec,
    binding: Binding,
    state: ScaleState,
    seed: Tensor,
    shadows: Sequence[Tensor],
    grads: Sequence[Tensor],
    backend: str,
) -> FusedUpdate:
    """Trace the optimizer's fused step of each group, and compile the loss scale's move; `grads` are examples."""
    params, device = binding.params, seed.device
    numbers = binding.numbers()
    places = [i for i, slot in enumerate(binding.slots) if slot.key == "lr"]
    # The CPU's kernel reads the lr as a double; CUDA's wants FP32.
    rates = torch.tensor([numbers[i] for i in places], dtype=torch.float64 if device.type == "cpu" else torch.float32)
    rates = rates.to(device)
    flow = Flow.of(spec, params, grouped(params, ROOM[device.type]), grads)
    steps = [_step(binding, group, rates, places) for group in flow.groups]
    look = _compile_settle(spec, state, seed, backend)
    masters = [params[i] for i, _ in spec.shadows]
    return FusedUpdate(flow, binding, look, steps, state, seed, rates, numbers, places, list(shadows), masters)


def held(binding: Binding, group: Group) -> list[Tensor]:
    """The live tensors that the step of a group reads and writes: each member's parameter, then its states."""
    states, table = binding.states(), binding.places()
    members = [piece.param for piece in group]
    return [t for i in members for t in (binding.params[i], *(states[i][key] for key, _ in table[i]))]


def fused_step(
    binding: Binding, group: Group, rates: Tensor, found: Tensor, grads: Sequence[Tensor], own: Sequence[Tensor],
    places: list[int],
) -> None:  # fmt: skip
    """In a trace: the optimizer's fused step of a group, on tensors such as `held` gives."""
    rate = {binding.slots[place].group: rates[i] for i, place in enumerate(places)}
    rest, table = iter(own), binding.places()
    params, states = list[Tensor](), list[dict[str, Tensor]]()
    for piece in group:
        params.append(piece.of(next(rest)))
        states.append({})
        for key, counts in table[piece.param]:
            tensor = next(rest)
            # Every piece counts for itself; the last one's count stays.
            states[-1][key] = (tensor if piece.last else tensor.clone()) if counts else piece.of(tensor)
    binding.apply_fused(rate.__getitem__, [p.param for p in group], params, grads, states, found)


def _step(binding: Binding, group: Group, rates: Tensor, places: list[int]) -> Step:
    """The optimizer's fused step of a group, traced and bound to the live tensors."""
    count, own = len(group), held(binding, group)

    def flat(rates: Tensor, found: Tensor, *rest: Tensor) -> None:
        fused_step(binding, group, rates, found, rest[:count], rest[count:], places)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    found = torch.zeros((), device=rates.device)
    grads = [torch.empty_like(piece.of(binding.params[piece.param]), requires_grad=False) for piece in group]
    fakes = [mode.from_tensor(t.detach(), static_shapes=True) for t in (rates, found, *grads, *own)]
    with mode, torch.no_grad():
        traced = make_fx(flat, _allow_non_fake_inputs=True)(*fakes)
    return lambda found, views: traced(rates, found, *views, *own)


def _compile_settle(spec: Spec, state: ScaleState, seed: Tensor, backend: str) -> Run:
    """(found, *state, seed) -> (finite, factor that unscales, scale), with state and seed replaced in place."""
    leaves = [torch.zeros((), device=seed.device), *state, seed]

    def whole(found: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return settle(spec, found, ScaleState(*rest[:-1]), rest[-1])

    traced = trace_functional(whole, leaves, decompositions(backend))
    module, inputs = traced.module, traced.module.graph.find_nodes(op="placeholder")
    output = module.graph.output_node()
    results: Any = output.args[0]
    with module.graph.inserting_before(output):
        for target, value in zip(inputs[1:], results[3:], strict=True):
            if target is not value:
                copied = module.graph.call_function(torch.ops.aten.copy_.default, (target, value))
                copied.meta["val"] = target.meta["val"]
    output.args = (tuple(results[:3]),)
    module.recompile()
    return compile_inference(module, traced.fakes) if backend == "inductor" else _eager(module)


def _eager(module: fx.GraphModule) -> Run:
    return lambda inputs: module(*inputs)
