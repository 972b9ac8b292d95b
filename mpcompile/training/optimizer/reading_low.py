"""How an optimizer of `mpcompile.optim` steps: by the update's kernels, or as torch does, on FP32 copies of low gradients."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpcompile.aten.facts import LOW_DTYPES
from mpcompile.runtime.kernels.table import Rows
from mpcompile.runtime.kernels.update import UpdateKernel, adam_numbers, available, serves, sgd_numbers
from mpcompile.shadows.table import SHADOWS, WROTE
from mpcompile.torch_internals.optimizers import state_maker
from mpcompile.torch_internals.tensors import version
from mpcompile.training.optimizer.traced_update import clip_factor

# The devices whose updates run by our kernels; the others have torch's.
DEVICES = {"cuda"}
# Elements whose low gradients are FP32 together, where the update is torch's: 4 MB stay in a processor's cache.
TOGETHER = {"cpu": 1 << 20, "cuda": 1 << 24}
_GRAD, _DTYPE = operator.attrgetter("grad"), operator.attrgetter("dtype")


class ReadingLow:
    """The steps of one optimizer.

    Args:
      optimizer: ours; torch_class: the class of torch's that it is.
    """

    def __init__(self, optimizer: Any, torch_class: type[torch.optim.Optimizer]) -> None:
        self.optimizer, self.torch_class = optimizer, torch_class
        self.adam = issubclass(torch_class, torch.optim.Adam)
        self._bound: _Bound | None = None

    def step(self) -> None:
        """One update; gradients stay as they are. Under `torch.no_grad`."""
        optimizer = self.optimizer
        params = list(itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups))
        grads = list(map(_GRAD, params))
        if any(map(operator.is_, grads, itertools.repeat(None))):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = list(map(_GRAD, params))
        if params and not self._by_kernels(params, grads):
            self._as_torch(params, grads)

    def _by_kernels(self, params: list[Any], grads: list[Any]) -> bool:
        """Whether the kernels served."""
        optimizer = self.optimizer
        if {p.device.type for p in params} - DEVICES or not _fits(optimizer.param_groups, self.adam):
            return False
        make = adam_numbers if self.adam else sgd_numbers
        options = [_options(group, self.adam) for group in optimizer.param_groups]
        numbers = [make(group, *decoupled) for group, decoupled in zip(optimizer.param_groups, options, strict=True)]
        bound = self._bound
        if bound is None or not bound.holds(optimizer, params, grads):
            bound = self._bound = self._bind(params, grads, numbers)
        if bound.kernel is None:
            return False
        bound.kernel.prepare()
        bound.kernel.set_groups(numbers)
        # A step that is skipped writes no shadow: what was stale before is so afterwards.
        current = SHADOWS.are_current(bound.masters, bound.entries)
        result = bound.kernel(grads, getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None))
        optimizer.grad_norm = result.norm if bound.norm is not None else None
        if current:
            bound.note(optimizer)
        return True

    def _bind(self, params: list[Any], grads: list[Any], numbers: list[list[float]]) -> _Bound:
        optimizer, device = self.optimizer, params[0].device
        self._make_states()
        found = set(map(_DTYPE, grads)) - {torch.float32}
        if not found:
            found = {low for low in LOW_DTYPES if any(SHADOWS.held(params, low))}
        low = next(iter(found), torch.bfloat16)
        entries = SHADOWS.held(params, low)
        rows = _rows(optimizer, params, [None if entry is None else entry.shadow for entry in entries], self.adam)
        plain = all(g.layout == torch.strided and g.device == device for g in grads)
        good = plain and len(found) <= 1 and low in LOW_DTYPES and available(device.type) and serves(rows, low)
        kernel = UpdateKernel(
            rows, [[i] for i in range(len(params))], grads, adam=self.adam, groups=numbers, low=low,
            max_norm=optimizer.max_grad_norm,
        ) if good else None  # fmt: skip
        pairs = [(p, entry) for p, entry in zip(params, entries, strict=True) if entry is not None]
        return _Bound(kernel, params, _kinds(grads), _states(optimizer, params), optimizer.max_grad_norm,
                      SHADOWS.changes, [p for p, _ in pairs], [entry for _, entry in pairs])  # fmt: skip

    def _make_states(self) -> None:
        """The states as torch's first step makes them; SGD's buffers before that are zeros."""
        optimizer = self.optimizer
        make: Any = state_maker(optimizer)
        for group in optimizer.param_groups:
            make(group)
            if not self.adam and group["momentum"]:
                for p in group["params"]:
                    if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def _as_torch(self, params: list[Any], grads: list[Any]) -> None:
        """As torch does, on gradients that are FP32, unscaled and clipped; some at a time, where they are low."""
        optimizer = self.optimizer
        factors = self._factors(grads)
        if factors is None:
            return
        scaling = {name: vars(optimizer).pop(name) for name in ("grad_scale", "found_inf") if name in vars(optimizer)}
        groups, base = optimizer.param_groups, inspect.unwrap(self.torch_class.step)
        try:
            if not factors and all(grad.dtype == p.dtype for p, grad in zip(params, grads, strict=True)):
                base(optimizer)
                return
            for group, members in _parts(groups):
                kept = list(map(_GRAD, members))
                optimizer.param_groups = [{**group, "params": members}]
                try:
                    for p, grad in zip(members, kept, strict=True):
                        p.grad = _ready(p, grad, factors)
                    base(optimizer)
                finally:
                    for p, grad in zip(members, kept, strict=True):
                        p.grad = grad
        finally:
            optimizer.param_groups = groups
            vars(optimizer).update(scaling)

    def _factors(self, grads: list[Any]) -> list[Tensor] | None:
        """What gradients are multiplied by, one after the other; None where the step is skipped."""
        optimizer, factors = self.optimizer, list[Tensor]()
        found, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        # A GradScaler asks the same of the device for optimizers that do not skip by themselves.
        if found is not None and bool(found):
            return None
        if scale is not None:
            factors.append(scale.double().reciprocal().float())
        optimizer.grad_norm = None
        if optimizer.max_grad_norm is not None:
            norms = [torch.linalg.vector_norm(_values(grad), dtype=torch.float32) for grad in grads]
            norm = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
            norm = optimizer.grad_norm = norm * factors[0] if factors else norm
            if not bool(norm.isfinite()):
                return None
            factors.append(clip_factor(norm, optimizer.max_grad_norm))
        return factors


@dataclass(frozen=True)
class _Bound:
    """Kernels, and what they were bound to.

    Fields:
      kernel: None where none serves.
      kinds, states, norm, changes: what was seen of the gradients, the optimizer's states, its norm, and the table of
        shadows then.
      masters, entries: the masters that have shadows which are written, and those.
    """

    kernel: UpdateKernel | None
    params: list[Any]
    kinds: list[Any]
    states: list[Any]
    norm: float | None
    changes: tuple[int, int]
    masters: list[Any]
    entries: list[Any]

    def holds(self, optimizer: Any, params: list[Any], grads: list[Any]) -> bool:
        return (
            list(map(id, params)) == list(map(id, self.params))
            and _kinds(grads) == self.kinds
            and optimizer.max_grad_norm == self.norm
            and list(map(id, _states(optimizer, params))) == list(map(id, self.states))
            and SHADOWS.changes == self.changes
        )

    def note(self, optimizer: Any) -> None:
        """Leave for the hook after the step what was written: the shadows are those of the masters as they are now."""
        addresses = map(torch.Tensor.data_ptr, self.masters)
        vars(optimizer)[WROTE] = list(
            zip(self.masters, self.entries, map(version, self.masters), addresses, strict=True)
        )


def _kinds(grads: Sequence[Any]) -> list[Any]:
    return list(map(_DTYPE, grads))


def _states(optimizer: Any, params: Sequence[Any]) -> list[Any]:
    """All tensors that the optimizer holds for `params`, in order; None where one is not there yet."""
    held = map(optimizer.state.get, params, itertools.repeat({}))
    return list(itertools.chain.from_iterable(map(dict.values, held)))


def _fits(groups: Sequence[dict[str, Any]], adam: bool) -> bool:
    """Whether the kernels have what these groups ask for."""
    names = ("amsgrad", "differentiable", "foreach") if adam else ("dampening", "differentiable", "foreach")
    numbers = [value for g in groups for value in (g["lr"], *g.get("betas", ()))]
    on_device = any(isinstance(value, Tensor) and value.device.type != "cpu" for value in numbers)
    return not on_device and not any(group.get(name) for group in groups for name in names)


def _options(group: dict[str, Any], adam: bool) -> tuple[bool, ...]:
    return (bool(group["decoupled_weight_decay"]),) if adam else ()


def _rows(optimizer: Any, params: list[Any], shadows: list[Tensor | None], adam: bool) -> Rows:
    """What the kernels read and write beside gradients."""
    states, none = [optimizer.state[p] for p in params], [None] * len(params)
    number = {id(p): n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
    firsts = [state.get("exp_avg" if adam else "momentum_buffer") for state in states]
    seconds = [state["exp_avg_sq"] for state in states] if adam else [*none]
    counters = [state["step"] for state in states] if adam else [*none]
    return Rows(params, firsts, seconds, shadows, [*none], counters, [number[id(p)] for p in params])


def _parts(groups: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """(group, some of its parameters that have gradients): together as many elements as are FP32 at once."""
    for group in groups:
        members, room = list[Any](), 0
        for p in group["params"]:
            if p.grad is None:
                continue
            if members and p.numel() > room:
                yield group, members
                members = []
            room = room - p.numel() if members else TOGETHER.get(p.device.type, 1 << 20) - p.numel()
            members.append(p)
        if members:
            yield group, members


def _ready(p: Any, grad: Any, factors: Sequence[Tensor]) -> Any:
    """The gradient as torch's update reads it."""
    ready = grad.to(p.dtype)
    for factor in factors:
        ready = ready * factor.to(ready.device)
    return ready


def _values(grad: Any) -> Any:
    return grad.coalesce().values() if grad.is_sparse else grad


__all__ = ["DEVICES", "ReadingLow"]
