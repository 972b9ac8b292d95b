"""Of operators: their classes, schemas, Python kernels, and what their authors registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from mpcompile.torch_internals.names import found

# What a graph calls to enter and leave a region of autocast, and to switch gradients.
ENTER_AUTOCAST, EXIT_AUTOCAST = found("torch.amp.autocast_mode", "_enter_autocast", "_exit_autocast")
SET_GRAD_ENABLED = found("torch._C", "_set_grad_enabled")
# Ends of the names of the functions that enter and leave a level of `torch.func`.
ENTER_TRANSFORM, LEAVE_TRANSFORM = "_increment_nesting", "_decrement_nesting"
# The name of the call by which an exported program checks its inputs' shapes.
EXPORT_GUARDS = "_guards_fn"
_TRACE_KEYS = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)


def schema_of(target: Any) -> Any:
    """The schema of an operator's overload: its name, arguments, whether it writes; None for anything else."""
    return getattr(target, "_schema", None)


def name_of(op: OpOverload | HigherOrderOperator) -> str:
    """ "mylib::op.default" of an overload, "cond" of a higher-order operator."""
    return str(op._name)


def overload_of(op: OpOverload) -> str:
    """ "default", "Tensor", …: the name of an overload within its operator."""
    return str(op._overloadname)


# Before torch 2.13 a custom op had no table, but an attribute for each of two devices.
_BEFORE = {"cuda": "_autocast_cuda_dtype", "cpu": "_autocast_cpu_dtype"}


def registered_dtype(op: OpOverload, device: str) -> torch.dtype | None:
    """The dtype that `torch.library.register_autocast` was given for the op on a device; None: it was not called."""
    definition = found("torch._library.custom_ops", "OPDEFS").get(name_of(op).partition(".")[0])
    if definition is not None:
        table: dict[str, torch.dtype] | None = getattr(definition, "_autocast_dtype", None)
        return table.get(device) if table is not None else getattr(definition, _BEFORE[device], None)
    if not torch._C._is_autocast_available(device):
        return None
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))
    kernel: Any = op.py_kernels.get(key)
    # torch keeps the dtype nowhere but in the closure of the kernel that it made.
    dtype = inspect.getclosurevars(kernel).nonlocals.get("cast_inputs") if inspect.isfunction(kernel) else None
    return dtype if isinstance(dtype, torch.dtype) else None


def wrap_trace_kernels(target: Any, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let `around(kernel)` stand for each Python kernel by which a trace decomposes an operator."""
    for key in _TRACE_KEYS:
        if key in target.py_kernels:
            target.py_kernels[key] = around(target.py_kernels[key])
            target._dispatch_cache.clear()


__all__ = [
    "ENTER_AUTOCAST",
    "ENTER_TRANSFORM",
    "EXIT_AUTOCAST",
    "EXPORT_GUARDS",
    "LEAVE_TRANSFORM",
    "SET_GRAD_ENABLED",
    "HigherOrderOperator",
    "OpOverload",
    "name_of",
    "overload_of",
    "registered_dtype",
    "schema_of",
    "wrap_trace_kernels",
]
