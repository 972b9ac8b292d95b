"""The update by ATen's fused kernel, for the optimizers that have one.

Gradients are gathered, FP32, in one flat tensor: one kernel finds their norm and whether they are finite, and moves
the loss scale; the optimizer's own fused step reads views of it and skips itself where `found_inf` is 1; one call
refreshes the shadows.  A dozen calls however many parameters there are, nothing compiled per parameter, and on a CPU
a third of the time of a compiled update (docs/explanation/training-step.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mpcompile.training.optim import Binding
from mpcompile.training.parts import Run, compile_inference, decompositions
from mpcompile.training.scaler import ScaleState, inverse, transition
from mpcompile.training.update import Spec, clip_factor, trace_functional

# Below this many elements a compiled update, all in one kernel launch sequence of its own, is faster.
SMALL = 1 << 20


def serves(binding: Binding) -> bool:
    """True when the fused kernel is right and faster: many elements, laid out in one order (the CPU's kernel goes by
    address and reads a gradient of other strides wrongly).
    """
    tensors = [*binding.params, *binding.state_tensors()]
    return sum(p.numel() for p in binding.params) >= SMALL and all(t.is_contiguous() for t in tensors)


def gather(spec: Spec, params: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All gradients in one new FP32 tensor, and a view of it per parameter."""
    flat = torch.empty(sum(p.numel() for p in params), device=params[0].device)
    views = list(torch._C._nn.unflatten_dense_tensors(flat, list(params)))
    torch._foreach_copy_(views, [grads[part[0]] for part in spec.parts])
    more = [(view, grads[i]) for view, part in zip(views, spec.parts, strict=True) for i in part[1:]]
    if more:
        torch._foreach_add_([v for v, _ in more], [g for _, g in more])
    return flat, views


def gathered(spec: Spec, params: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]] | None:
    """The flat tensor that `grads` lie in already, in the order of `params` (the sums of a window), or None."""
    flat, place = grads[0]._base, 0
    if flat is None or flat.dim() != 1 or any(len(part) > 1 for part in spec.parts):
        return None
    views = [grads[part[0]] for part in spec.parts]
    for param, view in zip(params, views, strict=True):
        if view._base is not flat or view.storage_offset() != place or view.shape != param.shape:
            return None
        place += view.numel()
    return (flat, views) if flat.numel() == place and flat.dtype == torch.float32 else None


def check(spec: Spec, flat: Tensor, state: ScaleState, seed: Tensor) -> tuple[Tensor, ...]:
    """Unscale, look, clip and move the scale; returns (finite, norm, found_inf, scale, flat, *state, seed), all new."""
    grads = flat if spec.rule.is_off else flat * inverse(state.scale)
    finite, norm = torch.isfinite(grads.abs().amax()), torch.linalg.vector_norm(grads)
    if spec.max_grad_norm is not None:
        grads = grads * clip_factor(norm, spec.max_grad_norm)
    after = transition(spec.rule, state, finite)
    return (finite, norm, (~finite).float(), after.scale, grads, *after, after.scale * (1.0 / spec.accumulate))


