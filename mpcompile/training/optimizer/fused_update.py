"""The update by ATen's fused kernel, for the optimizers that have one.

Gradients reach the kernel a bucket at a time, through one FP32 buffer that stays in the cache: nothing holds them all
in FP32 beside their low originals.  The kernel skips itself where `found_inf` is 1.  A few calls a bucket, nothing
compiled per parameter, and on a CPU a third of the time of a compiled update (docs/explanation/training-step.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mpcompile.torch_internals.tensors import (
    FakeTensorMode,
    foreach_copy,
    foreach_mul,
    foreach_norm,
    unflatten_dense,
    unscale_and_look,
)
from mpcompile.training.distributed.layout import memory_order
from mpcompile.training.distributed.one_decision import decide
from mpcompile.training.gradients.compile import Run, compile_inference, decompositions
from mpcompile.training.loss_scale.scale import ScaleState, inverse, transition
from mpcompile.training.optimizer.binding import Binding, follow
from mpcompile.training.optimizer.traced_update import Spec, clip_factor, trace_functional

# Below this many elements a compiled update, all in one kernel launch sequence of its own, is faster.
SMALL = 1 << 20
# Elements of the buffer: 4 MB stay in a CPU's cache; on a GPU launches cost more than a pass over memory.
BUCKET_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `start + length` of a parameter (all of it where `length` is -1); `last` of its slices.

    `order` names the dimensions as they lie in memory, where that is not their own order (channels_last weights).
    """

    param: int
    start: int = 0
    length: int = -1
    last: bool = True
    order: tuple[int, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The slice of the parameter, or of anything that has its shape; contiguous where it lies as the parameter."""
        tensor = tensor.permute(self.order) if self.order else tensor
        return tensor if self.length < 0 else tensor.narrow(0, self.start, self.length)


Bucket = tuple[Slice, ...]
AdvanceScale = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Step = Callable[[Tensor, Sequence[Tensor]], None]


def serves(binding: Binding) -> bool:
    """True when the fused kernel is right and faster: many elements, and every state laid out as its parameter (the
    kernels go by address).
    """
    states = [(binding.params[i], t) for (i, _), t in zip(binding.tensors, binding.state_tensors(), strict=True)]
    return (
        sum(p.numel() for p in binding.params) >= SMALL
        and all(Slice(0, order=memory_order(p)).of(p).is_contiguous() for p in binding.params)
        and all(state.stride() == param.stride() for param, state in states)
    )


def bucketed(params: Sequence[Tensor], room: int) -> list[Bucket]:
    """The parameters in buckets of at most `room` elements each; larger ones in slices of rows."""
    buckets, members, taken = list[Bucket](), list[Slice](), 0
    for slice_, size in _slices(params, room):
        if members and taken + size > room:
            buckets.append(tuple(members))
            members, taken = [], 0
        members.append(slice_)
        taken += size
    return [*buckets, tuple(members)]


def _slices(params: Sequence[Tensor], room: int) -> Iterator[tuple[Slice, int]]:
    for i, param in enumerate(params):
        order, count = memory_order(param), param.numel()
        if count <= room or param.dim() == 0:
            yield Slice(i, order=order), count
            continue
        total = Slice(i, order=order).of(param).shape[0]
        row = count // total
        rows = max(1, room // row)
        for start in range(0, total, rows):
            length = min(rows, total - start)
            yield Slice(i, start, length, start + length == total, order), length * row


def by_layout(tensors: Sequence[Tensor]) -> list[list[int]]:
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
      kinds: the gradients' numbers, as `by_layout` gives them.
    """
    device = grads[0].device
    if device.type == "cpu":
        # By far the fastest look that ATen has here; times 1 changes nothing.
        found = torch.zeros((), device=device)
        # It writes, which an expanded tensor (the gradient of a sum) does not allow.
        dense = [grad.contiguous() if 0 in grad.stride() else grad for grad in grads]
        unscale_and_look(dense, found, torch.ones((), device=device))
        return found
    # CUDA's kernel of that name refuses BF16.
    largest = [torch.stack(foreach_norm([grads[i] for i in kind], math.inf)) for kind in kinds]
    return torch.stack([~torch.isfinite(each).all() for each in largest]).any().float()


def advance_scale(spec: Spec, found: Tensor, state: ScaleState, seed: Tensor) -> tuple[Tensor, ...]:
    """Move the loss scale; returns (finite, factor that unscales, scale, *state, seed), all new."""
    finite = found == 0
    after = transition(spec.rule, state, finite)
    return finite, inverse(state.scale), after.scale.clone(), *after, after.scale * (1.0 / spec.accumulate)


@dataclass(frozen=True)
class BucketLayout:
    """Where a bucket's gradients lie in the buffer; the same at every step.

    Fields:
      size: elements; like: tensors of the slices' shapes, without data.
      first: (slice, number of its first gradient); kinds: the numbers of those that one call copies.
      more: (place among the slices, slice, number of another gradient).
    """

    size: int
    like: list[Tensor]
    first: list[tuple[Slice, int]]
    kinds: list[list[int]]
    more: list[tuple[int, Slice, int]]


def _bucket_layout(spec: Spec, params: Sequence[Tensor], bucket: Bucket, grads: Sequence[Tensor]) -> BucketLayout:
    like = [torch.empty(slice_.of(params[slice_.param]).shape, device="meta") for slice_ in bucket]
    parts = [spec.parts[slice_.param] for slice_ in bucket]
    first = [(slice_, part[0]) for slice_, part in zip(bucket, parts, strict=True)]
    kinds = by_layout([slice_.of(grads[i]) for slice_, i in first])
    more = [(n, slice_, i) for n, (slice_, part) in enumerate(zip(bucket, parts, strict=True)) for i in part[1:]]
    return BucketLayout(sum(t.numel() for t in like), like, first, kinds, more)


@dataclass(frozen=True)
class GradientPath:
    """The way of the gradients through the update: the same calls when it runs and when it is emitted."""

    spec: Spec
    buckets: list[Bucket]
    layouts: list[BucketLayout]
    kinds: list[list[int]]

    @classmethod
    def of(cls, spec: Spec, params: Sequence[Tensor], buckets: list[Bucket], grads: Sequence[Tensor]) -> GradientPath:
        return cls(spec, buckets, [_bucket_layout(spec, params, bucket, grads) for bucket in buckets], by_layout(grads))

    def run(
        self, grads: Sequence[Tensor], advance: AdvanceScale, steps: Sequence[Step]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(finite, norm, scale).

        Args:
          advance: from `non_finite`'s result, (finite, factor that unscales, scale), the state being written in place.
          steps: per bucket, the optimizer's step of (found_inf, FP32 gradients).
        """
        found = non_finite(grads, self.kinds)
        buffer = torch.empty(max(layout.size for layout in self.layouts), device=found.device)
        found, norm = self._before(found, grads, buffer)
        finite, unscale, scale = advance(found)
        factor = None if self.spec.rule.is_off else unscale
        norm = norm * factor if norm is not None and factor is not None else norm
        if self.spec.max_grad_norm is not None and norm is not None:
            clip = clip_factor(norm, self.spec.max_grad_norm)
            factor = clip if factor is None else factor * clip
        norms = []
        for layout, step in zip(self.layouts, steps, strict=True):
            views = self.fill(layout, grads, buffer)
            if factor is not None:
                foreach_mul(views, factor)
            if norm is None:
                norms.append(_norm(views))
            step(found, views)
        return finite, _norm(norms) if norm is None else norm, scale

    def _before(self, found: Tensor, grads: Sequence[Tensor], buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        """(`found`, norm of the scaled gradients) of all ranks; the norm only where it is needed before the update."""
        if self.spec.max_grad_norm is None and self.spec.ranks is None:
            return found, None
        norm = _norm([_norm(self.fill(layout, grads, buffer)) for layout in self.layouts])
        if self.spec.ranks is None:
            return found, norm
        broken, norms = decide(self.spec.ranks, found, norm)
        return broken.amax(), torch.linalg.vector_norm(norms)

    def fill(self, layout: BucketLayout, grads: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
        """A bucket's gradients, summed where a parameter has several, in views of `buffer`."""
        views = list(unflatten_dense(buffer.narrow(0, 0, layout.size), layout.like))
        slices = [slice_.of(grads[i]) for slice_, i in layout.first]
        for kind in layout.kinds:
            foreach_copy([views[i] for i in kind], [slices[i] for i in kind])
        for number, slice_, i in layout.more:
            views[number].add_(slice_.of(grads[i]))
        return views


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(foreach_norm(list(tensors))))
    return norm


@dataclass
class FusedUpdate:
    """One fused update, ready to run (the same interface as `Updater`)."""

    path: GradientPath
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
            results = self.path.run(grads, self._advance_scale, self.steps)
            if self.shadows:
                foreach_copy(self.shadows, self.masters)
        return results

    def _advance_scale(self, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        finite, unscale, scale = self.look([found, *self.scale, self.seed])
        return finite, unscale, scale

    def emit(self) -> tuple[fx.GraphModule, list[Tensor | int]]:
        """The update's graph, and what each input is: a live tensor, or the number of a gradient."""
        spec, params = self.path.spec, self.binding.params
        count = sum(map(len, spec.parts))
        buckets = [(bucket, held(self.binding, bucket)) for bucket in self.path.buckets]
        own = list({id(t): t for _, tensors in buckets for t in tensors}.values())
        place = {id(t): i for i, t in enumerate(own)}
        like = {i: p for part, p in zip(spec.parts, params, strict=True) for i in part}

        def whole(*leaves: Tensor) -> tuple[Tensor, ...]:
            grads, rest = leaves[:count], leaves[count:]
            state, seed, rates, rest = ScaleState(*rest[:6]), rest[6], rest[7], rest[8:]
            mine = {key: rest[i] for key, i in place.items()}

            def move(found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                finite, unscale, scale, *after = advance_scale(spec, found, state, seed)
                for target, value in zip([*state, seed], after, strict=True):
                    target.copy_(value)
                return finite, unscale, scale

            def step(bucket: Bucket, tensors: list[Tensor]) -> Step:
                now = [mine[id(t)] for t in tensors]
                return lambda found, views: fused_step(self.binding, bucket, rates, found, views, now, self.places)

            results = self.path.run(grads, move, [step(*one) for one in buckets])
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
    """Trace the optimizer's fused step of each bucket, and compile the loss scale's move; `grads` are examples."""
    params, device = binding.params, seed.device
    numbers = binding.numbers()
    places = [i for i, slot in enumerate(binding.slots) if slot.key == "lr"]
    # The CPU's kernel reads the lr as a double; CUDA's wants FP32.
    rates = torch.tensor([numbers[i] for i in places], dtype=torch.float64 if device.type == "cpu" else torch.float32)
    rates = rates.to(device)
    path = GradientPath.of(spec, params, bucketed(params, BUCKET_ELEMENTS[device.type]), grads)
    steps = [_step(binding, bucket, rates, places) for bucket in path.buckets]
    look = _compile_settle(spec, state, seed, backend)
    masters = [params[i] for i, _ in spec.shadows]
    return FusedUpdate(path, binding, look, steps, state, seed, rates, numbers, places, list(shadows), masters)


def held(binding: Binding, bucket: Bucket) -> list[Tensor]:
    """The live tensors that the step of a bucket reads and writes: each member's parameter, then its states."""
    states, table = binding.states(), binding.places()
    members = [slice_.param for slice_ in bucket]
    return [t for i in members for t in (binding.params[i], *(states[i][key] for key, _ in table[i]))]


def fused_step(
    binding: Binding, bucket: Bucket, rates: Tensor, found: Tensor, grads: Sequence[Tensor], own: Sequence[Tensor],
    places: list[int],
) -> None:  # fmt: skip
    """In a trace: the optimizer's fused step of a bucket, on tensors such as `held` gives."""
    rate = {binding.slots[place].group: rates[i] for i, place in enumerate(places)}
    rest, table = iter(own), binding.places()
    params, states = list[Tensor](), list[dict[str, Tensor]]()
    for slice_ in bucket:
        params.append(slice_.of(next(rest)))
        states.append({})
        for key, counts in table[slice_.param]:
            tensor = next(rest)
            # Every slice counts for itself; the last one's count stays.
            states[-1][key] = (tensor if slice_.last else tensor.clone()) if counts else slice_.of(tensor)
    binding.apply_fused(rate.__getitem__, [p.param for p in bucket], params, grads, states, found)


def _step(binding: Binding, bucket: Bucket, rates: Tensor, places: list[int]) -> Step:
    """The optimizer's fused step of a bucket, traced and bound to the live tensors."""
    count, own = len(bucket), held(binding, bucket)

    def flat(rates: Tensor, found: Tensor, *rest: Tensor) -> None:
        fused_step(binding, bucket, rates, found, rest[:count], rest[count:], places)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    found = torch.zeros((), device=rates.device)
    grads = [torch.empty_like(slice_.of(binding.params[slice_.param]), requires_grad=False) for slice_ in bucket]
    fakes = [mode.from_tensor(t.detach(), static_shapes=True) for t in (rates, found, *grads, *own)]
    with mode, torch.no_grad():
        traced = make_fx(flat, _allow_non_fake_inputs=True)(*fakes)
    return lambda found, views: traced(rates, found, *views, *own)


def _compile_settle(spec: Spec, state: ScaleState, seed: Tensor, backend: str) -> Run:
    """(found, *state, seed) -> (finite, factor that unscales, scale), with state and seed replaced in place."""
    leaves = [torch.zeros((), device=seed.device), *state, seed]

    def whole(found: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return advance_scale(spec, found, ScaleState(*rest[:-1]), rest[-1])

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
