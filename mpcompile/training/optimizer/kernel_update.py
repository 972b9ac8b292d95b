"""The update by kernels of our own, for the optimizers that have them: Adam, AdamW and SGD on CUDA.

Three launches for all parameters, 30 bytes of memory traffic a parameter (`mpcompile.runtime.kernels.update`).  This is how an
update *runs*: the emitted graph, its report and its exports are the same arithmetic in ATen's operations, made when
they are asked for (docs/decisions/0027-update-kernel.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from mpcompile.runtime.kernels.table import Rows
from mpcompile.runtime.kernels.update import Rule, Scale, UpdateKernel, adam_numbers, available, serves, sgd_numbers
from mpcompile.training.distributed.one_decision import decide
from mpcompile.training.loss_scale.scale import LossScale, ScaleState
from mpcompile.training.optimizer.binding import Binding
from mpcompile.training.optimizer.hosts import torch_class
from mpcompile.training.optimizer.traced_update import Spec

# The devices whose updates run by our kernels; the others have ATen's.
DEVICES = {"cuda"}
_ADAM = (torch.optim.Adam, torch.optim.AdamW)


class Emits(Protocol):
    """The same update in ATen's operations."""

    numbers: Tensor

    def emit(self) -> tuple[fx.GraphModule, list[Tensor | int]]: ...

    def holds(self) -> bool: ...


@dataclass
class KernelUpdate:
    """One update by our kernels, ready to run (the same interface as `Updater`).

    Fields:
      seen: the groups' numbers that the kernels have.
      kinds: what of them the kernels were compiled for.
      make: makes the same update in ATen's operations.
    """

    kernel: UpdateKernel
    binding: Binding
    seen: list[float]
    kinds: list[bool]
    scale: ScaleState
    seed: Tensor
    make: Callable[[], Emits]
    epoch: int = -1
    _made: Emits | None = None

    def __call__(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """(finite, norm, scale) after the update; everything else is written in place."""
        with torch.no_grad():
            results = self.kernel(grads)
            # What a graph in ATen's operations reads of the counters is a copy.
            self.binding.resync()
        return results

    @property
    def emitted(self) -> Emits:
        """The same update in ATen's operations."""
        if self._made is None:
            self._made = self.make()
        return self._made

    @property
    def numbers(self) -> Tensor:
        """The groups' numbers as the emitted graph reads them."""
        return self.emitted.numbers

    def emit(self) -> tuple[fx.GraphModule, list[Tensor | int]]:
        """The update's graph, and what each input is: a live tensor, or the number of a gradient."""
        return self.emitted.emit()

    def holds(self) -> bool:
        """Take in the groups' numbers; False when they need other kernels or another graph."""
        self.kernel.prepare()
        if self._made is not None and not self._made.holds():
            return False
        now = self.binding.numbers()
        if now != self.seen:
            groups = _numbers(self.binding)
            if groups is None or _kinds(self.binding) != self.kinds:
                return False
            self.kernel.set_groups(groups)
            self.seen = now
        return True


def build(
    spec: Spec,
    binding: Binding,
    state: ScaleState,
    seed: Tensor,
    halves: dict[int, Tensor],
    lows: dict[int, Tensor | None],
    shadows: Sequence[Tensor],
    grads: Sequence[Tensor],
    make: Callable[[], Emits],
) -> KernelUpdate | None:
    """The update by our kernels, or None where they do not serve.

    Args:
      halves: the low halves of split masters, by parameter; shadows: as `Spec.shadows` lists them.
      lows: the scales of the states that are codes, by their number in `binding.tensors`.
      grads: examples.
      make: makes the same update in ATen's operations.
    """
    device, groups = binding.params[0].device, _numbers(binding)
    if device.type not in DEVICES or not available(device.type) or groups is None:
        return None
    found = {g.dtype for g in grads} | {dtype for _, dtype in spec.shadows} | {torch.bfloat16 for _ in halves}
    found -= {torch.float32}
    low = next(iter(found), torch.bfloat16)
    rows = _rows(spec, binding, halves, lows, shadows)
    plain = all(g.layout == torch.strided and g.device == device for g in grads)
    known = len(found) <= 1 and low in (torch.bfloat16, torch.float16)
    if rows is None or not plain or not known or not serves(rows, low):
        return None
    kernel = UpdateKernel(
        rows, spec.parts, grads, adam=rows.seconds[0] is not None, groups=groups, low=low, max_norm=spec.max_grad_norm,
        rule=_rule(spec.rule), scale=Scale(*state, seed), accumulate=spec.accumulate,
        together=functools.partial(decide, spec.ranks) if spec.ranks is not None else None,
    )  # fmt: skip
    return KernelUpdate(kernel, binding, binding.numbers(), _kinds(binding), state, seed, make)


def _groups(binding: Binding) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any]]]:
    return zip(binding.optimizers.owners(), binding.optimizers.groups, strict=True)


def _numbers(binding: Binding) -> list[list[float]] | None:
    """The groups' numbers as the kernels read them; None where one asks for what they have not."""
    each = list(_groups(binding))
    if all(torch_class(owner) in _ADAM for owner, _ in each):
        if any(group.get("amsgrad") or group.get("differentiable") for _, group in each):
            return None
        return [
            adam_numbers(group, bool(group.get("decoupled_weight_decay", isinstance(owner, torch.optim.AdamW))))
            for owner, group in each
        ]
    plain = all(torch_class(owner) is torch.optim.SGD for owner, _ in each)
    # The first, undampened step of each parameter is a branch of the traced update.
    if not plain or any(group.get("differentiable") or group["dampening"] for _, group in each):
        return None
    return [sgd_numbers(group) for _, group in each]


def _kinds(binding: Binding) -> list[bool]:
    """What decides which states there are: SGD's momentum."""
    return [bool(group.get("momentum")) for _, group in _groups(binding)]


def _rows(
    spec: Spec, binding: Binding, halves: dict[int, Tensor], lows: dict[int, Tensor | None], shadows: Sequence[Tensor]
) -> Rows | None:
    """What the kernels read and write; None where a master has two shadows."""
    count, states = len(binding.params), binding.states()
    held = {i: shadow for (i, _), shadow in zip(spec.shadows, shadows, strict=True)}
    if len(held) < len(shadows):
        return None
    kinds = _kinds(binding)
    if torch_class(binding.optimizers.owners()[0]) in _ADAM:
        firsts = [state["exp_avg"] for state in states]
        seconds, counters = [state["exp_avg_sq"] for state in states], [state["step"] for state in states]
    else:
        pairs = zip(states, binding.groups, strict=True)
        firsts = [state["momentum_buffer"] if kinds[number] else None for state, number in pairs]
        seconds, counters = [None] * count, [None] * count
    return Rows(
        binding.params, firsts, seconds, [held.get(i) for i in range(count)], [halves.get(i) for i in range(count)],
        counters, binding.groups, *_scales(binding, lows),
    )  # fmt: skip


def _scales(binding: Binding, lows: dict[int, Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The scales of first and second moments that are codes, by parameter."""
    found = {binding.tensors[number]: scales for number, scales in lows.items()}
    firsts = [found.get((i, "exp_avg"), found.get((i, "momentum_buffer"))) for i in range(len(binding.params))]
    return firsts, [found.get((i, "exp_avg_sq")) for i in range(len(binding.params))]


def _rule(rule: LossScale) -> Rule:
    return Rule(
        rule.kind == "dynamic", rule.growth, rule.backoff, rule.interval, rule.floor, rule.cap, rule.hysteresis,
        rule.refill == "clean-step", rule.is_off,
    )  # fmt: skip
