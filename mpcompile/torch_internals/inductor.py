"""Of AOTAutograd and Inductor: the joint graph, its two halves, and code for a graph. Inductor is imported when called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx
from torch._functorch import config as functorch_config

from mpcompile.torch_internals.names import absent, found

if TYPE_CHECKING:
    from torch._functorch._aot_autograd.descriptors import (
        GradAOTOutput,
        InputMutationAOTOutput,
        PlainAOTInput,
        TangentAOTInput,
    )
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
    from torch._guards import TracingContext, tracing
else:
    GradAOTOutput, InputMutationAOTOutput, PlainAOTInput, TangentAOTInput = found(
        "torch._functorch._aot_autograd.descriptors",
        "GradAOTOutput",
        "InputMutationAOTOutput",
        "PlainAOTInput",
        "TangentAOTInput",
    )
    aot_export_joint_with_descriptors = found("torch._functorch.aot_autograd", "aot_export_joint_with_descriptors")
    TracingContext, tracing = found("torch._guards", "TracingContext", "tracing")

# Options of Inductor. Roundings between its operations stay; collectives start as early, and are awaited as late, as can be.
KEEP_ROUNDINGS: Mapping[str, Any] = {"emulate_precision_casts": True}
OVERLAP_COMMUNICATION: Mapping[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
}
# The same, begun where the graph does.
COMMUNICATION_AS_WRITTEN: Mapping[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["sink_waits"],
    "reorder_for_peak_memory": False,
}


@contextlib.contextmanager
def backward_without_autocast() -> Iterator[None]:
    """AOTAutograd traces backwards with autocast off, whatever is on around it; older ones do so by themselves."""
    has_switch = hasattr(functorch_config, "backward_pass_autocast")
    with functorch_config.patch(backward_pass_autocast="off") if has_switch else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def inductor_set(options: Mapping[str, Any]) -> Iterator[None]:
    """Inductor's configuration with other values for a while."""
    config = found("torch._inductor", "config")
    for name in options:
        if not hasattr(config, name):
            raise absent(f"torch._inductor.config.{name}")
    with config.patch(dict(options)):
        yield


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """What Inductor wants decomposed in a joint trace."""
    # Some decompositions (max_pool2d on torch 2.11) look for the lowerings without importing them.
    table: dict[Any, Callable[..., Any]] = found("torch._inductor.decomposition", "select_decomp_table")()
    return table


def decompositions_of(operators: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
    """Torch's own decompositions of some operators."""
    table: dict[Any, Callable[..., Any]] = found("torch._decomp", "get_decompositions")(operators)
    return table


def compile_training(
    module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any] | None, inner: Callable[..., Any] | None
) -> Any:
    """Compile a forward and its backward.

    Args:
      options: values of Inductor's configuration.
      inner: compiles one half in place of `compile_half`.
    """
    compile_fx, compile_fx_inner = found("torch._inductor.compile_fx", "compile_fx", "compile_fx_inner")
    return compile_fx(
        module,
        list(inputs),
        inner_compile=inner or compile_fx_inner,
        config_patches=None if options is None else dict(options),
    )


def compile_half(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """Code of a flat graph without a backward: called with one list, which it empties. `current_callable` is what runs."""
    return found("torch._inductor.compile_fx", "compile_fx_inner")(module, inputs, **options)


@contextlib.contextmanager
def fakes_of(mode: Any) -> Iterator[None]:
    """What Inductor reads the sizes and layouts of a graph's values by."""
    with found("torch._inductor.virtualized", "V").set_fake_mode(mode):
        yield


def partition(
    module: fx.GraphModule, fakes: Sequence[Any], outputs_of_forward: int, *, recompute: bool
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A joint graph as forward and backward, by the min-cut partitioner.

    Args:
      recompute: a pointwise chain that a product of the backward reads may be computed again.
    """
    with functorch_config.patch(ban_recompute_materialized_backward=not recompute):
        cut = found("torch._inductor.compile_fx", "partition_fn")
        first, second = cut(module, fakes, num_fwd_outputs=outputs_of_forward)
    return first, second


def output_strides() -> contextlib.AbstractContextManager[Any]:
    """Inside of `tracing`: gives the list into which what is compiled puts how it lays its outputs out."""
    return TracingContext.report_output_strides()


def simplified(module: fx.GraphModule, device: Any) -> fx.GraphModule:
    """`module` after Inductor's passes over graphs that are not cut yet (it matches patterns, folds constants)."""
    simplify = found("torch._inductor.compile_fx", "_recursive_joint_graph_passes")
    made: fx.GraphModule = simplify(module, input_device=device)
    return made


def with_equal_nodes_merged(graph: fx.Graph) -> fx.Graph:
    """A functional graph in which equal nodes are one."""
    merged: fx.Graph = found("torch._functorch.compile_utils", "fx_graph_cse")(graph)
    return merged


__all__ = [
    "COMMUNICATION_AS_WRITTEN",
    "KEEP_ROUNDINGS",
    "OVERLAP_COMMUNICATION",
    "GradAOTOutput",
    "InputMutationAOTOutput",
    "PlainAOTInput",
    "TangentAOTInput",
    "TracingContext",
    "aot_export_joint_with_descriptors",
    "backward_without_autocast",
    "compile_half",
    "compile_training",
    "decompositions_of",
    "fakes_of",
    "inductor_decompositions",
    "inductor_set",
    "output_strides",
    "partition",
    "simplified",
    "tracing",
    "with_equal_nodes_merged",
]
