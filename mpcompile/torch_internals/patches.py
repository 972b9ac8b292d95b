"""What is patched of torch, for how long, and for whom."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import checkpoint

from mpcompile.torch_internals.names import found

# Tracing and compiling keep their state in torch's modules: one thread at a time.
COMPILING = threading.RLock()
_ABSENT = object()


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """`owner` (a class or a module) with other attributes for a while, also with some that it has none of.

    Hold `COMPILING`; act in your own thread alone.
    """
    before = {name: owner.__dict__.get(name, _ABSENT) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextlib.contextmanager
def as_if_compiling() -> Iterator[None]:
    """This thread's code takes itself for compiled: an optimizer's branch-free way asks for a device otherwise."""
    mine, plain = threading.get_ident(), torch.compiler.is_compiling

    def is_compiling() -> bool:
        return threading.get_ident() == mine or plain()

    with COMPILING, replaced(torch.compiler, is_compiling=is_compiling):
        yield


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


@contextlib.contextmanager
def checkpoints_replaced(reentrant: Any, around: Callable[[Any], Iterator[None]]) -> Iterator[None]:
    """`torch.utils.checkpoint` does nothing of its own for a while.

    Args:
      reentrant: in the place of `CheckpointFunction`.
      around: makes, of a checkpoint's `context_fn` (None: not given), what is resumed once before and once after the body.
    """

    def older(function: Any, preserve_rng: bool = True, context_fn: Any = None, *args: Any, **kwargs: Any) -> Any:
        return around(context_fn)

    def newer(function: Any, args: Any, kwargs: Any, *, context_fn: Any = None, **options: Any) -> Any:
        return around(context_fn)

    # torch 2.14: the older name is for others' programs alone.
    shims: dict[str, Any] = {"_checkpoint_without_reentrant_generator_impl": newer}
    if not hasattr(checkpoint, "_checkpoint_without_reentrant_generator_impl"):
        shims = {"_checkpoint_without_reentrant_generator": older}
    with COMPILING, replaced(checkpoint, CheckpointFunction=reentrant, **shims):
        yield


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Write `payload` (JSON) into the trace that TORCH_TRACE asks for, where tlparse shows it as a file of its own."""
    if os.environ.get("TORCH_TRACE"):
        trace = found("torch._logging._internal", "trace_structured")
        trace("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=payload)


__all__ = ["COMPILING", "as_if_compiling", "checkpoints_replaced", "masks_taken_as_given", "replaced", "trace_artifact"]
