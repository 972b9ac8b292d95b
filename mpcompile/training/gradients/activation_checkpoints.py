"""Activation checkpoints of the model: seen while `torch.export` reads it, and told to the partitioner.

Export reads through ``torch.utils.checkpoint``: it forgets what was to be made again, and of a reentrant checkpoint it
sees a function without gradient, whose parameters would never be trained.  While `seen` is active both kinds mark
the nodes of their body; `tag` turns the marks into the tags that AOTAutograd's partitioner reads.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx
from torch.fx import traceback
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointPolicy

from mpcompile.torch_internals.patches import checkpoints_replaced

_MARK = "mp_checkpoint"
# Torch numbers its own checkpoints from 0, and so does the drop-in from 2^32; only equality within a graph counts.
_NUMBERS = itertools.count(1 << 33)


@contextlib.contextmanager
def seen() -> Iterator[None]:
    """While active, what runs inside a checkpoint is marked in a trace."""
    with checkpoints_replaced(_Reentrant, _not_reentrant):
        yield


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    with traceback.preserve_node_meta(), traceback.annotate({_MARK: next(_NUMBERS)}):
        yield


class _Reentrant:
    """In the place of `CheckpointFunction`: the body, with its gradient."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng: bool, *args: Any) -> Any:
        with _marked():
            return function(*args)


def _not_reentrant(context_fn: Any) -> Iterator[None]:
    """In the place of torch's generator, which is resumed once before and once after the body."""
    # A selective policy decides per operation; what it says is torch's to read, so the partitioner is left free.
    whole = context_fn is None or context_fn is checkpoint.noop_context_fn
    with _marked() if whole else contextlib.nullcontext():
        yield


def tag(module: fx.GraphModule) -> None:
    """Tell the partitioner to make again what the marks say."""
    for node in module.graph.nodes:
        number = (node.meta.pop("custom", None) or {}).get(_MARK)
        if number is not None and node.op == "call_function":
            node.meta.update({"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": number})


__all__ = ["seen", "tag"]
