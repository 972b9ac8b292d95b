"""The one place that reaches into torch where torch has no public way: what is patched, for how long, and for whom."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import is_in_torch_dispatch_mode

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


def is_watched() -> bool:
    """A mode of the user's sees every operation (FlopCounterMode): Dynamo runs nothing compiled under it."""
    return bool(is_in_torch_dispatch_mode(include_infra_modes=False))


__all__ = ["COMPILING", "is_watched", "replaced"]
