"""Shadows as functions of their masters, and which masters take their gradients low.

A gradient that reaches a master is FP32, unless the master's optimizer reads low ones (`mpcompile.optim`).  Even then
nothing adds up in low: a gradient stays low only where it is the one gradient of its master, and one that lies there
when another comes is FP32 before that.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from mpcompile.torch_internals.tensors import foreach_copy

_LOCK = threading.RLock()


class Owed:
    """The gradients that the backward of one call owes its masters; let go, it owes them no more.

    Args:
      readers: where the debts are counted.
      masters: those that take low gradients, None in the place of each other.
    """

    def __init__(self, readers: LowReaders, masters: Sequence[torch.Tensor | None]) -> None:
        self.readers, self.masters, self.open = readers, masters, True
        self.ids = [id(master) for master in masters if master is not None]

    def close(self) -> bool:
        """Whether it was open."""
        with _LOCK:
            before, self.open = self.open, False
            if before:
                self.readers.owed.subtract(self.ids)
        return before

    def __del__(self) -> None:
        self.close()


class LowReaders:
    """The masters whose optimizers read low gradients, for as long as those live.

    Fields:
      owed: id of a master -> calls whose backward is still to come.
    """

    def __init__(self) -> None:
        self._optimizers: Any = WeakIdKeyDictionary()
        self.owed: Counter[int] = Counter()

    def add(self, masters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        """`optimizer` reads low gradients of these FP32 masters."""
        for master in masters:
            if master.dtype == torch.float32 and master.is_leaf and master.grad_dtype in (None, torch.float32):
                # Any type may then lie in `.grad`, and autograd casts none to another.
                master.grad_dtype = None
                self._optimizers[master] = weakref.ref(optimizer)

    def reads_low(self, master: torch.Tensor) -> bool:
        optimizer = self._optimizers.get(master)
        return optimizer is not None and optimizer() is not None and master.grad_dtype is None

    def owe(self, masters: Sequence[torch.Tensor]) -> Owed | None:
        """One more call of a graph will give these masters gradients; None where none of them takes low ones."""
        if not len(self._optimizers):
            return None
        low = [master if self.reads_low(master) else None for master in masters]
        if all(master is None for master in low):
            return None
        owed = Owed(self, low)
        with _LOCK:
            self.owed.update(owed.ids)
        return owed

    def settle(self, owed: Owed) -> list[bool]:
        """The backward of that call runs: which of its gradients may be low.

        One that could meet another on the way to its master is FP32: of a model that is called twice for one loss, or
        backwards of two calls in one, the first that comes is FP32 and the sum with it.
        """
        alone = [master is not None and self.owed[id(master)] == 1 for master in owed.masters]
        if not owed.close():
            alone = [False] * len(alone)
        for master in owed.masters:
            if master is not None and master.grad is not None and master.grad.dtype != torch.float32:
                master.grad = master.grad.float()
        return alone


READERS = LowReaders()


class UseShadows(torch.autograd.Function):
    """Reads several shadows in place of their masters; the gradients are cast by one call."""

    @staticmethod
    def forward(ctx: Any, owed: Owed | None, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.owed = owed
        return tuple(shadow.view_as(shadow) for shadow in given[len(given) // 2 :])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        kept = [False] * len(grads) if ctx.owed is None else READERS.settle(ctx.owed)
        low = [grad for grad, keep in zip(grads, kept, strict=True) if grad is not None and not keep]
        single = [torch.empty_like(grad, dtype=torch.float32) for grad in low]
        if low:  # else no weight of the group reached the loss (a detached branch), or all stay low
            foreach_copy(single, low)
        made = iter(single)
        given = [grad if grad is None or keep else next(made) for grad, keep in zip(grads, kept, strict=True)]
        return (None, *given, *(None,) * len(grads))


def use_shadows(
    masters: Sequence[torch.Tensor], shadows: Sequence[torch.Tensor], *, low: bool
) -> tuple[torch.Tensor, ...]:
    """The shadows, as one function of their masters: for calls op by op.

    Args:
      low: masters whose optimizers read low gradients may get such; a DistributedDataParallel sums FP32 ones.
    """
    owed = READERS.owe(masters) if low else None
    return UseShadows.apply(owed, *masters, *shadows)  # type: ignore[no-any-return,no-untyped-call]


__all__ = ["READERS", "LowReaders", "Owed", "UseShadows", "use_shadows"]
