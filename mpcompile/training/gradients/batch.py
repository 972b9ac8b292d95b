"""A call's arguments: the tensors that are the graph's inputs, and all else, which is part of its signature."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile.errors import TrainingError, page

page(
    "MP532",
    "An argument that hides its tensors",
    "Tensors, numbers, words, and lists, tuples and dicts of them are the arguments of a step. An object of another "
    "class cannot be looked into: its tensors would be frozen into the graph.",
    "Pass the tensors: step(**batch), step(batch.x, batch.y), dict(batch); or teach torch the class with "
    "torch.utils._pytree.register_pytree_node.",
)

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Hole:
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
        self.others = tuple(Hole if isinstance(leaf, Tensor) else leaf for leaf in leaves)

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if o is Hole else o for o in self.others], self.tree)

    def kind(self) -> tuple[Any, ...]:
        """All that a graph depends on but the sizes. True, 1 and 1.0 are three signatures."""
        formats = tuple(f or "contiguous" for f in self.formats)
        tensors = tuple((t.dtype, t.device, t.dim()) for t in self.tensors)
        return self.tree, self.others, tuple(map(type, self.others)), tensors, formats

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
        hash(leaf)
    except TypeError:
        return False
    held = [*getattr(leaf, "__dict__", {}).values(), *(getattr(leaf, s, None) for s in _slots(leaf))]
    return not any(isinstance(v, Tensor) for v in pytree.tree_leaves(held))


def _slots(leaf: Any) -> Sequence[str]:
    found = getattr(type(leaf), "__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)
