"""What is compared and calibrated: the graph of a model's forward and backward on one batch, in a plan, with its inputs."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from mpcompile.aten.facts import LOW_DTYPES
from mpcompile.compiler import Plan, Settings
from mpcompile.errors import MPCompileError
from mpcompile.formats import LOW
from mpcompile.graph import Node
from mpcompile.hardware import device_of
from mpcompile.torch_internals.tensors import pytree
from mpcompile.training.emitted.weave import Place, origins
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.gradients.forward import Forward, capture, loss_in, owned
from mpcompile.training.gradients.joint import trace
from mpcompile.training.gradients.specialization import compiling
from mpcompile.training.numerics import fp8_lanes
from mpcompile.training.numerics.lockstep import MOVES, is_cast, is_move, raised

MODEL, GIVEN, PROJECTION = "the model's loss", "loss_fn", "a projection of the outputs"


@dataclass
class Subject:
    """A graph that is run, and what its nodes are.

    Fields:
      module: (*inputs[, seed]) -> (*mutated, loss[, *gradients]).
      inputs, full: the plan's inputs, and the same in FP32.
      places: node's name -> module, line, node of the plan.
      group: node -> (phase, node of the plan), or a name of its own.
      exits: nodes whose results are compared (what a group computes that others read) -> the operation that made each.
      rounded: casts that the program itself asks for (one to the type that the plan holds the value in anyway is none).
      loss_at: place of the loss among the outputs.
      gradients: (place among the outputs, parameter's name).
      kinds: of each input its kind, its type in the plan, its place in the batch, and the model's tensor.
    """

    module: fx.GraphModule
    plan: Plan
    inputs: list[Any]
    full: list[Any]
    places: dict[str, Place]
    group: dict[fx.Node, Any]
    exits: dict[fx.Node, fx.Node]
    rounded: frozenset[fx.Node]
    loss_at: int
    gradients: list[tuple[int, str]]
    kinds: list[tuple[str, Any, int, Tensor | None]] = field(default_factory=list)

    def full_inputs(self, batch: Batch) -> list[Any]:
        """The FP32 inputs for another batch of the same signature."""
        return [raised(given(kind, index, tensor, batch)) for kind, _, index, tensor in self.kinds]

    def planned(self, node: fx.Node) -> Node | None:
        """The node of the plan that `node` is a part of."""
        group = self.group.get(node)
        return self.plan.graph.nodes.get(group[1]) if isinstance(group, tuple) else None

    def device(self) -> torch.device:
        tensors = [t for t in self.inputs if isinstance(t, Tensor)]
        return next((t.device for t in tensors if t.device.type == "cuda"), torch.device("cpu"))


def subject(model: nn.Module, loss_fn: Callable[..., Any] | None, batch: Batch, settings: Settings, *,
            gradients: bool = True, named: dict[str, Tensor] | None = None) -> Subject:  # fmt: skip
    """Capture, decide, and differentiate where `gradients`: by the trained parameters, or where all are frozen, by all.

    The graph ends without the seed's value: callers append it to `inputs` and `full`.

    Raises:
      CaptureError: MP101. TrainingError: what the capture of a step may raise.
    """
    with compiling(), _plain_attention(device_of(model.parameters())):
        named = named or owned(model, loss_fn)[0]
        trained = trained_ones(named) if gradients else set()
        forward = capture(model, loss_fn, batch, settings, trained, named, chunk_loss=False, compiled=False)
        if not trained:
            FakeTensorProp(forward.module, forward.fakes[0].fake_mode).propagate_dont_convert_inputs(*forward.fakes)  # type: ignore[attr-defined]
            return _subject(forward, forward.module, model, loss_fn, batch, named, 0, [])
        joint = trace(forward)
    names = [(len(joint.mutated) + 1 + k, forward.inputs[place].name) for k, place in enumerate(joint.grads)]
    return _subject(forward, joint.module, model, loss_fn, batch, named, len(joint.mutated), names, origins(joint))


def trained_ones(named: dict[str, Tensor]) -> set[int]:
    """Ids of the parameters to differentiate by."""
    floats = [p for p in named.values() if p.is_floating_point() and p.dtype not in LOW_DTYPES]
    return {id(p) for p in floats if p.requires_grad} or {id(p) for p in floats}


@contextlib.contextmanager
def _plain_attention(device: str) -> Iterator[None]:
    """On CUDA the fused kernels take low types alone: for FP32 to run the same graph, attention is taken apart."""
    if device != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def _subject(
    forward: Forward,
    module: fx.GraphModule,
    model: nn.Module,
    loss_fn: Any,
    batch: Batch,
    named: dict[str, Tensor],
    loss_at: int,
    gradients: list[tuple[int, str]],
    places: dict[str, Place] | None = None,
) -> Subject:
    tensors = {**forward.constants, **owned(model, loss_fn)[1], **named}
    kinds: list[tuple[str, Any, int, Tensor | None]]
    kinds = [(one.kind, one.dtype, one.index, tensors.get(one.name)) for one in forward.inputs if one.kind != "seed"]
    held = [given(kind, index, tensor, batch) for kind, _, index, tensor in kinds]
    if module is forward.module:
        # Nothing took its writes in place out: they go to copies.
        held = [one.clone() if isinstance(one, Tensor) and kind[0] not in ("param", "shadow") else one
                for one, kind in zip(held, kinds, strict=True)]  # fmt: skip
    full = [raised(one) for one in held]
    inputs = [one.to(dtype) if kind == "shadow" else one for one, (kind, dtype, _, _) in zip(held, kinds, strict=True)]
    places = _places(forward) if places is None else places
    group = groups(module, forward.plan, places)
    return Subject(module, forward.plan, inputs, full, places, group, exits(module, group),
                   _own_casts(module, forward.plan, places), loss_at, gradients, kinds)  # fmt: skip


def given(kind: str, index: int, tensor: Tensor | None, batch: Batch) -> Any:
    """What the graph reads there: a tensor of the batch, or the model's own as it is now."""
    held = batch.tensors[index] if kind == "arg" else tensor
    return held.detach() if isinstance(held, Tensor) else held


def _places(forward: Forward) -> dict[str, Place]:
    """Of a forward that is not differentiated."""
    found, graph = dict[str, Place](), forward.plan.graph
    for node in forward.module.graph.nodes:
        name = str(node.meta.get("mp_node", ""))
        planned = graph.nodes.get(name)
        found[node.name] = Place(planned.module, planned.source, name) if planned else Place()
    return found


def phase_of(node: fx.Node) -> str:
    return "backward" if node.meta.get("partitioner_tag") == "is_backward" else "forward"


def fp32_settings(settings: Settings) -> Settings:
    """The same in FP32."""
    return replace(settings, policy=replace(settings.policy, low="fp32", products="low"), keep_fp32=(), low=(), fp8=(),
                   ranges=None)  # fmt: skip


def groups(module: fx.GraphModule, plan: Plan, places: dict[str, Place]) -> dict[fx.Node, Any]:
    """Which nodes compute one node of the plan (its forward, or its gradients) together."""
    found = dict[fx.Node, Any]()
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        planned = plan.graph.nodes.get(places[node.name].node)
        found[node] = (phase_of(node), planned.id) if planned and not planned.is_cast else node.name
        before = node.all_input_nodes[0] if node.all_input_nodes else None
        # Where a type is emulated, a product computes in FP32 and the cast that follows is its rounding.
        if is_cast(node) and before in found and _rounds_for(plan, found[before], node):
            found[node] = found[before]
    return found


def _rounds_for(plan: Plan, group: Any, cast: fx.Node) -> bool:
    if not isinstance(group, tuple):
        return False
    source, value = cast.all_input_nodes[0].meta["val"], cast.meta["val"]
    return plan.graph.nodes[group[1]].precision in LOW and source.dtype == torch.float32 and value.dtype in LOW_DTYPES


def exits(module: fx.GraphModule, group: dict[fx.Node, Any]) -> dict[fx.Node, fx.Node]:
    """What each group computes and others read: the last node of each such value inside the group -> its operation."""
    found, makers = dict[fx.Node, fx.Node](), set[fx.Node]()
    copies = fp8_lanes.copies(module.graph, MOVES)  # part of the product that reads them
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node not in group or node in copies or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        readers = [user for user in node.users if group.get(user) != group[node]]
        maker = _maker(node, group)
        # What a forward only keeps for its own backward (statistics) is not its value.
        kept = phase_of(node) == "forward" and readers and all(phase_of(user) == "backward" for user in readers)
        if maker is None or maker in makers or not readers or kept or _is_exact(node):
            continue
        makers.add(maker)
        found[node] = maker.all_input_nodes[0] if maker.target is operator.getitem else maker
    return found


def _maker(node: fx.Node, group: dict[fx.Node, Any]) -> fx.Node | None:
    """The node of the same group that computes what `node` moves or rounds; None where it only moves what it was given."""
    at = node
    while at.all_input_nodes and (is_cast(at) or is_move(at)):
        before = at.all_input_nodes[0]
        if before not in group or group[before] != group[at]:
            return at if is_cast(at) and not _is_exact(at) else None
        if not isinstance(before.meta.get("val"), Tensor) and not is_move(before):
            return at  # one result of several
        at = before
    return at


def _is_exact(node: fx.Node) -> bool:
    """A cast that loses nothing."""
    return is_cast(node) and node.meta["val"].dtype == torch.float32


def _own_casts(module: fx.GraphModule, plan: Plan, places: dict[str, Place]) -> frozenset[fx.Node]:
    """Roundings of the program's own casts, and of their gradients."""
    found = set[fx.Node]()
    for node in module.graph.nodes:
        planned = plan.graph.nodes.get(places[node.name].node) if node.name in places else None
        if planned is None or planned.kind != "cast" or planned.is_cast:
            continue
        if is_cast(node) and node.meta["val"].dtype in LOW_DTYPES:
            found.add(node)
    return frozenset(found)


class Differentiable:
    """``loss_fn`` where none was given: the model's own loss, or else a projection of all that it returns.

    The projection is the mean of the outputs times signs that depend on their places alone, so that every output takes part
    and nothing is drawn.
    """

    def __init__(self) -> None:
        self.is_projection = False

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        output = model(*args, **kwargs)
        try:
            return loss_in(output)
        except MPCompileError:
            self.is_projection = True
        parts = [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]
        parts = [part for part in parts if part.is_floating_point() and part.numel()]
        if not parts:
            return loss_in(output)
        return torch.stack([(part.float() * _signs(part)).mean() for part in parts]).sum()


def _plain(output: Any) -> Any:
    return dict(output) if hasattr(output, "keys") else output


def _signs(part: Tensor) -> Tensor:
    places = torch.arange(part.numel(), device=part.device)
    return (((places * 2654435761) >> 16) % 2 * 2 - 1).to(torch.float32).reshape(part.shape)
