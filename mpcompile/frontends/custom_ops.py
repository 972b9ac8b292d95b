"""Honour `torch.library.register_autocast`: what a custom op's author told torch about precision becomes its rule."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx

from mpcompile.rules.table import rules_for

_LOW = (torch.float16, torch.bfloat16)


def honour_autocast(module: fx.GraphModule, device: str) -> None:
    """Give a rule to each op of `module` that has none and was registered with autocast for `device` ("cpu", "cuda").

    An op that autocast casts to FP16 or BF16 is `low` (in the policy's low type), one that it casts to FP32 `fp32`.
    """
    rules = rules_for("aten")
    targets = {n.target for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    for target in targets:
        if rules.get(str(target)) is not None:
            continue
        dtype = registered_dtype(target, device)
        if dtype is not None:
            row = {"kind": "custom", "verdict": "low" if dtype in _LOW else "fp32",
                   "reason": f"its author registered it with torch.library.register_autocast for {device}",
                   "autocast": "lower" if dtype in _LOW else "fp32"}  # fmt: skip
            rules.set(rules.rule(str(target), row))


def registered_dtype(op: torch._ops.OpOverload, device: str) -> torch.dtype | None:
    """The dtype that `torch.library.register_autocast` was given for the op on a device; None: it was not called."""
    definition = torch._library.custom_ops.OPDEFS.get(op._name.partition(".")[0])
    if definition is not None:
        given: torch.dtype | None = definition._autocast_dtype.get(device)
        return given
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))
    kernel: Any = op.py_kernels.get(key)
    # torch keeps the dtype nowhere but in the closure of the kernel that it made.
    found = inspect.getclosurevars(kernel).nonlocals.get("cast_inputs") if inspect.isfunction(kernel) else None
    return found if isinstance(found, torch.dtype) else None
