"""The joint graph: the rewritten forward and its backward as one ATen graph, by AOTAutograd.

The loss scale is the backward's seed: d(scale * loss) / d(loss) = scale, so scaling costs no operation and is what
`GradScaler` computes, bit for bit.  Gradients of shadows arrive in the low type; buffers that the forward updates
(BatchNorm's statistics) are outputs.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, InputMutationAOTOutput, PlainAOTInput
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._guards import TracingContext, tracing

from mpcompile.aten.facts import LOW_DTYPES
from mpcompile.aten.graphs import inputs_of, outputs_of, values_of
from mpcompile.aten.recurrent import with_whole_layers
from mpcompile.errors import MPCompileError
from mpcompile.hardware import emulated_kinds
from mpcompile.runtime.inductor import plain_autograd
from mpcompile.training.gradients.forward import Forward
from mpcompile.training.gradients.traced_calls import HOOKS, calls_of


@dataclass
class Joint:
    """A flat graph: (*inputs, seed) -> (*mutated, loss, *grads).

    Fields:
      mutated: the input whose new value each leading output is.
      grads: the input that each trailing output is the gradient of.
    """

    module: fx.GraphModule
    forward: Forward
    fakes: list[Any]
    mutated: list[int]
    grads: list[int]

    @property
    def outputs_of_forward(self) -> int:
        return len(self.mutated) + 1


def trace(forward: Forward, decompositions: dict[Any, Callable[..., Any]] | None = None) -> Joint:
    """The joint graph of `forward`; `decompositions` are the backend's (None leaves ATen as autograd gives it)."""
    fake_mode = forward.fakes[0].fake_mode  # type: ignore[attr-defined]
    # Plain ATen has recurrent layers by their time steps; a compiler is given them whole.
    module = forward.module if decompositions is None else with_whole_layers(forward.module)
    for last in (False, True):
        try:
            with contextlib.ExitStack() as stack, fresh_tracing(fake_mode):
                stack.enter_context(plain_autograd())
                made = aot_export_joint_with_descriptors(
                    stack, module, tuple(forward.fakes), decompositions=decompositions
                )
            return _read(made.graph_module, forward)
        except MPCompileError:
            raise
        except Exception:
            if last or not _leave_whole(module):
                raise
    raise AssertionError("unreachable")


def _leave_whole(module: fx.GraphModule) -> bool:
    """Let the program's own functions run as they are: one of them, or its backward, could not be traced."""
    traced = [c for c in calls_of(module).values() if c.op not in HOOKS and not c.opaque]
    for call in traced:
        call.opaque = True
    return bool(traced)


@contextlib.contextmanager
def fresh_tracing(fake_mode: Any) -> Iterator[None]:
    with tracing(TracingContext(fake_mode)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read(module: fx.GraphModule, forward: Forward) -> Joint:
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    output = graph.output_node()
    described = zip(outputs_of(module), output.meta["desc"], strict=True)
    mutated, grads, kept = list[int](), list[int](), list[Any]()
    loss: Any = None
    for node, description in described:
        if node is None:
            continue
        if isinstance(description, InputMutationAOTOutput):
            mutated.append(_place(description.mutated_input))
            kept.append(node)
        elif isinstance(description, GradAOTOutput):
            grads.append(_place(description.grad_of))
            kept.append(node)
        else:
            loss = node
    kept.insert(len(mutated), loss)
    output.args = (tuple(kept),)
    _keep_random(graph)
    _simplify_casts(graph, emulated=bool(emulated_kinds(forward.plan.device, forward.plan.policy.low, compiled=True)))
    graph.eliminate_dead_code()
    module.recompile()
    fakes = values_of(inputs_of(module))
    return Joint(module, forward, fakes, mutated, grads)


def _keep_random(graph: fx.Graph) -> None:
    """Inside an activation checkpoint, what draws random numbers (attention may) is kept and not made again.

    Torch would save and restore the generator around it, which a CUDA graph cannot hold.
    """
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            for one in (node, *(user for user in node.users if user.target is operator.getitem)):
                one.meta.pop("recompute", None)


def _simplify_casts(graph: fx.Graph, *, emulated: bool) -> None:
    """Read a value where it is wide: low -> FP32 -> low is the value itself; so is a gradient's FP32 -> low -> FP32.

    What the user rounds in the forward is rounded in the backward too (law 4).  Where FP16 is emulated, FP32 -> FP16
    is what a low kernel gives, not a cast.
    """
    chains = [(n, n.args[0]) for n in graph.nodes if _is_cast(n) and _is_cast(n.args[0])]
    users = {
        (before.meta.get("seq_nr"), node.meta.get("seq_nr"))
        for node, before in chains
        if not _in_backward(node) and _dtype(before) in LOW_DTYPES
    }
    for node, before in chains:
        source = before.args[0]
        same = _dtype(source) == _dtype(node)
        exact = _dtype(source) in LOW_DTYPES and _dtype(before) == torch.float32
        order = node.meta.get("seq_nr"), before.meta.get("seq_nr")
        gradient = _dtype(source) == torch.float32 and _in_backward(before) and order not in users and not emulated
        if same and (exact or gradient):
            node.replace_all_uses_with(source)


def _is_cast(node: Any) -> bool:
    """A change of the float type and of nothing else."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return False
    if node.target is torch.ops.prims.convert_element_type.default:
        return True
    # Autograd names layout and device too.
    plain = node.target is torch.ops.aten._to_copy.default and set(node.kwargs) <= {"dtype", "layout", "device"}
    return plain and node.meta["val"].device == node.args[0].meta["val"].device  # type: ignore[union-attr]


def _dtype(node: fx.Node) -> torch.dtype:
    found: torch.dtype = node.meta["val"].dtype
    return found


def _in_backward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_backward"


def _place(description: Any) -> int:
    assert isinstance(description, PlainAOTInput), description
    return description.idx


def gradients_by_parameter(joint: Joint) -> dict[str, list[int]]:
    """Name of a trained parameter -> positions among `joint.grads` whose sum is its gradient."""
    found: dict[str, list[int]] = {}
    for position, place in enumerate(joint.grads):
        found.setdefault(joint.forward.inputs[place].name, []).append(position)
    return found


def is_seed(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.float32
