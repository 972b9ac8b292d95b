"""What is said while a model compiles: stages on a terminal, and one line at the end. Standard error, never standard output.

``MPCOMPILE_PROGRESS=0`` silences both. Where the program has configured logging, the line goes there (logger "mpcompile",
INFO) and nowhere else; of several ranks the first one speaks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from threading import local

log = logging.getLogger("mpcompile")
SWITCH = "MPCOMPILE_PROGRESS"
CLEAR = "\r\x1b[K"


class _Stages(local):
    """The stages that this thread is in, and since when."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.since = 0.0


_STAGES = _Stages()


def speaks() -> bool:
    """True where lines go to standard error: nobody has configured logging, or switched them off."""
    first = os.environ.get("RANK", "0") == "0"
    return first and os.environ.get(SWITCH, "") != "0" and not log.hasHandlers() and sys.stderr is not None


def line(text: str) -> None:
    """The one line after compilation."""
    log.info("%s", text)
    if speaks():
        print(f"{CLEAR if sys.stderr.isatty() else ''}{text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Show on a terminal that `name` is under way, and for how many seconds the compilation has been; gone afterwards."""
    if not (speaks() and sys.stderr.isatty()):
        yield
        return
    if not _STAGES.names:
        _STAGES.since = time.perf_counter()
    _STAGES.names.append(name)
    _show()
    try:
        yield
    finally:
        _STAGES.names.pop()
        _show()


def _show() -> None:
    seconds = time.perf_counter() - _STAGES.since
    text = f"mpcompile: {' > '.join(_STAGES.names)} ({seconds:.1f} s)" if _STAGES.names else ""
    print(f"{CLEAR}{text}", end="", file=sys.stderr, flush=True)
