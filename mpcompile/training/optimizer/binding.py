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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.optimizers import state_maker
from mpcompile.torch_internals.patches import as_if_compiling
from mpcompile.training.optimizer.hosts import Optimizers, torch_class
from mpcompile.training.optimizer.step_counters import STARTED, Shared, counters_of, resync
from mpcompile.training.optimizer.tensor_numbers import NumbersAsTensors, Test, tensor_builtins

Take = Callable[[torch.optim.Optimizer, Tensor], None]
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
    """What the optimizers of a step update, in the order in which a graph takes it.

    Fields:
      optimizers: the user's, with their groups numbered through.
      params: their parameters that get a gradient; groups: the group of each.
      fused: its update is ATen's fused kernel, which takes plain numbers (`baked`) apart from the lr.
      capturable: its branch-free code is traced.
      slots: every float of the groups.
      tensors: (parameter, state key) of each state tensor; shared: the 0-dim states.
      guards: comparisons of numbers that the trace relied on.
    """

    optimizers: Optimizers
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
        groups = self.optimizers.groups
        return [float(slot.read(groups)) for slot in self.slots]

    def holds(self, numbers: Sequence[float]) -> bool:
        """True when the traced update is right for these numbers."""
        same = all(numbers[i] == value for i, value in self.baked.items())
        return same and all(test(numbers) == outcome for test, outcome in self.guards)

    def resync(self) -> None:
        """The counters may have been moved by something else."""
        resync(self.shared)

    def states(self) -> list[dict[str, Any]]:
        """The state of each parameter, in its optimizer; one without a state gets none by this look."""
        owners = self.optimizers.owners()
        return [owners[number].state.get(param, {}) for param, number in zip(self.params, self.groups, strict=True)]

    def state_tensors(self) -> list[Tensor]:
        states = self.states()
        return [states[i][key] for i, key in self.tensors]

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
        started = {i: s for one, s in zip(self.shared, shared, strict=True) if one.key == STARTED for i in one.members}
        held: list[dict[str, Tensor]] = [{} for _ in params]
        for (i, key), tensor in zip(self.tensors, states, strict=True):
            held[i][key] = tensor
        for one, scalar in zip(self.shared, shared, strict=True):
            for i in one.members if one.key != STARTED else ():
                held[i][one.key] = scalar.clone()
        self.guards.clear()
        with NumbersAsTensors(list(zip(values, self.numbers(), strict=True)), self.guards):
            twins = self._twins(values, params, grads, held, self.groups, started)
            self._step(twins)
        after = {id(p): state for twin in twins for p, state in twin.state.items()}
        return [
            torch.ones_like(s) if one.key == STARTED else after[id(params[one.members[0]])][one.key]
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
        groups = self.optimizers.groups
        values = [lr(s.group) if s.key == "lr" else float(s.read(groups)) for s in self.slots]
        self.baked = {i: v for i, v in enumerate(values) if isinstance(v, float)}
        twins = self._twins(values, params, grads, states, [self.groups[i] for i in members], {})
        for twin in twins:
            twin.found_inf, twin.grad_scale = found_inf, None
        self._step(twins)

    def _step(self, twins: Sequence[Any]) -> None:
        for twin in twins:
            step = inspect.unwrap(type(twin).step)
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(tensor_builtins(step.__module__))
                if self.capturable:
                    # Off the accelerators, the branch-free code wants a device unless something compiles it.
                    stack.enter_context(as_if_compiling())
                try:
                    step(twin)
                except KeyError as error:
                    raise untraceable(self.optimizers, f"its state has no {error} (a flag that came later?)") from error

    def _twins(
        self,
        values: Sequence[Any],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        groups: Sequence[int],
        started: dict[int, Tensor],
    ) -> list[Any]:
        """Optimizers of the same classes whose groups hold stand-ins; the user's own are not touched.

        Args:
          started: per parameter, the flag that its first step was taken, where its optimizer asks (SGD's dampening).
        """
        numbered = [self._flags({**group, "params": []}) for group in self.optimizers.groups]
        for slot, value in zip(self.slots, values, strict=True):
            _put(numbered[slot.group], slot, value)
        # Parameters that began at different steps are groups of their own.
        made: dict[tuple[int, int], dict[str, Any]] = {(number, 0): group for number, group in enumerate(numbered)}
        for i, (param, grad, number) in enumerate(zip(params, grads, groups, strict=True)):
            param.grad, flag = grad, started.get(i)
            if flag is not None and (number, id(flag)) not in made:
                # SGD's first buffer is the gradient itself: momentum * 0 + (1 - dampening * 0) * grad.
                dampening = numbered[number]["dampening"] * flag
                made[number, id(flag)] = {**numbered[number], "params": [], "dampening": dampening}
            made[number, 0 if flag is None else id(flag)]["params"].append(param)
        place, first, twins = {id(p): i for i, p in enumerate(params)}, 0, []
        for optimizer in self.optimizers:
            twin: Any = object.__new__(type(optimizer))
            twin.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})
            mine = range(first, first + len(optimizer.param_groups))
            first = mine.stop
            twin.param_groups = [group for (number, _), group in made.items() if number in mine]
            held = [p for group in twin.param_groups for p in group["params"]]
            twin.state = defaultdict(dict, {p: dict(states[place[id(p)]]) for p in held})
            twins += [twin] if held else []
        return twins

    def _flags(self, group: dict[str, Any]) -> dict[str, Any]:
        ours = {"foreach": False, "fused": self.fused, "capturable": self.capturable, "differentiable": False}
        return {**group, **{k: v for k, v in ours.items() if k in group}}