@dataclass
class FusedUpdate:
    """One fused update, ready to run (the same interface as `Updater`)."""

    spec: Spec
    binding: Binding
    look: Run
    step: fx.GraphModule
    scale: ScaleState
    seed: Tensor
    numbers: Tensor
    seen: list[float]
    places: list[int]
    shadows: list[Tensor]
    masters: list[Tensor]
    own: list[Tensor]
    window: tuple[Tensor, list[Tensor]] | None = None

    def __call__(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """(finite, norm, scale) after the update; everything else is written in place."""
        with torch.no_grad():
            if self.window is None:
                flat, views = gather(self.spec, self.binding.params, grads)
            else:
                flat, views = self.window
            del grads
            finite, norm, found, scale = self.look([flat, *self.scale, self.seed])
            self.step(self.numbers, found, *views, *self.own)
            if self.shadows:
                torch._foreach_copy_(self.shadows, self.masters)
        return finite, norm, scale

    def emit(self) -> tuple[fx.GraphModule, list[Tensor | int]]:
        """The update's graph, and what each input is: a live tensor, or the number of a gradient."""
        count, shadows = sum(map(len, self.spec.parts)), len(self.shadows)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        like = [
            p
            for i, p in sorted(
                (i, p) for part, p in zip(self.spec.parts, self.binding.params, strict=True) for i in part
            )
        ]

        def whole(*leaves: Tensor) -> tuple[Tensor, ...]:
            grads, rest = leaves[:count], leaves[count:]
            state, (seed, rates), rest = ScaleState(*rest[:6]), rest[6:8], rest[8:]
            params = rest[: len(self.binding.params)]
            flat, views = gather(self.spec, params, grads)
            finite, norm, found, scale, unscaled, *after = check(self.spec, flat, state, seed)
            flat.copy_(unscaled)
            for target, value in zip([*state, seed], after, strict=True):
                target.copy_(value)
            count_, states = len(params), len(self.binding.tensors)
            own = rest[: count_ + states + len(self.binding.counters())]
            fused_step(self.binding, rates, found, views, own, self.places)
            for target, (i, _) in zip(rest[len(own) :], self.spec.shadows, strict=True):
                target.copy_(params[i])
            return finite, norm, scale

        held: list[Tensor | int] = [*range(count), *self.scale, self.seed, self.numbers, *self.own, *self.shadows]
        fakes = [mode.from_tensor((like[t] if isinstance(t, int) else t).detach(), static_shapes=True) for t in held]
        assert len(fakes) == count + 8 + len(self.own) + shadows
        with mode, torch.no_grad():
            return make_fx(whole, _allow_non_fake_inputs=True)(*fakes), held

    def holds(self) -> bool:
        """Take in the groups' numbers; False when a number that stands in the graph has changed."""
        now = self.binding.numbers()
        if now == self.seen:
            return True
        if not self.binding.holds(now):
            return False
        self.numbers.copy_(_staged([now[i] for i in self.places], self.numbers), non_blocking=True)
        self.seen = now
        return True


def build(
    spec: Spec, binding: Binding, state: ScaleState, seed: Tensor, shadows: Sequence[Tensor], backend: str
) -> FusedUpdate:
    """Trace the optimizer's fused step and compile the look at the gradients."""
    params, device = binding.params, seed.device
    numbers = binding.numbers()
    places = [i for i, slot in enumerate(binding.slots) if slot.key == "lr"]
    # The CPU's kernel reads the lr as a double; CUDA's wants FP32.
    rates = torch.tensor([numbers[i] for i in places], dtype=torch.float64 if device.type == "cpu" else torch.float32)
    rates = rates.to(device)
    own = [*params, *binding.state_tensors(), *binding.counters()]
    views = [torch.empty_like(p, requires_grad=False) for p in params]
    step = _trace_step(binding, rates, torch.zeros((), device=device), views, own, places)
    look = _compile_check(spec, sum(p.numel() for p in params), state, seed, backend)
    masters = [params[i] for i, _ in spec.shadows]
    return FusedUpdate(spec, binding, look, step, state, seed, rates, numbers, places, list(shadows), masters, own)


def fused_step(
    binding: Binding, rates: Tensor, found: Tensor, grads: Sequence[Tensor], own: Sequence[Tensor], places: list[int]
) -> None:
    """In a trace: the optimizer's fused step on `own` (params, states, counters)."""
    count, states = len(binding.params), len(binding.tensors)
    rate = {binding.slots[place].group: rates[i] for i, place in enumerate(places)}
    params, others = own[:count], own[count:]
    binding.apply_fused(rate.__getitem__, params, grads, others[:states], others[states:], found, None)


def _trace_step(
    binding: Binding, rates: Tensor, found: Tensor, views: list[Tensor], own: list[Tensor], places: list[int]
) -> fx.GraphModule:
    """(rates, found_inf, *gradients, *params, *states, *counters) -> (): the optimizer's fused step, in place."""
    count = len(binding.params)

    def flat(rates: Tensor, found: Tensor, *rest: Tensor) -> None:
        fused_step(binding, rates, found, rest[:count], rest[count:], places)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(t.detach(), static_shapes=True) for t in (rates, found, *views, *own)]
    with mode, torch.no_grad():
        return make_fx(flat, _allow_non_fake_inputs=True)(*fakes)


def _compile_check(spec: Spec, size: int, state: ScaleState, seed: Tensor, backend: str) -> Run:
    """(flat, *state, seed) -> (finite, norm, found_inf, scale), with gradients, state and seed replaced in place."""
    leaves = [torch.empty(size, device=seed.device), *state, seed]

    def whole(flat: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return check(spec, flat, ScaleState(*rest[:-1]), rest[-1])

    traced = trace_functional(whole, leaves, decompositions(backend))
    module, inputs = traced.module, traced.module.graph.find_nodes(op="placeholder")
    output = module.graph.output_node()
    results: Any = output.args[0]
    with module.graph.inserting_before(output):
        for target, value in zip(inputs, results[4:], strict=True):
            if target is not value:
                copied = module.graph.call_function(torch.ops.aten.copy_.default, (target, value))
                copied.meta["val"] = target.meta["val"]
    output.args = (tuple(results[:4]),)
    module.recompile()
    return compile_inference(module, traced.fakes) if backend == "inductor" else _eager(module)


def _eager(module: fx.GraphModule) -> Run:
    return lambda inputs: module(*inputs)


def _staged(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=like.dtype, pin_memory=like.is_cuda)
