"""Python's cycle collector, held back while many objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Hold the collector back, and do not let it walk over what was made once it may run again.

    Reading a model and deciding on it make hundreds of thousands of objects and no cycles: looking for garbage among them
    takes as long as making them.  What is made inside counts as old afterwards; what was young before is looked at first,
    so that no cycle of the caller's (and no tensor in one) lives longer for it.
    """
    if not gc.isenabled():  # the caller's choice, or ours further out
        yield
        return
    gc.collect(1)
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # what the caller has frozen must stay so
            # Young objects become old ones without a walk: freezing and unfreezing join lists.
            gc.freeze()
            gc.unfreeze()
        gc.enable()
