"""Read what a custom op's author told torch about precision: `torch.library.register_autocast`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx

from mpcompile.aten.facts import dtype_name

_OWN = ("aten", "prims", "prim", "profiler")


def registered_autocast(node: fx.Node) -> str:
    """The name of the dtype that autocast gives the node's op on the device of its first output; "" for none."""
    op, value = node.target, node.meta.get("val")
    if not isinstance(op, torch._ops.OpOverload):
        return getattr(op, "mp_autocast", "")
    if op.namespace in _OWN:
        return ""
    results = value if isinstance(value, (list, tuple)) else [value]
    device = next((v.device.type for v in results if isinstance(v, torch.Tensor)), None)
    dtype = None if device is None else registered_dtype(op, device)
    return "" if dtype is None else dtype_name(dtype)


def registered_dtype(op: torch._ops.OpOverload, device: str) -> torch.dtype | None:
    """The dtype that `torch.library.register_autocast` was given for the op on a device; None: it was not called."""
    definition = torch._library.custom_ops.OPDEFS.get(op._name.partition(".")[0])
    if definition is not None:
        given: torch.dtype | None = definition._autocast_dtype.get(device)
        return given
    if not torch._C._is_autocast_available(device):
        return None
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))
    kernel: Any = op.py_kernels.get(key)
    # torch keeps the dtype nowhere but in the closure of the kernel that it made.
    found = inspect.getclosurevars(kernel).nonlocals.get("cast_inputs") if inspect.isfunction(kernel) else None
    return found if isinstance(found, torch.dtype) else None
