"""Write the emitted training step as one plain ONNX model, whose state goes in and comes out.

The step's in-place writes become outputs.  What the exporter gets wrong or lacks is decomposed first
(`mpcompile.onnx.export.decompositions`); afterwards every type promotion is made explicit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mpcompile.errors import OnnxError
from mpcompile.onnx.export.decompositions import REFUSED, step_table
from mpcompile.onnx.export.dropout import RANDOM, Counter
from mpcompile.onnx.export.forward import translate
from mpcompile.onnx.export.unify_types import unify_types
from mpcompile.onnx.read.prepare import OPSETS

# They ask for strides; ONNX has none, and what is decomposed may come out in others.
VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
COPIES = (
    torch.ops.aten.clone.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default,
    torch.ops.prims.copy_strided.default,
)  # fmt: skip
SEED = "dropout_seed"
RESULTS = ("loss", "finite", "grad_norm", "scale")


@dataclass
class OnnxStep:
    """A training step in ONNX.

    Fields:
      model: inputs are the batch and the state, outputs the results and the next state.
      inputs: name of each input, in the order of the emitted step's.
      written: (input, output): the state that comes out, to go in again.
      seeded: the last input is the counter of the random numbers (see `mpcompile.onnx.export.dropout`).
    """

    model: ir.Model
    inputs: list[str]
    written: list[tuple[str, str]]
    notes: list[str]
    seeded: bool = False


def step_to_onnx(module: fx.GraphModule, arguments: Sequence[Tensor], low: str) -> OnnxStep:
    """Translate the emitted step `module` for these live inputs.

    Raises:
      OnnxError: MP607, MP608, for operations without an ONNX form.
    """
    _refuse(module)
    functional, places = _functional(module)
    arguments = [tensor.detach() for tensor in arguments]
    random, act = Counter(), cast("Callable[..., Any]", functional)
    names = [_name(node, i) for i, node in enumerate(module.graph.find_nodes(op="placeholder"))]
    seeded = any(node.target in RANDOM for node in module.graph.nodes)
    if seeded:

        def with_counter(*given: Tensor) -> Any:
            random.begin(given[-1])
            return *functional(*given[:-1]), given[-1] + 1

        act = with_counter
        places.append(len(arguments))
        arguments.append(torch.zeros((), dtype=torch.int64))
        names.append(SEED)
    with torch.no_grad():
        traced = make_fx(act, step_table(random), tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
        _tidy(traced)
    model, _ = translate(traced, tuple(arguments), {}, None, OPSETS.get(low, 20))
    added = unify_types(model, "cuda")
    made = _named(model, names, places, added)
    made.seeded = seeded
    return made


def _refuse(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith(REFUSED):
            raise OnnxError("MP608", f"{node.target} has no ONNX form in a training step", where=node.name)


def _functional(module: fx.GraphModule) -> tuple[fx.GraphModule, list[int]]:
    """The step without writes: what would be written is returned behind the results; places are those of the inputs."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    holders = module.graph.find_nodes(op="placeholder")
    after: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            results = [env[n] for n in node.args[0]]
        elif node.target is torch.ops.aten.copy_.default and node.args[0] in holders:
            after[node.args[0]] = _fitted(graph, env[node.args[1]], node.args[0].meta["val"])
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
            if env[node].target in VIEWS:
                env[node].target = torch.ops.aten.reshape.default
    written = [node for node in holders if node in after]
    graph.output((*results, *(after[node] for node in written)))
    return fx.GraphModule(module, graph), [holders.index(node) for node in written]


def _fitted(graph: fx.Graph, value: fx.Node, target: Tensor) -> fx.Node:
    """`copy_` broadcasts and converts; an output does neither."""
    fake = value.meta["val"]
    if fake.dtype != target.dtype:
        value = graph.call_function(torch.ops.aten.to.dtype, (value, target.dtype))
    if fake.shape != target.shape:
        value = graph.call_function(torch.ops.aten.expand.default, (value, list(target.shape)))
    return value


def _tidy(module: fx.GraphModule) -> None:
    """Copies of a functional graph are the value itself."""
    for target in COPIES:
        for node in module.graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for view in VIEWS:
        for node in module.graph.find_nodes(op="call_function", target=view):
            node.target = torch.ops.aten.reshape.default
    module.graph.eliminate_dead_code()
    module.recompile()


def _name(node: fx.Node, index: int) -> str:
    return str(node.meta.get("mp_name", node.target)) or f"input_{index}"


def _named(model: ir.Model, names: list[str], places: list[int], added: int) -> OnnxStep:
    """Give inputs and outputs the names of what they are; an output that stands twice is copied."""
    unique: list[str] = []
    for name in names:
        unique.append(name if name not in unique else f"{name}.{len(unique)}")
    for value in [v for node in model.graph for v in node.outputs] + list(model.graph.initializers.values()):
        if value.name in unique or value.name in RESULTS:
            value.name = f"{value.name}.inner"
    for value, name in zip(model.graph.inputs, unique, strict=True):
        value.name = name
    outputs = [*RESULTS, *(f"{unique[place]}.next" for place in places)]
    for index, name in enumerate(outputs):
        value = model.graph.outputs[index]
        copy = ir.Node("", "Identity", [value], name=f"{name}/Identity")
        copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = name, value.type, value.shape
        model.graph.append(copy)
        model.graph.outputs[index] = copy.outputs[0]
    written = [(unique[place], f"{unique[place]}.next") for place in places]
    notes = [f"{added} casts make explicit what PyTorch promotes inside"] if added else []
    return OnnxStep(model, unique, written, notes)
