"""The forward half of a step: model and loss captured as one graph, rewritten, with its inputs told apart.

The graph is `torch.export`'s, with parameters and buffers as inputs.  A weight that only low nodes read enters as its
shadow, a graph input of its own: its gradient then arrives in the low type, and no cast of it exists in the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind

from mpcompile.aten.capture import export
from mpcompile.aten.exported import inline_regions
from mpcompile.aten.facts import LOSS_OWN, TORCH_DTYPES, source_line
from mpcompile.aten.graphs import inputs_of
from mpcompile.aten.rewrites import chunked_loss as loss_region
from mpcompile.aten.rewrites.align import align_linears, low_columns, padding
from mpcompile.aten.rewrites.logits import values_of_written
from mpcompile.aten.surroundings import containers_kept, host_random_refused
from mpcompile.aten.write import read_shadows, write
from mpcompile.compiler import Plan, Settings, decide
from mpcompile.errors import TrainingError
from mpcompile.hardware import device_of, emulated_kinds
from mpcompile.runtime.fp8_linear import FP8_LINEAR
from mpcompile.runtime.kernels import loss as loss_kernel
from mpcompile.torch_internals.tensors import gradient_hooks as gradient_hooks_of
from mpcompile.training.gradients import activation_checkpoints as checkpoints
from mpcompile.training.gradients import assignments, custom_functions, gradient_hooks, traced_calls, whole_calls
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.gradients.decisions import Decision, decided, traced_as


@dataclass(frozen=True)
class Input:
    """One input of the graph.

    Fields:
      kind: "param", "buffer" and "constant" hold `name` in the model; "shadow" is the low copy of the parameter
        `name`; "arg" is the tensor number `index` of the batch; "seed" is what the backward starts from.
      trained: the loss is differentiated by it.
    """

    kind: Literal["param", "buffer", "constant", "shadow", "arg", "seed"]
    name: str
    dtype: torch.dtype
    index: int = -1
    trained: bool = False


@dataclass
class Forward:
    """The rewritten forward: `module(*inputs) -> loss` with fake inputs, and the plan that it was written from."""

    module: fx.GraphModule
    inputs: list[Input]
    fakes: list[Tensor]
    plan: Plan
    constants: dict[str, Tensor]
    # Number among the batch's tensors -> its fake, of those too that are read for their size alone.
    examples: dict[int, Tensor] = field(default_factory=dict)
    # What the program asked of the batch on its way.
    decisions: Sequence[Decision] = ()
    # Names of the buffers and constants that the graph casts to FP16 itself.
    low_buffers: Sequence[str] = ()


class LossOf(nn.Module):
    """The model with its loss, as one module from the batch's tensors to the scalar.

    Args:
      batch: the call's arguments (args, kwargs); what is not a tensor is a constant of the module.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any] | None, batch: Batch) -> None:
        super().__init__()
        self.model, self.loss_fn, self.batch = model, loss_fn, batch
        self.training = model.training

    def forward(self, *tensors: Tensor) -> Tensor:
        traced_as(tensors)
        args, kwargs = self.batch.rebuild(tensors)
        call = self.model if self.loss_fn is None else self.loss_fn
        operands = args if self.loss_fn is None else (self.model, *args)
        before = assignments.held(self)
        loss = loss_in(call(*operands, **kwargs))
        assignments.write_back(self, before)
        return loss


