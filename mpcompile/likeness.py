"""A wrapper's class that looks like the class of its model to whoever asks.

A host that is given a wrapper asks it what it is: `isinstance`, ``type(model).__name__``, `inspect.signature` of
``forward``, ``len``.  Where the answers are the wrapper's own, the host takes another path, in silence (another loss
for an unknown name, another way to save).  So each class of models has a class of wrappers of its own, which answers
as the model does.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# What makes an object what it is: a wrapper keeps its own.
_KEPT = frozenset({
    "__init__", "__new__", "__call__", "__class__", "__class_getitem__", "__init_subclass__", "__subclasshook__",
    "__getattr__", "__getattribute__", "__setattr__", "__delattr__", "__reduce__", "__reduce_ex__", "__getstate__",
    "__setstate__", "__getnewargs__", "__getnewargs_ex__", "__copy__", "__deepcopy__", "__del__", "__sizeof__",
    "forward", "_call_impl", "_wrapped_call_impl", "_named_members",
})  # fmt: skip
_MADE: weakref.WeakKeyDictionary[type, dict[type, type]] = weakref.WeakKeyDictionary()


def class_like(wrapper: type[nn.Module], model: nn.Module) -> type[nn.Module]:
    """The subclass of `wrapper` for models of the class of `model`; one per class.

    It has the signature of the model's ``forward``, and hands on each method of `nn.Module`, and each special method
    (``len``, iteration, …), that the model's class has made its own.
    """
    kind = type(model)
    made = _MADE.setdefault(kind, {})
    if wrapper not in made:
        own = {name: _handed_on(name, method) for name, method in _overridden(kind) if name not in vars(wrapper)}
        # `bool` would ask a `__len__` that the wrapper has only now.
        own |= {"__bool__": lambda self: bool(self.model)} if "__len__" in own else {}
        made[wrapper] = type(wrapper.__name__, (wrapper,), {
            "__module__": wrapper.__module__, "__doc__": wrapper.__doc__, "forward": _signed(wrapper.forward, kind), **own,
        })  # fmt: skip
    return made[wrapper]


def _overridden(kind: type) -> Iterator[tuple[str, Any]]:
    """The methods of `nn.Module`, and the special ones, that `kind` has of its own."""
    above = kind.__mro__[: kind.__mro__.index(nn.Module)]
    for name in {name for one in above for name in vars(one)} - _KEPT:
        special = name.startswith("__") and name.endswith("__")
        method = inspect.getattr_static(kind, name)
        if (special or hasattr(nn.Module, name)) and isinstance(method, types.FunctionType):
            yield name, method


def _handed_on(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.model, name)(*args, **kwargs)
        # `mp = mp.to(…)` is to be a wrapper still.
        return self if result is self.model else result

    return call


def _signed(forward: Callable[..., Any], kind: type) -> Callable[..., Any]:
    """`forward` of the wrapper, with the signature and the text that `kind` gives its own."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    theirs: Any = kind.forward  # type: ignore[attr-defined]
    call.__name__, call.__qualname__, call.__doc__ = "forward", f"{kind.__qualname__}.forward", theirs.__doc__
    # What is callable and tells nothing of its arguments is left as `*args, **kwargs`.
    with contextlib.suppress(TypeError, ValueError):
        call.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    # A torch.compile around this module breaks its graph here, and runs ours.
    return torch.compiler.disable(call)  # type: ignore[no-any-return, no-untyped-call]


__all__ = ["class_like"]
