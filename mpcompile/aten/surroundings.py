"""What a capture must leave as it was around it: what a program holds and draws, the error stream, other threads' words."""

from __future__ import annotations

import contextlib
import logging
import operator
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from mpcompile.errors import CaptureError
from mpcompile.torch_internals.tensors import pytree


@contextlib.contextmanager
def containers_kept(roots: Sequence[Any]) -> Iterator[None]:
    """The lists and dictionaries that modules hold are the same objects afterwards: export puts back copies of them.

    The program's own code may hold them too, and edit them later.
    """
    modules = {id(m): m for root in roots if isinstance(root, torch.nn.Module) for m in root.modules()}
    before = [(vars(m), k, v) for m in modules.values() for k, v in vars(m).items() if isinstance(v, _CONTAINERS)]
    try:
        yield
    finally:
        for table, name, old in before:
            new = table.get(name)
            if new is not old and type(new) is type(old) and _same_leaves(new, old):
                table[name] = old


def _same_leaves(one: Any, other: Any) -> bool:
    (mine, tree), (theirs, shape) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return tree == shape and all(map(operator.is_, mine, theirs))


_CONTAINERS = (list, dict, tuple)


@contextlib.contextmanager
def host_random_refused() -> Iterator[None]:
    """A program that draws from Python's or numpy's generator as it is read would have its first draw in the graph for good.

    Raises:
      CaptureError: MP101; the generators are as they were then.
    """
    numpy = sys.modules.get("numpy")
    before = random.getstate(), numpy and numpy.random.get_state()
    yield
    now = random.getstate(), numpy and numpy.random.get_state()
    if repr(now) == repr(before):
        return
    random.setstate(before[0])
    if numpy is not None:
        numpy.random.set_state(before[1])
    raise CaptureError(
        "MP101", "the program draws random numbers on the host (random.random(), numpy.random…)",
        why="a graph is made by running Python once: it would have the first numbers in it for good",
        try_="draw with torch (torch.rand, dropout), or outside of the model and pass what was drawn as a tensor; or the "
        "drop-in way: loss = mp(...); loss.backward()",
    )  # fmt: skip


class _WithoutTorch:
    """The error stream as it was, without what torch's own code writes in the thread that made this."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        mine = threading.get_ident() == self._thread
        if mine and str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] == "torch":
            return len(text)
        written: int = self._stream.write(text)
        return written


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Torch writes out the whole graph that it failed on; the error that is raised says what there is to say.

    What the program itself writes, and what other threads do, goes where it would have gone.
    """
    mine = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        return record.thread != mine or record.name.partition(".")[0] != "torch"

    handlers = [*logging.getLogger("torch").handlers, *logging.getLogger().handlers, logging.lastResort]
    found = [one for one in handlers if one is not None]
    for one in found:
        one.addFilter(keep)
    try:
        with contextlib.redirect_stderr(cast(Any, _WithoutTorch(sys.stderr))):
            yield
    finally:
        for one in found:
            one.removeFilter(keep)


__all__ = ["containers_kept", "host_random_refused", "quiet_torch"]
