"""An optimizer's update as part of a trace, from torch.optim's own code.

`bind` lists what an optimizer updates and reads: parameters, state tensors, 0-dim state (step counters) and the
numbers of its groups.  `Binding.apply` runs the optimizer's own ``step`` on traced stand-ins.  The numbers (lr, weight
decay, betas…) are elements of one FP64 tensor that is filled anew when they change, so a scheduler changes no graph;
a branch of the optimizer on a number (``if weight_decay != 0``) is settled at trace time and remembered as a guard.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mpcompile.errors import TrainingError, page
from mpcompile.training.optimizer.step_counters import STARTED, Counters, Shared, resync
from mpcompile.training.optimizer.tensor_numbers import NumbersAsTensors, Test, tensor_builtins

page(
    "MP521",
    "An optimizer whose update cannot be emitted",
    "The training step traces the optimizer's own update into its graph. This one reads values of tensors to decide "
    "what to do (LBFGS), works on sparse gradients (SparseAdam), or is not built like torch.optim's.",
    "Use the drop-in way: `loss = mp(x); loss.backward(); optimizer.step()` works with every optimizer.",
)
page(
    "MP522",
    "An optimizer that does not fit the model",
    "None of the optimizer's parameters is a parameter of the model that gets a gradient, or one of them is not FP32.",
    "Build the optimizer from `model.parameters()`, with the FP32 parameters that are to be trained.",
)

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
# Muon's iteration count and polynomial are part of its code: nothing schedules them.
_NOT_NUMBERS = ("params", "initial_lr", "param_names", "ns_steps", "ns_coefficients")


@dataclass(frozen=True)
class Slot:
    """Where a number stands: `param_groups[group][key]`, or element `index` of a tuple there."""

    group: int
    key: str
    index: int | None = None

    def read(self, groups: Sequence[dict[str, Any]]) -> Any:
        value = groups[self.group][self.key]
        return value if self.index is None else value[self.index]


@dataclass
class Binding:
    """What one optimizer updates, in the order in which a graph takes it.

    Fields:
      optimizer: the user's.
      params: its parameters that get a gradient; groups: the group of each.
      fused: its update is ATen's fused kernel, which takes plain numbers (`baked`) apart from the lr.
      capturable: its branch-free code is traced.
      slots: every float of the groups.
      tensors: (parameter, state key) of each state tensor; shared: the 0-dim states.
      guards: comparisons of numbers that the trace relied on.
    """

    optimizer: torch.optim.Optimizer
    params: list[Tensor]
    groups: list[int]
    fused: bool = False
    capturable: bool = False
    slots: list[Slot] = field(default_factory=list)
    tensors: list[tuple[int, str]] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)
    guards: list[tuple[Test, bool]] = field(default_factory=list)
    baked: dict[int, float] = field(default_factory=dict)

    def numbers(self) -> list[float]:
        """The groups' numbers now."""
        groups = self.optimizer.param_groups
        return [float(slot.read(groups)) for slot in self.slots]

    def holds(self, numbers: Sequence[float]) -> bool:
        """True when the traced update is right for these numbers."""
        same = all(numbers[i] == value for i, value in self.baked.items())
        return same and all(test(numbers) == outcome for test, outcome in self.guards)

    def resync(self) -> None:
        """The counters may have been moved by something else."""
        resync(self.shared)

    def state_tensors(self) -> list[Tensor]:
        state = self.optimizer.state
        return [state[self.params[i]][key] for i, key in self.tensors]

    def places(self) -> list[list[tuple[str, bool]]]:
        """Per parameter, the (key, whether it is a counter) of each of its states, as fused kernels take them."""
        found: list[list[tuple[str, bool]]] = [[] for _ in self.params]
        for i, key in self.tensors:
            found[i].append((key, False))
        for one in self.shared:
            for i in one.members:
                found[i].append((one.key, True))
        return found

    def apply(
        self,
        numbers: Tensor,
        shared: Sequence[Tensor],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Tensor],
    ) -> list[Tensor]:
        """In a trace: the optimizer's own step on `params` and `states`, in place; returns the new shared scalars.

        Args:
          numbers: FP64 vector, one element per slot.
          shared: one 0-dim FP64 tensor per entry of `self.shared`.
          params, grads, states: stand-ins, one each per entry of `params`, `params`, `tensors`.

        Raises:
          UndecidableError: the code asks a tensor for its truth value.
        """
        values = [numbers[i] for i in range(len(self.slots))]
        started = {
            self.groups[one.members[0]]: s for one, s in zip(self.shared, shared, strict=True) if one.key == STARTED
        }
        self.guards.clear()
        with NumbersAsTensors(list(zip(values, self.numbers(), strict=True)), self.guards):
            twin = self._twin(values, params, grads, started, self.groups)
            for (i, key), tensor in zip(self.tensors, states, strict=True):
                twin.state[params[i]][key] = tensor
            for one, scalar in zip(self.shared, shared, strict=True):
                for i in one.members if one.key != STARTED else ():
                    twin.state[params[i]][one.key] = scalar.clone()
            self._step(twin)
        return [
            torch.ones_like(s) if one.key == STARTED else twin.state[params[one.members[0]]][one.key]
            for one, s in zip(self.shared, shared, strict=True)
        ]

    def apply_fused(
        self,
        lr: Callable[[int], Tensor],
        members: Sequence[int],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        found_inf: Tensor,
    ) -> None:
        """In a trace: the optimizer's own fused step on some parameters, in place.

        Args:
          lr: gives the lr of a group.
          members: the numbers of the parameters.
          params, grads, states: stand-ins, one each per member.
          found_inf: 0-dim, 0 or 1.
        """
        groups = self.optimizer.param_groups
        values = [lr(s.group) if s.key == "lr" else float(s.read(groups)) for s in self.slots]
        self.baked = {i: v for i, v in enumerate(values) if isinstance(v, float)}
        twin = self._twin(values, params, grads, {}, [self.groups[i] for i in members])
        for param, state in zip(params, states, strict=True):
            twin.state[param].update(state)
        twin.found_inf, twin.grad_scale = found_inf, None
        self._step(twin)

    def _step(self, twin: Any) -> None:
        step = inspect.unwrap(type(self.optimizer).step)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(tensor_builtins(step.__module__))
            if self.capturable:
                # Off the accelerators, the branch-free code wants a device unless something compiles it.
                stack.enter_context(mock.patch.object(torch.compiler, "is_compiling", return_value=True))
            step(twin)

    def _twin(
        self,
        values: Sequence[Any],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        started: dict[int, Tensor],
        groups: Sequence[int],
    ) -> Any:
        """An optimizer of the same class whose groups hold stand-ins; the user's own is not touched."""
        twin = object.__new__(type(self.optimizer))
        twin.__dict__.update(self.optimizer.__dict__)
        twin.state = defaultdict(dict)
        twin.param_groups = [self._flags(dict(group)) for group in self.optimizer.param_groups]
        for slot, value in zip(self.slots, values, strict=True):
            _put(twin.param_groups[slot.group], slot, value)
        for group in twin.param_groups:
            group["params"] = []
        for number, flag in started.items():
            # SGD's first buffer is the gradient itself: momentum * 0 + (1 - dampening * 0) * grad.
            twin.param_groups[number]["dampening"] = twin.param_groups[number]["dampening"] * flag
        for param, grad, number in zip(params, grads, groups, strict=True):
            param.grad = grad
            twin.param_groups[number]["params"].append(param)
        return twin

    def _flags(self, group: dict[str, Any]) -> dict[str, Any]:
        ours = {"foreach": False, "fused": self.fused, "capturable": self.capturable, "differentiable": False}
        return {**group, **{k: v for k, v in ours.items() if k in group}}


