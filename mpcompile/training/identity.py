"""What a compiled step stands on of its model: compared before each call, by a fixed number of calls of C code.

A graph was made for tensors that it holds by identity, of a layout, in modules with hooks.  Nothing of that is trusted:
`ModelIdentity.changed` says whether a parameter, a buffer, a module, a layout or a hook is another one than it was
(`docs/explanation/guarantees.md` lists what is seen and how).  Modes (training or evaluation, what is frozen) are no
change: they are part of a graph's signature, and `modes` names them by a number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.torch_internals.modules import GLOBAL_HOOKS, MODULE_HOOKS, MODULE_TENSORS
from mpcompile.torch_internals.tensors import TensorGuards, gradient_hooks, post_accumulate_hooks

_TRAINING, _CLASS_FORWARD = operator.itemgetter("training"), operator.attrgetter("forward")
_CLASS_CALL = operator.attrgetter("__call__")
_GRADIENT_HOOKS = (gradient_hooks, post_accumulate_hooks)
_REQUIRES_GRAD = operator.attrgetter("requires_grad")
_LAYOUT = operator.attrgetter("shape", "dtype", "device", "layout")


class Tables:
    """Dictionaries, and whether they hold the very objects that they held.

    Equality of dictionaries asks for identity first, which is what makes this quick.  It goes on to ask different
    tensors whether they are equal: several elements are an error then, which says enough; what has one element at most
    is compared by identity apart.
    """

    def __init__(self, tables: Sequence[dict[Any, Any]]) -> None:
        self._tables, self._copies = list(tables), list(map(dict, tables))
        small = [(t, k) for t in tables for k, v in t.items() if isinstance(v, Tensor) and v.numel() <= 1]
        self._of, self._keys = [t for t, _ in small], [k for _, k in small]
        self._small = [t[k] for t, k in small]

    def values(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._tables))

    def same(self) -> bool:
        """True when the tables hold what they held."""
        try:
            equal = self._tables == self._copies
        except (RuntimeError, ValueError, TypeError):
            return False
        return equal and all(map(operator.is_, map(dict.get, self._of, self._keys), self._small))


class ModelIdentity:
    """The tensors, modules and hooks of a model, of a loss that is a module, and of an optimizer that holds more.

    Args:
      roots: the model and the loss; what is no module is left out.
      others: gives tensors that belong to none of them (an optimizer's parameters).
    """

    def __init__(self, roots: Iterable[Any], others: Callable[[], Sequence[Tensor]] = tuple) -> None:
        self._roots, self._others = [root for root in roots if isinstance(root, nn.Module)], others
        self._modes: dict[Any, int] = {}
        self.take()

    def take(self) -> None:
        """Things are as they should be: hold them as they are."""
        self.modules = list({id(m): m for root in self._roots for m in root.modules()}.values())
        self._dicts = list(map(vars, self.modules))
        tables = [d[name] for d in self._dicts for name in MODULE_TENSORS]
        self._empty, self._full = [t for t in tables if not t], Tables([t for t in tables if t])
        self._types = list(map(type, self.modules))
        self._classes = list(dict.fromkeys(self._types))
        self._forwards = list(map(_CLASS_FORWARD, self._classes))
        self._calls = list(map(_CLASS_CALL, self._classes))
        self._own_forwards = self._forwards_of_instances()
        self._take_hooks()
        held = (t for t in (*self._full.values(), *self._others()) if isinstance(t, Tensor))
        self.tensors = list({id(t): t for t in held}.values())
        self._take_layout()
        self._training = list(map(_TRAINING, self._dicts))
        self._number_modes()

    def changed(self) -> bool:
        """True when what was compiled may be of other tensors, modules or hooks. Asks no device anything."""
        return not (self._same_tree() and self._same_hooks() and self._same_layout())

    def modes(self) -> int:
        """A number for the modes of all modules and the frozen state of all tensors, after `changed` has looked."""
        now = list(map(_TRAINING, self._dicts))
        if now != self._training:
            self._training = now
            self._number_modes()
        return self._mode

    def _number_modes(self) -> None:
        self._mode = self._modes.setdefault((tuple(self._training), tuple(self._wanted)), len(self._modes))

    def tensors_of_modules(self) -> list[Tensor]:
        """The parameters and buffers that the modules own now."""
        return [t for root in self._roots for t in chain(root.parameters(), root.buffers())]

    # ------------------------------------------------------------------------------------------------------- the tree

    def _same_tree(self) -> bool:
        return (
            not any(self._empty)
            and self._full.same()
            and _identical(map(type, self.modules), self._types)
            and _identical(map(_CLASS_FORWARD, self._classes), self._forwards)
            and _identical(map(_CLASS_CALL, self._classes), self._calls)
            and _identical(self._forwards_of_instances(), self._own_forwards)
        )

    def _forwards_of_instances(self) -> list[Any]:
        return list(map(dict.get, self._dicts, repeat("forward")))

    # ------------------------------------------------------------------------------------------------------ the hooks

    def _take_hooks(self) -> None:
        places = [(d, name) for d in self._dicts for name in MODULE_HOOKS]
        self._unhooked = [d[name] for d, name in places if not d[name]]
        self._hooked = [(d, name) for d, name in places if d[name]]
        self._hooks = self._module_hooks()

    def _same_hooks(self) -> bool:
        return not any(self._unhooked) and self._module_hooks() == self._hooks

    def _module_hooks(self) -> list[Any]:
        """(key, hook) of those on every module of the process, and of those on the model's."""
        return _pairs(chain(GLOBAL_HOOKS, (own[name] for own, name in self._hooked)))

    def _gradient_hooks(self) -> list[Any]:
        """(key, hook) of every gradient hook: those of a graph that was made before are no part of it."""
        return _pairs(filter(None, chain.from_iterable(map(get, self.tensors) for get in _GRADIENT_HOOKS)))

    # ----------------------------------------------------------------------------------------------------- the layout

    def _take_layout(self) -> None:
        self._strided = [t for t in self.tensors if t.layout == torch.strided]
        self._guards = TensorGuards(self._strided)
        self._layout = _layouts(self.tensors)
        self._wanted = list(map(_REQUIRES_GRAD, self.tensors))
        self._tensor_hooks = self._gradient_hooks()

    def _same_layout(self) -> bool:
        if self._gradient_hooks() != self._tensor_hooks:
            return False
        if self._guards.hold():
            return True
        # What is frozen is a mode. What the guards see of the thread (an autocast, a dispatch mode) is no change.
        if _layouts(self.tensors) != self._layout:
            return False
        wanted = list(map(_REQUIRES_GRAD, self.tensors))
        if wanted != self._wanted:
            self._wanted, self._guards = wanted, TensorGuards(self._strided)
            self._number_modes()
        return True


def _identical(now: Iterable[Any], before: Sequence[Any]) -> bool:
    """True when both are the same objects in the same order."""
    now = list(now)
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _pairs(tables: Iterable[Any]) -> list[Any]:
    return [pair for table in tables for pair in table.items()]


def _layouts(tensors: Sequence[Tensor]) -> list[Any]:
    strides = [t.stride() if t.layout == torch.strided else () for t in tensors]
    return list(zip(map(_LAYOUT, tensors), strides, strict=True))
