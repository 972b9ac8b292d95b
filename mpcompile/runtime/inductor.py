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
    from torch._inductor import config

    with config.patch(emulate_precision_casts=True) if wanted else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def overlapped(wanted: bool) -> Iterator[None]:
    """Inductor starts collectives as early, and waits for them as late, as what they read and give allows."""
    from torch._inductor import config

    options = {
        "reorder_for_compute_comm_overlap": True,
        "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
    }
    with config.patch(options) if wanted else contextlib.nullcontext():
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
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    patches = {"emulate_precision_casts": True} if keep_rounding else None
    inner_compile: Any = compile_fx_inner
    if fp32_matmul != "highest":
        inner_compile = functools.partial(_compile_with_precision, fp32_matmul)
    module = with_whole_layers(module)
    with plain_autograd():
        compiled: Any = compile_fx(module, list(inputs), inner_compile=inner_compile, config_patches=patches)
    runnable: Runnable = compiled
    return runnable


def _compile_with_precision(name: str, module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """One half (forward or backward), which sets the switch around its own run: cuBLAS and oneDNN read it per call."""
    from torch._inductor.compile_fx import compile_fx_inner

    with matmul_precision(name):
        code: Any = compile_fx_inner(module, inputs, **options)
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