def bind(optimizer: torch.optim.Optimizer, trained: Sequence[Tensor], counters: Counters | None = None) -> Binding:
    """Make the state of `optimizer` for the parameters `trained` (those with a gradient), and list it.

    Args:
      counters: those of the optimizer's other bindings.

    Raises:
      TrainingError: MP521, for an optimizer that is not traceable; MP522, when it holds none of `trained`.
    """
    wanted = {id(p) for p in trained}
    pairs = [(p, i) for i, group in enumerate(optimizer.param_groups) for p in group["params"] if id(p) in wanted]
    if not pairs:
        raise TrainingError("MP522", f"the {type(optimizer).__name__} holds no parameter of the model that is trained")
    binding = Binding(optimizer, [p for p, _ in pairs], [i for _, i in pairs])
    fresh = {id(p) for p in binding.params if not optimizer.state.get(p)}
    _make_state(optimizer, binding.params)
    binding.slots = list(_slots(optimizer.param_groups))
    _list_state(binding, fresh, counters or Counters())
    return binding


def follow(binding: Binding, seen: list[float], target: Tensor, places: Sequence[int]) -> list[float] | None:
    """Take in the groups' numbers: those of `places` go to `target`. None when the trace does not hold for them.

    Args:
      seen: the numbers that were taken in last; returned as they are when none changed.
    """
    now = binding.numbers()
    if now == seen:
        return seen
    if not binding.holds(now):
        return None
    # From a fresh pinned tensor where there is a device: the copy then waits for nothing.
    staged = torch.tensor([now[i] for i in places], dtype=target.dtype, pin_memory=target.is_cuda)
    target.copy_(staged, non_blocking=True)
    return now


