"""Read what a custom op's author told torch about precision: `torch.library.register_autocast`."""

from __future__ import annotations

import torch
from torch import fx

from mpcompile.aten.facts import dtype_name
from mpcompile.torch_internals.operators import OpOverload, registered_dtype

_OWN = ("aten", "prims", "prim", "profiler")


def registered_autocast(node: fx.Node) -> str:
    """The name of the dtype that autocast gives the node's op on the device of its first output; "" for none."""
    op, value = node.target, node.meta.get("val")
    if not isinstance(op, OpOverload):
        return getattr(op, "mp_autocast", "")
    if op.namespace in _OWN:
        return ""
    results = value if isinstance(value, (list, tuple)) else [value]
    device = next((v.device.type for v in results if isinstance(v, torch.Tensor)), None)
    dtype = None if device is None else registered_dtype(op, device)
    return "" if dtype is None else dtype_name(dtype)
