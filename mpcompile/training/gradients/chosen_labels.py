"""Labels chosen by a mask: how many, only the batch knows; the choice is made where a loss that runs whole reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpcompile.torch_internals.tensors import pytree


class Selected:
    """`source.masked_select(mask)`, not made yet. Whatever but a CTC loss asks for it gets the tensor itself."""

    def __init__(self, call: Callable[..., Tensor], source: Tensor, mask: Tensor) -> None:
        self.source, self.mask, self._call = source, mask, call
        self._made: Tensor | None = None

    def made(self) -> Tensor:
        if self._made is None:
            self._made = self._call(self.source, self.mask)
        return self._made

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return Tensor

    def __getattr__(self, name: str) -> Any:
        if name in _SAME_ELEMENTS:
            return lambda *args, **kwargs: Selected(self._call, getattr(self.source, name)(*args, **kwargs), self.mask)
        return getattr(self.made(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(_whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def is_selected(value: Any) -> bool:
    """True for a choice that is held back; to `isinstance` it is a tensor."""
    return type(value) is Selected


def _whole(value: Any) -> Any:
    return value.made() if is_selected(value) else value


# What gives the same elements, elsewhere or of another type.
_SAME_ELEMENTS = frozenset({"to", "long", "int", "cpu", "detach", "contiguous"})


def _delegated(name: str) -> Callable[..., Any]:
    def call(self: Selected, *args: Any) -> Any:
        return getattr(self.made(), name)(*map(_whole, args))

    return call


_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv mod neg eq ne lt le gt ge and or xor invert getitem setitem len "
    "bool int float index iter"
)
for _name in (f"__{word}__" for word in _OPERATORS.split()):
    setattr(Selected, _name, _delegated(_name))


def is_choice_of_labels(source: Any, mask: Any) -> bool:
    """Whole numbers chosen by a mask of their shape, with no gradient that would have to pass."""
    if is_selected(source) or not isinstance(source, Tensor) or not isinstance(mask, Tensor):
        return False
    return mask.dtype == torch.bool and not source.dtype.is_floating_point and source.shape == mask.shape


__all__ = ["Selected", "is_choice_of_labels", "is_selected"]
