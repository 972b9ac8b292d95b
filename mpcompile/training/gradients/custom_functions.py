"""Custom autograd functions: `torch.export` reads their forward alone, so what they do in the backward would be lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpcompile.errors import TrainingError, page

page(
    "MP534",
    "A backward of one's own in the training step",
    "The model uses a `torch.autograd.Function` with its own backward. The step's forward is captured by torch.export, "
    "which reads the forward of such a function and not its backward: the gradients would silently be others.",
    "Use the drop-in way, which honours it: `loss = mp(x); loss.backward(); optimizer.step()`; or write the function as "
    "a custom operator with `torch.library.register_autograd`.",
)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """While active, a custom function that would be differentiated is an error.

    Raises:
      TrainingError: MP534.
    """
    plain = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("mpcompile."):
            # Ours: a recurrent layer, for its shapes alone; a later part of the capture puts it back.
            return plain.__get__(None, cls)(*args, **kwargs)
        wanted = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor) and a.requires_grad]
        if wanted and torch.is_grad_enabled():
            raise TrainingError(
                "MP534",
                f"the model uses {cls.__qualname__}, an autograd function with its own backward",
                where=f"{cls.__module__}.{cls.__qualname__}",
                why="torch.export reads its forward alone",
                try_="the drop-in way: loss = mp(x); loss.backward(); optimizer.step()",
            )
        return plain.__get__(None, cls)(*args, **kwargs)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)):
        yield
