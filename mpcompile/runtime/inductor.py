"""Hand a rewritten forward to AOTAutograd and Inductor, with the settings that keep its precisions what they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mpcompile.frontends.capture import autocast_off

Runnable = Callable[..., Any]


@contextlib.contextmanager
def plain_autograd() -> Iterator[None]:
    """No autocast in the trace, forward or backward (pytorch issues 153044 and 179804: autocast ran again in the
    backward and rounded what the forward had kept FP32).
    """
    config = torch._functorch.config
    backward = config.patch(backward_pass_autocast="off") if hasattr(config, "backward_pass_autocast") else None
    with autocast_off(), backward or contextlib.nullcontext():
        yield


def compile_inductor(module: fx.GraphModule, inputs: Sequence[Any], *, keep_rounding: bool) -> Runnable:
    """Compile forward and backward.

    Args:
      module: the rewritten pre-autograd graph; Inductor takes it over.
      inputs: fake tensors and SymInts, one per placeholder.
      keep_rounding: the user's own code rounds to a low type; Inductor must not fuse that rounding away.
    """
    from torch._inductor.compile_fx import compile_fx

    patches = {"emulate_precision_casts": True} if keep_rounding else None
    with plain_autograd():
        compiled: Runnable = compile_fx(module, list(inputs), config_patches=patches)
    return compiled


def run_eagerly(module: fx.GraphModule) -> Runnable:
    """Run the graph op by op (for debugging, and for derivatives of derivatives)."""

    def run(*args: Any) -> Any:
        with autocast_off():
            return module(*args)

    return run
