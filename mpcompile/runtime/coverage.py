"""What Dynamo left out: graph breaks, and the weights that no compiled graph reads. Nothing falls back unsaid.

Code that Dynamo cannot trace runs as the program wrote it, in FP32.  Dynamo itself says so only in its logs.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mpcompile.torch_internals.dynamo import graph_breaks, recompile_limit
from mpcompile.torch_internals.tensors import pytree

_SHOWN = 4


@dataclass
class Breaks:
    """The graph breaks that happened while `counting_breaks` was active: Dynamo's title of each, and how often."""

    titles: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def counting_breaks() -> Iterator[Breaks]:
    """Count the graph breaks of a block."""
    found, before = Breaks(), graph_breaks()
    try:
        yield found
    finally:
        for text, count in (graph_breaks() - before).items():
            found.titles[text.partition("\n")[0]] += count


def warn_of_gaps(model: nn.Module, graphs: int, read: set[int], breaks: Breaks, result: Any) -> None:
    """Warn when weights of `model` were read by none of its compiled graphs, after a first forward with graph breaks.

    Args:
      graphs: how many graphs were compiled.
      read: ids of the parameters that they read.
      result: what the forward returned; its autograd graph tells what ran from what was not used.
    """
    if graphs and not breaks.titles:
        return  # what is not read then was not used
    reached = _reached(result)
    ran = _owners(model, lambda p: id(p) not in read and reached is not None and id(p) in reached)
    perhaps = _owners(model, lambda p: id(p) not in read and (reached is None or not p.requires_grad))
    if not ran and not perhaps:
        return
    why = "; ".join(f"{title} ({count}x)" if count > 1 else title for title, count in breaks.titles.items())
    what = "some of the model was not captured" if graphs else "nothing of the model was captured"
    left = [f"{_some(ran)} ran as written, in FP32"] if ran else []
    left += [f"{_some(perhaps)} ran so too, or was not used" if ran else
             f"{_some(perhaps)} ran as written, in FP32, or was not used"] if perhaps else []  # fmt: skip
    warnings.warn(
        f"mpcompile: {what}: {'; '.join(left)}. Graph breaks: {why or 'none; is torch.compile disabled?'}",
        stacklevel=4,
    )


def _owners(model: nn.Module, chosen: Callable[[torch.Tensor], bool]) -> list[str]:
    """The modules that hold a chosen parameter themselves."""
    return [
        f"{path or 'the model itself'} ({type(module).__name__})"
        for path, module in model.named_modules()
        if any(chosen(p) for p in module.parameters(recurse=False) if p.is_floating_point())
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _reached(result: Any) -> set[int] | None:
    """Ids of the leaves that a backward from `result` would reach; None where there is nothing to follow."""
    todo = [
        leaf.grad_fn
        for leaf in pytree.tree_leaves(result)
        if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None
    ]
    if not todo:
        return None
    seen, found = set(todo), set()
    while todo:
        node: Any = todo.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        fresh = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= fresh
        todo += fresh
    return found


def warn_of_eager_call() -> None:
    """A call of a compiled model ran none of its graphs."""
    limit = recompile_limit()
    warnings.warn(
        "mpcompile: no compiled graph ran in this call: the model ran as written, in FP32. Dynamo gives up on a function "
        f"after {limit} compilations (TORCH_LOGS=recompiles says what changed; torch._dynamo.config.recompile_limit "
        "allows more)",
        stacklevel=4,
    )


def warn_of_watched_call() -> None:
    """A call under a mode that sees every operation: no compiled graph can run in it."""
    warnings.warn(
        "mpcompile: a mode watches every operation of this call (FlopCounterMode, or another TorchDispatchMode), so the model "
        "ran as written, in FP32; calls outside of it run in mixed precision",
        stacklevel=4,
    )


def watched_method(model: nn.Module, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of `model`, which warns when it calls the model: that call is not the wrapper's, and runs in FP32."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls: list[None] = []
        handle = model.register_forward_pre_hook(lambda *_: calls.append(None))
        try:
            return method(*args, **kwargs)
        finally:
            handle.remove()
            if calls:
                warnings.warn(
                    f"mpcompile: {name}() is a method of the model itself: its {len(calls)} calls of the model ran as "
                    "written, in FP32. Mixed precision is in mp(...), in mp.train_step, and in `with mp.taking_calls(): "
                    f"mp.{name}(...)`",
                    stacklevel=2,
                )

    return call


def warn_of_recurrent_break() -> None:
    """In ``torch.compile(model, backend="mpcompile")``: say that Dynamo left an LSTM, GRU or RNN, and its neighbours."""
    if any(text.startswith("Attempted to wrap RNN") for text in graph_breaks()):
        warnings.warn(
            "mpcompile: Dynamo does not trace LSTM, GRU and RNN, and left the function that calls one to eager FP32; "
            "use mpcompile(model), or set torch._dynamo.config.allow_rnn = True before torch.compile",
            stacklevel=2,
        )


__all__ = [
    "Breaks",
    "counting_breaks",
    "warn_of_eager_call",
    "warn_of_gaps",
    "warn_of_recurrent_break",
    "warn_of_watched_call",
    "watched_method",
]
