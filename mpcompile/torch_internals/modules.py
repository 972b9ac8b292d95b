"""Of modules: their tables, their hooks, what is read of them, what calls them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn import Module

from mpcompile.torch_internals.names import found
from mpcompile.torch_internals.patches import replaced

# A module's tables of what it owns, and of what it calls around itself.
MODULE_TENSORS = ("_parameters", "_buffers", "_modules")
# The very tables of a module: with them, what is registered, replaced or renamed on one is so on another.
SHARED_TABLES = (*MODULE_TENSORS, "_non_persistent_buffers_set", "_load_state_dict_post_hooks")
# What stands around the calls of a wrapper alone.
CALL_OF_A_WRAPPER = ("_compiled_call_impl", "_is_full_backward_hook")
MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Tables of hooks on every module of the process.
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = found(
    "torch.nn.modules.module",
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def tables_of(module: Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(parameters, buffers, modules) that a module holds itself, by name: its own tables, to read or to compare."""
    return module._parameters, module._buffers, module._modules


def buffers_of(module: Module) -> dict[str, Any]:
    """The buffers that a module holds itself, by name: its own table, to read or to write."""
    return module._buffers


def has_legacy_backward_hooks(module: Module) -> bool:
    """Whether `register_backward_hook`, the older of the two, was called."""
    return bool(module._backward_hooks) and module._is_full_backward_hook is False


def loads_by_itself(module: Module) -> bool:
    """Whether loading a state is the module's own business: hooks before it, or a method of its own."""
    own = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    return own or bool(module._load_state_dict_pre_hooks)


def made_before_each_forward(module: Module) -> set[str]:
    """What pruning and torch's older weight and spectral norms put on a module anew before each forward: never read old."""
    hooks = module._forward_pre_hooks.values()
    return {getattr(hook, word) for hook in hooks for word in ("_tensor_name", "name") if hasattr(hook, word)}


# A value that a module has none of.
ABSENT = object()
# What a capture itself sets before it reads it: nothing that lasts from one call to the next.
WRITTEN = object()


Accesses = dict[Any, tuple[nn.Module, str, Any]]


@contextlib.contextmanager
def module_reads() -> Iterator[tuple[Accesses, Accesses]]:
    """What is read of modules inside, with the first values, and what is assigned after it was read. Hold `COMPILING`."""
    reads: Accesses = {}
    written: Accesses = {}
    assign, mine = nn.Module.__setattr__, threading.get_ident()

    def read(self: nn.Module, name: str) -> Any:
        if threading.get_ident() != mine:  # another thread's modules are none of this capture's
            return object.__getattribute__(self, name)
        try:
            value = object.__getattribute__(self, name)
        except AttributeError:
            reads.setdefault((id(self), name), (self, name, ABSENT))
            raise
        reads.setdefault((id(self), name), (self, name, value))
        return value

    def write(self: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == mine:
            if (id(self), name) in reads:
                written[id(self), name] = self, name, value
            else:
                reads[id(self), name] = self, name, WRITTEN
        assign(self, name, value)

    nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        with replaced(nn.Module, __setattr__=write):
            yield reads, written
    finally:
        del nn.Module.__getattribute__


@contextlib.contextmanager
def calls_taken(module: Module, call: Callable[..., Any]) -> Iterator[None]:
    """Whoever calls `module` calls `call` for a while; inside of `call`, `module` is itself."""

    def taken(*args: Any, **kwargs: Any) -> Any:
        vars(module)["_compiled_call_impl"] = before
        try:
            return call(*args, **kwargs)
        finally:
            vars(module)["_compiled_call_impl"] = taken

    before = module._compiled_call_impl
    vars(module)["_compiled_call_impl"] = taken
    try:
        yield
    finally:
        vars(module)["_compiled_call_impl"] = before


def are_calls_taken(module: Module) -> bool:
    """Whether `calls_taken` is at work on `module`."""
    return getattr(module._compiled_call_impl, "__qualname__", "").startswith(calls_taken.__name__)


__all__ = [
    "ABSENT",
    "CALL_OF_A_WRAPPER",
    "GLOBAL_HOOKS",
    "MODULE_HOOKS",
    "MODULE_TENSORS",
    "SHARED_TABLES",
    "WRITTEN",
    "Accesses",
    "are_calls_taken",
    "buffers_of",
    "calls_taken",
    "has_legacy_backward_hooks",
    "loads_by_itself",
    "made_before_each_forward",
    "module_reads",
    "tables_of",
]