def untraceable(optimizer: torch.optim.Optimizer, why: str) -> TrainingError:
    return TrainingError(
        "MP521",
        f"the update of {type(optimizer).__name__} cannot be emitted as a graph",
        why=why,
        try_="the drop-in way: loss = mp(x); loss.backward(); optimizer.step()",
    )


def can_fuse(optimizer: torch.optim.Optimizer, trained: Sequence[Tensor]) -> bool:
    """True when ATen has a fused kernel for all of this update."""
    kernels = ("cpu", "cuda")
    plain = type(optimizer) in FUSED and all(p.device.type in kernels for p in trained)
    if isinstance(optimizer, torch.optim.Adagrad) and any(p.device.type != "cpu" for p in trained):
        return False
    return plain and not any(g.get("differentiable") or g.get("dampening") for g in optimizer.param_groups)


def _make_state(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
    """The state that the optimizer itself would make at its first step."""
    make = getattr(optimizer, "_init_group", None)
    if make is None or isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise untraceable(optimizer, "it is not one of torch.optim's dense optimizers")
    lists = len(inspect.signature(make).parameters) - 1
    kept, ours = [p.grad for p in params], {id(p) for p in params}
    try:
        for p in params:
            # Only its shape is looked at: one element, stretched.
            p.grad = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
        for group in optimizer.param_groups:
            make({**group, "params": [p for p in group["params"] if id(p) in ours]}, *([] for _ in range(lists)))
    finally:
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
    if isinstance(optimizer, torch.optim.SGD):
        _make_momentum(optimizer, ours)


def _make_momentum(optimizer: torch.optim.Optimizer, ours: set[int]) -> None:
    """SGD makes its buffers at the first update; zeros are the same then, where nothing is dampened."""
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if id(p) in ours and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)


def _list_state(binding: Binding, fresh: set[int], counters: Counters) -> None:
    """Fill `tensors` and `shared`."""
    optimizer, scalars = binding.optimizer, list[dict[str, Tensor]]()
    for i, p in enumerate(binding.params):
        state = {k: v for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
        scalars.append({k: v for k, v in state.items() if v.dim() == 0 and (p.dim() or k == "step")})
        binding.tensors += [(i, key) for key in state if key not in scalars[i]]
    binding.shared += counters.of(optimizer, binding.params, binding.groups, scalars)
    for number, group in enumerate(optimizer.param_groups):
        members = [i for i, g in enumerate(binding.groups) if g == number]
        if members and isinstance(optimizer, torch.optim.SGD) and group["momentum"] and group["dampening"]:
            begun = not fresh & {id(binding.params[i]) for i in members}
            device = binding.params[members[0]].device
            binding.shared.append(counters.started(number, members[0], device, begun))
    binding.resync()


def _slots(groups: Sequence[dict[str, Any]]) -> Iterator[Slot]:
    for number, group in enumerate(groups):
        for key, value in group.items():
            if key in _NOT_NUMBERS:
                continue
            # Defaults such as weight_decay=0 are ints that any later value makes a float.
            if isinstance(value, (float, Tensor)) or type(value) is int:
                yield Slot(number, key)
            elif isinstance(value, (tuple, list)):
                yield from (Slot(number, key, i) for i, v in enumerate(value) if isinstance(v, (float, Tensor)))


def _put(group: dict[str, Any], slot: Slot, value: Any) -> None:
    if slot.index is None:
        group[slot.key] = value
        return
    items = list(group[slot.key])
    items[slot.index] = value
    group[slot.key] = tuple(items)
