"""What is patched of torch, for how long, and for whom."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mpcompile.torch_internals.names import found

# Tracing and compiling keep their state in torch's modules: one thread at a time.
COMPILING = threading.RLock()


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """`owner` (a class or a module) with other attributes for a while. Hold `COMPILING`; act in your own thread alone."""
    before = {name: owner.__dict__[name] for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def masks_taken_as_given() -> Iterator[None]:
    """`nn.Transformer` compares a mask's elements with a causal one, to hint at a faster kernel; a trace cannot.

    Without the comparison the mask is read as it is: the same numbers. Seen in torch 2.11 to 2.14.
    """
    from torch.nn.modules import transformer

    if not hasattr(transformer, "_detect_is_causal_mask"):
        yield
        return
    told = {"_detect_is_causal_mask": lambda mask, is_causal=None, size=None: bool(is_causal)}
    with COMPILING, replaced(transformer, **told):
        yield


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Write `payload` (JSON) into the trace that TORCH_TRACE asks for, where tlparse shows it as a file of its own."""
    if os.environ.get("TORCH_TRACE"):
        trace = found("torch._logging._internal", "trace_structured")
        trace("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=payload)


__all__ = ["COMPILING", "masks_taken_as_given", "replaced", "trace_artifact"]
