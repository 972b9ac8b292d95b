"""Hand a rewritten forward to AOTAutograd and Inductor, with the settings that keep its precisions what they are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mpcompile.aten.capture import autocast_off
from mpcompile.aten.recurrent import with_whole_layers
from mpcompile.torch_internals.inductor import (
    COMMUNICATION_AS_WRITTEN,
    KEEP_ROUNDINGS,
    OVERLAP_COMMUNICATION,
    backward_without_autocast,
    compile_half,
    compile_training,
    inductor_set,
)

Runnable = Callable[..., Any]


@contextlib.contextmanager
def plain_autograd() -> Iterator[None]:
    """No autocast in the trace, forward or backward (pytorch issues 153044 and 179804: autocast ran again in the
    backward and rounded what the forward had kept FP32).
    """
    with autocast_off(), backward_without_autocast():
        yield


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """FP32 matrix work may round inside as `torch.set_float32_matmul_precision(name)` says; put back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def roundings_kept(wanted: bool) -> Iterator[None]:
    """Inductor fuses intermediate roundings away unless told: with `wanted`, those in the graph stay (law 4)."""
    with inductor_set(KEEP_ROUNDINGS) if wanted else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def overlapped(wanted: bool) -> Iterator[None]:
    """Inductor starts collectives as early, and waits for them as late, as what they read and give allows."""
    with inductor_set(OVERLAP_COMMUNICATION) if wanted else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def as_written(wanted: bool) -> Iterator[None]:
    """Inductor starts collectives where the graph does, and waits for them as late as what they give allows.

    Raised to the front of the graph, as `overlapped` has it, all weights would be gathered at once.
    """
    with inductor_set(COMMUNICATION_AS_WRITTEN) if wanted else contextlib.nullcontext():
        yield


def compile_inductor(
    module: fx.GraphModule, inputs: Sequence[Any], *, keep_rounding: bool, fp32_matmul: str = "highest"
) -> Runnable:
    """Compile forward and backward.

    Args:
      module: the rewritten pre-autograd graph; Inductor takes it over.
      inputs: fake tensors and SymInts, one per placeholder.
      keep_rounding: the user's own code rounds to a low type; Inductor must not fuse that rounding away.
      fp32_matmul: how the matmuls that stay FP32 may round inside, in this graph's forward and backward alone.
        "highest" leaves torch's own switch in charge.
    """
    patches = KEEP_ROUNDINGS if keep_rounding else None
    inner: Any = None
    if fp32_matmul != "highest":
        inner = functools.partial(_compile_with_precision, fp32_matmul)
    module = with_whole_layers(module)
    with plain_autograd():
        compiled: Any = compile_training(module, inputs, patches, inner)
    runnable: Runnable = compiled
    return runnable


def _compile_with_precision(name: str, module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """One half (forward or backward), which sets the switch around its own run: cuBLAS and oneDNN read it per call."""
    with matmul_precision(name):
        code: Any = compile_half(module, inputs, **options)
    run = code.current_callable

    def call(args: list[Any]) -> Any:
        with matmul_precision(name):
            return run(args)

    code.current_callable = call
    return code


def run_eagerly(module: fx.GraphModule, *, fp32_matmul: str = "highest") -> Runnable:
    """Run the graph op by op (for debugging, and for derivatives of derivatives).

    `fp32_matmul` covers the forward only: the backward is autograd's own, and runs under torch's switch.
    """

    def run(*args: Any) -> Any:
        precision = contextlib.nullcontext() if fp32_matmul == "highest" else matmul_precision(fp32_matmul)
        with autocast_off(), precision:
            return module(*args)

    return run