def owned(model: nn.Module, loss_fn: Callable[..., Any] | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(parameters, buffers) by the names that a step gives them: the model's, and those of a `loss_fn` with its own."""
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    buffers: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    if isinstance(loss_fn, nn.Module):
        parameters.update(_of_loss(loss_fn.named_parameters(remove_duplicate=False)))
        buffers.update(_of_loss(loss_fn.named_buffers(remove_duplicate=False)))
    return parameters, buffers


def _of_loss(named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{_OF_LOSS}{name}": tensor for name, tensor in named}


_OF_LOSS = "loss_fn:"
# What the optimizer holds and neither the model nor the loss owns: "optimizer:0.3" is number 3 of group 0.
OUTSIDE = "optimizer:"


def loss_in(output: Any) -> Tensor:
    """The scalar loss in what a model or `loss_fn` returned.

    Raises:
      TrainingError: MP531.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if isinstance(loss, (tuple, list)) and loss:
        loss = loss[0]
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point():
        return loss.reshape(())
    what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(output).__name__}"
    raise TrainingError(
        "MP531",
        f"the step found no scalar loss: it got {what}",
        try_="train_step(optimizer, loss_fn=lambda model, x, y: …) that returns a scalar",
    )


def capture(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    batch: Batch,
    settings: Settings,
    trained: set[int],
    named: dict[str, Tensor],
    dynamic: Sequence[tuple[int, int]] = (),
    *,
    chunk_loss: bool = True,
    compiled: bool = True,
) -> Forward:
    """Capture, decide and rewrite the model's loss.

    Args:
      batch: an example; its tensors are the graph's "arg" inputs.
      trained: ids of the parameters that the optimizer updates.
      named: all parameters; those that neither model nor loss owns enter where the loss reads them.
      dynamic: (tensor, dimension) pairs that stay symbolic.
      chunk_loss: take the loss of a large vocabulary in chunks of rows.
      compiled: the graph will be compiled, not run op by op.

    Raises:
      CaptureError: MP101. TrainingError: MP531.
    """
    sizes = tuple({d: Dim.AUTO for t, d in dynamic if t == i} for i in range(len(batch.tensors))) if dynamic else None
    with traced_calls.recording() as calls, contextlib.ExitStack() as stack:
        recorded = (checkpoints.seen(), custom_functions.recorded(), gradient_hooks.recorded())
        list(map(stack.enter_context, (*recorded, whole_calls.taken_whole(model))))
        decisions = stack.enter_context(decided(batch.tensors))
        # Export marks on the tensors themselves which sizes move: on aliases, not on the caller's.
        tensors = tuple(t.detach().requires_grad_(t.requires_grad) for t in batch.tensors)
        with host_random_refused(), containers_kept([model, loss_fn]):
            program = export(LossOf(model, loss_fn, batch), tensors, None, sizes and {"tensors": sizes})
    module = program.graph_module
    inline_regions(module)
    traced_calls.make_calls(module, calls)
    checkpoints.tag(module)
    _name_loss(module, loss_fn)
    sources = _name_inputs(program, module, named)
    plan = decide(module, settings, device_of(model.parameters()), held=_held(program))
    written = write(
        plan.capture,
        plan.graph,
        use_shadow=_shadow_alone,
        emulate=emulated_kinds(plan.device, plan.policy.low, compiled=compiled),
        linear=FP8_LINEAR,
    )
    _read_weights(written.module, {name: p for name, p in named.items() if id(p) in trained and gradient_hooks_of(p)})
    _fix_results(written.module, plan)
    written.module.graph.set_codegen(fx.graph.CodeGen())
    if chunk_loss:
        _chunk_losses(
            written.module, plan, loss_kernel.OPERATION if compiled and loss_kernel.serves(plan.device) else None
        )
    if compiled:
        align_linears(written.module, plan.capture, plan.graph, plan.device)
    written.module.recompile()
    constants = {_name_of_owner(name): value for name, value in program.constants.items()}
    forward = _assemble(written.module, written.shadows, sources, plan, constants, named, trained)
    forward.decisions = decisions
    forward.low_buffers = written.low_buffers
    return forward


def _read_weights(module: fx.GraphModule, hooked: dict[str, Tensor]) -> None:
    """Read shadows in their masters' place, but for `hooked`, whose hooks see the gradient of the master."""
    _read_masters(module, hooked)
    read_shadows(module, _shadow_alone)
    gradient_hooks.insert_for_parameters(module, hooked)


def _read_masters(module: fx.GraphModule, hooked: Mapping[str, Tensor]) -> None:
    """Cast what has gradient hooks in the graph: they see its whole gradient, in FP32."""
    for node in module.graph.find_nodes(op="call_function", target=_shadow_alone) if hooked else ():
        master = node.args[0]
        if master.meta.get("mp_name") in hooked:
            low = TORCH_DTYPES[node.meta["mp_low"]]
            node.target, node.args = torch.ops.aten.to.dtype, (master, low)


def _fix_results(module: fx.GraphModule, plan: Plan) -> None:
    """Results of the program's own calls have the types that the plan gives them, whatever the program's code gives."""
    for node, call in traced_calls.calls_of(module).items():
        planned = plan.graph.nodes.get(node.meta.get("mp_node", ""))
        if planned is not None:
            call.dtypes = [TORCH_DTYPES.get(plan.graph.values[name].dtype) for name in planned.outputs]


def _chunk_losses(module: fx.GraphModule, plan: Plan, kernel: loss_region.RowsKernel | None) -> None:
    value_of = values_of_written(plan.capture)
    regions = loss_region.find(module, value_of)
    if regions:
        with module.graph.inserting_after(inputs_of(module)[-1]):
            seed = module.graph.placeholder("seed")
        seed.meta["mp_name"] = "seed"
        loss_region.rewrite(
            module,
            regions,
            seed,
            value_of,
            lambda linear: padding(low_columns(linear, plan.graph), plan.device),
            kernel,
        )


def _shadow_alone(master: Tensor, shadow: Tensor) -> Tensor:
    return shadow


def _name_inputs(program: Any, module: fx.GraphModule, named: dict[str, Tensor]) -> dict[str, Input]:
    """Placeholder -> what it is, in the user's names; a tied parameter enters once."""
    outside = _outside(program, named)
    kinds = {
        InputKind.PARAMETER: "param",
        InputKind.BUFFER: "buffer",
        InputKind.CONSTANT_TENSOR: "constant",
        InputKind.USER_INPUT: "arg",
    }
    state, first, found, leaf = program.state_dict, dict[int, fx.Node](), dict[str, Input](), 0
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in module.graph.nodes:
        if "nn_module_stack" in node.meta:
            paths = [path for path, _ in node.meta["nn_module_stack"].values()]
            node.meta[LOSS_OWN] = not any(path == "model" or path.startswith("model.") for path in paths)
            # The user's own paths: what overrides name, and what the report shows.
            node.meta["nn_module_stack"] = {k: (_own(p), c) for k, (p, c) in node.meta["nn_module_stack"].items()}
    for node in module.graph.find_nodes(op="placeholder"):
        spec, value = specs[node.name], node.meta.get("val")
        kind: Any = kinds[spec.kind] if spec.target not in outside else "param"
        name = outside.get(spec.target) or (_name_of_owner(spec.target or "") if kind != "arg" else node.name)
        node.meta["mp_name"], node.meta["mp_role"] = name or node.name, _ROLES[kind]
        dtype = value.dtype if isinstance(value, Tensor) else torch.int64
        found[node.name] = Input(kind, name, dtype, leaf if kind == "arg" else -1)
        leaf += kind == "arg"
        if kind in ("param", "buffer") and (spec.target in state or spec.target in outside):
            held = named[name] if spec.target in outside else state[spec.target]
            twin = first.setdefault(id(held), node)
            if twin is not node:
                node.replace_all_uses_with(twin)
    return found


def _held(program: Any) -> dict[str, Tensor]:
    """Placeholder -> the model's own tensor."""
    held = {**program.constants, **program.state_dict}
    return {spec.arg.name: held[spec.target] for spec in program.graph_signature.input_specs if spec.target in held}


def _outside(program: Any, named: dict[str, Tensor]) -> dict[str, str]:
    """Constant of the program -> the parameter that it is: one that the loss reads and no module of it owns."""
    places = {_place(p): name for name, p in named.items() if name.startswith(OUTSIDE) and p.numel()}
    return {target: places[_place(t)] for target, t in program.constants.items() if _place(t) in places}


def _place(tensor: Any) -> Any:
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if type(tensor) in (Tensor, nn.Parameter) else None


def _name_loss(module: fx.GraphModule, loss_fn: Callable[..., Any] | None) -> None:
    """Torch keeps no frame of a function outside of modules: what has no line of the user's is of the loss function."""
    code: Any = getattr(loss_fn, "__code__", None)
    if code is None:
        return
    for node in module.graph.nodes:
        if node.op == "call_function" and not source_line(node):
            frame = f'  File "{code.co_filename}", line {code.co_firstlineno}, in {code.co_name}\n'
            node.meta["stack_trace"] = frame + (node.meta.get("stack_trace") or "")


def _name_of_owner(target: str) -> str:
    """A name of `LossOf`'s as `owned` has it."""
    if target.startswith("loss_fn."):
        return _OF_LOSS + target.removeprefix("loss_fn.")
    return target.removeprefix("model.")


def _own(path: str) -> str:
    return "" if path == "model" else path.removeprefix("model.")


_ROLES = {"param": "parameter", "buffer": "buffer", "constant": "constant", "arg": "input"}


def _assemble(
    module: fx.GraphModule,
    shadows: Sequence[tuple[str, str]],
    sources: dict[str, Input],
    plan: Plan,
    constants: dict[str, Tensor],
    parameters: dict[str, Tensor],
    trained: set[int],
) -> Forward:
    """Drop the inputs that nothing reads, and give each that is left its fake tensor."""
    low = {f"{name}.shadow": TORCH_DTYPES[to] for name, to in shadows}
    fakes = {n.name: n.meta["val"] for n in plan.capture.module.graph.find_nodes(op="placeholder")}
    by_name = {i.name: key for key, i in sources.items()}
    inputs, values = list[Input](), list[Tensor]()
    for node in module.graph.find_nodes(op="placeholder"):
        mark = node.meta.get("mp_name", "")
        if not node.users:
            module.graph.erase_node(node)
            continue
        if mark in low:
            master = mark.removesuffix(".shadow")
            wanted = id(parameters[master]) in trained
            values.append(_fake(fakes[by_name[master]], low[mark], wanted))
            inputs.append(Input("shadow", master, low[mark], trained=wanted))
            continue
        if node.name == "seed" and node.name not in sources:
            with values[0].fake_mode:  # type: ignore[attr-defined]
                values.append(torch.ones((), device=values[0].device))
            inputs.append(Input("seed", "seed", torch.float32))
            continue
        source = sources[node.name]
        wanted = source.kind == "param" and id(parameters[source.name]) in trained
        value = fakes[node.name]
        values.append(_fake(value, value.dtype, wanted) if isinstance(value, Tensor) else value)
        inputs.append(Input(source.kind, source.name, source.dtype, source.index, wanted))
    module.recompile()
    examples = {one.index: fakes[name] for name, one in sources.items() if isinstance(fakes.get(name), Tensor)}
    return Forward(module, inputs, values, plan, constants, {i: fake for i, fake in examples.items() if i >= 0})


def _fake(like: Tensor, dtype: torch.dtype, trained: bool) -> Tensor:
    with like.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_like(like, dtype=dtype).requires_grad_(trained)
