"""A call's arguments: the tensors that are the graph's inputs, and all else, which is part of its signature."""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.tensors import pytree

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class TENSOR:
    """Stands where a tensor goes."""


class Batch:
    """A call's arguments as a flat list of tensors, and what it takes to put them back.

    A graph is compiled for dense tensors in one order of dimensions.  Views of another layout (a transpose, every
    second column) are copied, so that they need no graph of their own.
    """

    def __init__(self, args: Any, kwargs: Any) -> None:
        leaves, self.tree = pytree.tree_flatten((args, kwargs))
        self.given: list[Tensor] = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.formats = tuple(map(_format, self.given))
        self.tensors = [t if f else t.detach().contiguous() for t, f in zip(self.given, self.formats, strict=True)]
        self.others = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if o is TENSOR else o for o in self.others], self.tree)

    def signature(self) -> tuple[Any, ...]:
        """All that a graph depends on but the sizes. True, 1 and 1.0 are three signatures."""
        formats = tuple(f or "contiguous" for f in self.formats)
        tensors = tuple((t.dtype, t.device, t.dim()) for t in self.tensors)
        return self.tree, tuple(map(_signature, self.others)), tuple(map(type, self.others)), tensors, formats

    def shapes(self) -> tuple[torch.Size, ...]:
        return tuple(t.shape for t in self.tensors)

    def write_back(self) -> None:
        """Where the model wrote to its input, and that was copied: write to what the caller holds."""
        for given, copy in zip(self.given, self.tensors, strict=True):
            if given is not copy:
                given.detach().copy_(copy)

    def refuse_objects(self) -> None:
        """Refuse arguments that cannot be part of a signature.

        Raises:
          TrainingError: MP532.
        """
        for leaf in self.others:
            if not _is_plain(leaf):
                raise TrainingError(
                    "MP532",
                    f"an argument of the step is a {type(leaf).__name__}",
                    why="its tensors would be frozen into the graph",
                    try_="step(**batch), or pass its tensors one by one",
                )


def _signature(leaf: Any) -> Any:
    """What of an argument a graph depends on, as it is now: 0.0 is not -0.0, and an object is what it holds."""
    if isinstance(leaf, (float, complex)) and not isinstance(leaf, enum.Enum):
        return repr(leaf)
    if isinstance(leaf, _PLAIN) or not hasattr(leaf, "__dict__") or isinstance(leaf, types.FunctionType):
        return leaf
    try:
        return type(leaf), _held(leaf, ())
    except TypeError:
        return leaf  # `refuse_objects` says what is wrong with it


def _held(item: Any, above: tuple[int, ...]) -> Any:
    """`item` as a value that later changes of it do not change.

    Raises:
      TypeError: for what can be neither compared nor looked into.
    """
    if isinstance(item, Tensor):
        raise TypeError("a tensor inside of an object")
    if isinstance(item, (float, complex)):
        return repr(item)
    if isinstance(item, (*_PLAIN, types.FunctionType)) or id(item) in above:
        return type(item), item if isinstance(item, _PLAIN) or callable(item) else id(item)
    above = (*above, id(item))
    if isinstance(item, Mapping):
        return tuple((_held(k, above), _held(v, above)) for k, v in item.items())
    if isinstance(item, (list, tuple)):
        return type(item), tuple(_held(v, above) for v in item)
    if isinstance(item, (set, frozenset)):
        return frozenset(_held(v, above) for v in item)
    slots = {name: getattr(item, name, None) for name in _slots(item)}
    state = {**getattr(item, "__dict__", {}), **slots}
    return type(item), (id(item) if not state else _held(state, above))


def _format(tensor: Tensor) -> str:
    """How a dense tensor is laid out; "" for one that is to be copied."""
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    if tensor.is_contiguous():
        return "contiguous"
    other = _FORMATS.get(tensor.dim())
    return str(other) if other is not None and tensor.is_contiguous(memory_format=other) else ""


_PLAIN = (str, bytes, int, float, complex, bool, type(None), enum.Enum, torch.dtype, torch.device, torch.Size, type,
          slice, range, nn.Module)  # fmt: skip


def _is_plain(leaf: Any) -> bool:
    if isinstance(leaf, _PLAIN) or callable(leaf):
        return True
    if isinstance(leaf, Mapping):
        return False
    try:
        hash(_held(leaf, ()))
    except TypeError:
        return False
    return True


def _slots(leaf: Any) -> Sequence[str]:
    found = getattr(type(leaf), "__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)
