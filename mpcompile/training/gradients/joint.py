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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import LOW_DTYPES, source_line
from mpcompile.aten.graphs import inputs_of, outputs_of, values_of
from mpcompile.aten.recurrent import with_whole_layers
from mpcompile.errors import MPCompileError, TrainingError
from mpcompile.hardware import emulated_kinds
from mpcompile.runtime.inductor import plain_autograd
from mpcompile.runtime.kernels import loss as loss_kernel
from mpcompile.torch_internals.inductor import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    TangentAOTInput,
    TracingContext,
    aot_export_joint_with_descriptors,
    tracing,
)
from mpcompile.training.gradients.forward import Forward
from mpcompile.training.gradients.sums import add_up_in_fp32
from mpcompile.training.gradients.traced_calls import HOOKS, calls_of


@dataclass
class Joint:
    """A flat graph: (*inputs, seed) -> (*mutated, loss, *grads).

    Fields:
      mutated: the input whose new value each leading output is.
      grads: the input that each trailing output is the gradient of.
      places: which of the forward's inputs the graph's first ones are; all, unless something else is read in their stead.
    """

    module: fx.GraphModule
    forward: Forward
    fakes: list[Any]
    mutated: list[int]
    grads: list[int]
    places: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = self.places or list(range(len(self.forward.inputs)))

    @property
    def outputs_of_forward(self) -> int:
        return len(self.mutated) + 1


def trace(forward: Forward, decompositions: dict[Any, Callable[..., Any]] | None = None) -> Joint:
    """The joint graph of `forward`; `decompositions` are the backend's (None leaves ATen as autograd gives it)."""
    fake_mode = forward.fakes[0].fake_mode  # type: ignore[attr-defined]
    # A graph that is read or exported has kernels of ours in ATen's operations.
    table = {loss_kernel.OPERATION: loss_kernel.in_atens} if decompositions is None else decompositions
    # Plain ATen has recurrent layers by their time steps; a compiler is given them whole.
    module = forward.module if decompositions is None else with_whole_layers(forward.module)
    for last in (False, True):
        try:
            with contextlib.ExitStack() as stack, fresh_tracing(fake_mode):
                stack.enter_context(plain_autograd())
                if decompositions is None:
                    # oneDNN's LSTM keeps a workspace that a trace has no place for.
                    stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                made = aot_export_joint_with_descriptors(stack, module, tuple(forward.fakes), decompositions=table)
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
    _without_extras(graph)
    described = zip(outputs_of(module), output.meta["desc"], strict=True)
    mutated, grads, kept = list[int](), list[int](), list[Any]()
    loss: Any = None
    for node, description in described:
        if node is None or "Token" in type(description).__name__:
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
    for node in inputs_of(module):
        if "Token" in type(node.meta.get("desc")).__name__:
            graph.erase_node(node)
    _keep_random(graph)
    _simplify_casts(graph, emulated=bool(emulated_kinds(forward.plan.device, forward.plan.policy.low, compiled=True)))
    casts = [n for n in graph.nodes if _is_cast(n) and _in_backward(n) and _dtype(n) == torch.float32]
    low_sums = forward.plan.policy.grads == "low"  # the caller's word
    add_up_in_fp32(graph, casts, () if low_sums else outputs_of(module)[len(mutated) + 1 :])
    graph.eliminate_dead_code()
    module.recompile()
    fakes = values_of(inputs_of(module))
    return Joint(module, forward, fakes, mutated, grads)


def _without_extras(graph: fx.Graph) -> None:
    """No tokens that order effects, and no gradient from outside for what the forward writes to its inputs."""
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.higher_order.with_effects)):
        _checked(graph, node)
    for node in graph.find_nodes(op="placeholder"):
        description = node.meta.get("desc")
        if isinstance(description, TangentAOTInput) and isinstance(description.output, InputMutationAOTOutput):
            value = node.meta["val"]
            with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
                none = graph.call_function(torch.ops.aten.full.default, (list(value.shape), 0),
                                           {"dtype": value.dtype, "device": value.device})  # fmt: skip
            none.meta["val"] = value
            node.replace_all_uses_with(none)
            graph.erase_node(node)


def _checked(graph: fx.Graph, node: fx.Node) -> None:
    """A solver's check of its own success: an operation whose result the solver's result is read through.

    Raises:
      TrainingError: MP538, for any other effect.
    """
    token, op, *args = node.args
    source: Any = args[0].args[0] if op is torch.ops.aten._linalg_check_errors.default else None  # type: ignore[union-attr]
    if source is None:
        raise TrainingError("MP538", f"the step's forward or backward has an effect outside of it: {op}",
                            where=source_line(node), why="a compiled step runs it at no certain time",
                            try_="take it out of the model, or the drop-in way: loss = mp(x); loss.backward()")  # fmt: skip
    for user in list(node.users):
        user.replace_all_uses_with(token)  # type: ignore[arg-type]
        graph.erase_node(user)
    result = next((u for u in source.users if u.target is operator.getitem and u.args[1] == 0), None)
    with graph.inserting_before(node):
        check = graph.call_function(torch.ops.mpcompile.solved.default, tuple(args), node.kwargs)
        check.meta = {**node.meta, "val": None}
        if result is not None:
            through = graph.call_function(torch.ops.aten.add.Tensor, (result, check))
            through.meta = dict(result.meta)
            with result.meta["val"].fake_mode:
                check.meta["val"] = torch.zeros((), device=result.meta["val"].device)
            result.replace_all_uses_with(through, delete_user_cb=lambda user: user is not through and through < user)
    graph.erase_node(node)


_LIBRARY: Any = torch.library.Library("mpcompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("solved(Tensor info, str api, *, bool is_matrix) -> Tensor")


def _solved(info: Tensor, api: str, *, is_matrix: bool) -> Tensor:
    """Zero where a factorisation or solve succeeded; else torch's error on a CPU, NaN (a skipped step) elsewhere."""
    if info.device.type == "cpu":
        torch.ops.aten._linalg_check_errors.default(info, api, is_matrix=is_matrix)
        return torch.zeros(())
    return torch.where((info != 0).any(), float("nan"), 0.0).to(torch.float32)


_LIBRARY.impl("solved", _solved, "CompositeExplicitAutograd")
torch.library.register_fake("mpcompile::solved", lambda info, api, is_matrix: torch.empty((), device=info.device),
                            lib=_LIBRARY)  # fmt: skip


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