def bind(optimizers: Optimizers, trained: Sequence[Tensor], take: Take | None = None) -> Binding:
    """Make the state of `optimizers` for the parameters `trained` (those with a gradient), and list it.

    Args:
      take: called with each optimizer and parameter as soon as its state is made; it may make that smaller.

    Raises:
      TrainingError: MP521, for an optimizer that is not traceable; MP522, when they hold none of `trained`.
    """
    wanted = {id(p) for p in trained}
    pairs = [(p, i) for i, group in enumerate(optimizers.groups) for p in group["params"] if id(p) in wanted]
    if not pairs:
        raise TrainingError("MP522", f"the {optimizers.name} holds no parameter of the model that is trained")
    binding = Binding(optimizers, [p for p, _ in pairs], [i for _, i in pairs])
    owners = optimizers.owners()
    for optimizer in optimizers:
        counters_of(optimizer).withdraw(optimizer.state)
    begun = [_has_tensors(owners[i].state.get(p)) for p, i in pairs]
    for optimizer in optimizers:
        mine = [(p, old) for (p, i), old in zip(pairs, begun, strict=True) if owners[i] is optimizer]
        if mine:
            # One by one, where what is made for one is made smaller before that of the next: never all in FP32.
            for some in [[p] for p, _ in mine] if take else [[p for p, _ in mine]]:
                _make_state(optimizer, some)
                if take is not None:
                    take(optimizer, some[0])
            counters_of(optimizer).fresh.update({id(p): p for p, old in mine if not old})
    binding.slots = list(_slots(optimizers.groups))
    _list_state(binding, begun)
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


def untraceable(optimizers: Optimizers, why: str) -> TrainingError:
    return TrainingError(
        "MP521",
        f"the update of {optimizers.name} cannot be emitted as a graph",
        why=why,
        try_="the drop-in way: loss = mp(x); loss.backward(); optimizer.step()",
    )


def can_fuse(optimizers: Optimizers, trained: Sequence[Tensor]) -> bool:
    """True when ATen has a fused kernel for all of this update."""
    kernels = ("cpu", "cuda")
    plain = all(torch_class(one) in FUSED for one in optimizers) and all(p.device.type in kernels for p in trained)
    adagrad = any(isinstance(one, torch.optim.Adagrad) for one in optimizers)
    if adagrad and any(p.device.type != "cpu" for p in trained):
        return False
    return plain and not any(g.get("differentiable") or g.get("dampening") for g in optimizers.groups)


def _make_state(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
    """The state that the optimizer itself would make at its first step."""
    make = state_maker(optimizer)
    if make is None or isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise untraceable(Optimizers(optimizer), "it is not one of torch.optim's dense optimizers")
    kept, ours = [p.grad for p in params], {id(p) for p in params}
    try:
        for p in params:
            # Only its shape is looked at: one element, stretched.
            p.grad = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
        for group in optimizer.param_groups:
            make({**group, "params": [p for p in group["params"] if id(p) in ours]})
    except KeyError as error:
        raise untraceable(Optimizers(optimizer), f"its state has no {error}: a flag that came later?") from error
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


def _list_state(binding: Binding, begun: Sequence[bool]) -> None:
    """Fill `tensors` and `shared`; `begun` says which parameters had state before."""
    scalars, groups, owners = list[dict[str, Tensor]](), binding.optimizers.groups, binding.optimizers.owners()
    for i, (p, held) in enumerate(zip(binding.params, binding.states(), strict=True)):
        state = {k: v for k, v in held.items() if isinstance(v, Tensor)}
        scalars.append({k: v for k, v in state.items() if v.dim() == 0 and (p.dim() or k == "step")})
        binding.tensors += [(i, key) for key in state if key not in scalars[i]]
        group = groups[binding.groups[i]]
        if isinstance(owners[binding.groups[i]], torch.optim.SGD) and group["momentum"] and group["dampening"]:
            scalars[i][STARTED] = torch.tensor(float(begun[i]))
    for optimizer in binding.optimizers:
        mine = [i for i, number in enumerate(binding.groups) if owners[number] is optimizer]
        found = counters_of(optimizer).of(
            optimizer.state,
            [binding.params[i] for i in mine],
            [binding.groups[i] for i in mine],
            [scalars[i] for i in mine],
        )
        binding.shared += [replace(one, members=[mine[i] for i in one.members]) for one in found]
    binding.resync()


def _has_tensors(state: dict[str, Any] | None) -> bool:
    return any(isinstance(v, Tensor) for v in (state or {}).values())


def is_number(key: str, value: Any) -> bool:
    """True for what a graph reads as a number; all else in a group is a branch that its trace takes."""
    if isinstance(value, (tuple, list)):
        return key not in _NOT_NUMBERS and any(is_number(key, v) for v in value)
    # Defaults such as weight_decay=0 are ints that any later value makes a float.
    return key not in _NOT_NUMBERS and (isinstance(value, (float, Tensor)) or type(value) is int)


def _slots(groups: Sequence[dict[str, Any]]) -> Iterator[Slot]:
    for number, group in enumerate(groups):
        for key, value in group.items():
            if isinstance(value, (tuple, list)):
                yield from (Slot(number, key, i) for i, v in enumerate(value) if is_number(key, v))
            elif is_number(key, value):
                yield Slot(number, key)


def _put(group: dict[str, Any], slot: Slot, value: Any) -> None:
    if slot.index is None:
        group[slot.key] = value
        return
    items = list(group[slot.key])
    items[slot.index] = value
    group[slot.key] = tuple(items)
