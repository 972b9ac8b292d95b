"""The step as one `fx.GraphModule`, and as a precision graph that the report and the laws read.

Forward and backward come from the joint graph, the optimizer's nodes from the update's; a tensor that several parts
read or write is one input.  Each node's verdict and reason are those of the forward node that it is, or whose gradient
it computes; the optimizer's arithmetic is FP32 by law 6.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import module_path, source_line
from mpcompile.aten.graphs import inputs_of, outputs_of
from mpcompile.aten.read import read
from mpcompile.formats import LOW
from mpcompile.graph import CAST_OP, CastOrigin, Node, Phase, PrecisionGraph
from mpcompile.hardware import emulated_kinds
from mpcompile.rules.table import rules_for
from mpcompile.torch_internals.modules import buffers_of
from mpcompile.training.distributed.reduce import Reducer
from mpcompile.training.distributed.scatter import Scatterer
from mpcompile.training.emitted import backward
from mpcompile.training.emitted.origins import note_origins
from mpcompile.training.gradients.forward import Forward
from mpcompile.training.gradients.joint import Joint
from mpcompile.training.gradients.specialization import Specialization
from mpcompile.training.optimizer.build import Update

_CASTS = ("aten._to_copy", "aten.to", "prims.convert_element_type")
_STORES = ("aten.copy_", "aten._foreach_copy_", "aten.view.dtype")


@dataclass
class Emitted:
    """The whole step: `module(*inputs)` runs it, and gives (loss, finite, norm, scale).

    Fields:
      inputs: the tensor that each placeholder stands for; None for a tensor of the batch.
      batch: placeholder -> number among the batch's tensors.
    """

    module: fx.GraphModule
    inputs: list[Tensor | None] = field(default_factory=list)
    batch: dict[int, int] = field(default_factory=dict)

    def arguments(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The live inputs, with a batch's tensors in their places."""
        return [tensors[self.batch[i]] if held is None else held for i, held in enumerate(self.inputs)]


class GraphStitcher:
    """Puts graphs one after the other into one, sharing the inputs that are the same tensor."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.emitted = Emitted(fx.GraphModule(torch.nn.Module(), self.graph))
        self._shared: dict[int, fx.Node] = {}
        self._last: fx.Node | None = None
        self._taken: dict[str, int] = {}

    def input(self, name: str, held: Tensor | None, value: Any, role: str, number: int = -1) -> fx.Node:
        """The placeholder of `held`, or of tensor `number` of the batch."""
        key = id(held) if held is not None else -1 - number
        if key not in self._shared:
            place = self.graph.inserting_after(self._last) if self._last else self.graph.inserting_before()
            with place:
                node = self.graph.placeholder(self._free(re.sub(r"\W|^(?=\d)", "_", name)))
            node.meta.update({"val": value, "mp_name": name, "mp_role": role})
            if held is None:
                self.emitted.batch[len(self.emitted.inputs)] = number
            self.emitted.inputs.append(held)
            self._shared[key], self._last = node, node
        return self._shared[key]

    def _free(self, stem: str) -> str:
        number = self._taken.get(stem, 0)
        self._taken[stem] = number + 1
        return stem if number == 0 else f"{stem}__{number}"

    def body(self, module: fx.GraphModule, given: Sequence[fx.Node], phase: Phase | None) -> list[Any]:
        """Copy the nodes of `module`, reading `given` for its inputs; returns its outputs."""
        env = dict(zip(inputs_of(module), given, strict=True))
        for node in module.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                env[node] = self._constant(module, node)
                continue
            new = self.graph.node_copy(node, lambda n: env[n])
            new.meta["mp_phase"] = phase or _phase(node)
            env[node] = new
        return [env[n] if isinstance(n, fx.Node) else n for n in outputs_of(module)]

    def write(self, target: fx.Node, value: fx.Node) -> None:
        """`target` holds `value` after the step."""
        new = self.graph.call_function(torch.ops.aten.copy_.default, (target, value))
        new.meta.update({"val": target.meta["val"], "mp_phase": "forward"})

    def finish(self, outputs: Sequence[fx.Node]) -> Emitted:
        self.graph.output(tuple(outputs))
        self.graph.lint()
        self.emitted.module = fx.GraphModule(self.emitted.module, self.graph, "TrainingStep")
        return self.emitted

    def _constant(self, module: fx.GraphModule, node: fx.Node) -> fx.Node:
        name = f"constant_{len(buffers_of(self.emitted.module))}"
        self.emitted.module.register_buffer(name, getattr(module, str(node.target)))
        new = self.graph.get_attr(name)
        new.meta.update(node.meta)
        return new


def emit(
    specialization: Specialization,
    update: Update,
    window: dict[str, Tensor] | None = None,
    reducer: Reducer | Scatterer | None = None,
) -> tuple[Emitted, Joint]:
    """Weave forward, backward and update into one graph.

    Args:
      window: the sums of an accumulation window, by parameter; the emitted step is then the window's last call.
      reducer: averages these sums over the ranks.
    """
    joint, weaver = specialization.emitted_joint(), GraphStitcher()
    module, needs = update.emit()
    given = _inputs(weaver, specialization, joint, update.seed)
    results = weaver.body(joint.module, given, None)
    count = len(joint.mutated)
    at = {place: number for number, place in enumerate(joint.places)}
    for place, value in zip(joint.mutated, results[:count], strict=True):
        weaver.write(given[at[place]], value)
    loss, grads = results[count], results[count + 1 :]
    if window is not None:
        grads = _summed(weaver, specialization, window, grads)
        grads = reducer.in_graph(weaver.graph, grads, list(window)) if reducer is not None else grads
    names, masters = _names(joint, specialization, update), set(map(id, specialization.named.values()))
    operands = []
    for node, need in zip(inputs_of(module), needs, strict=True):
        if isinstance(need, int):
            operands.append(grads[need])
        else:
            name, role = names.get(id(need), str(node.target)), "parameter" if id(need) in masters else "buffer"
            operands.append(weaver.input(name, need, node.meta["val"], role))
    return weaver.finish([loss, *weaver.body(module, operands, "optimizer")]), joint


def _inputs(weaver: GraphStitcher, specialization: Specialization, joint: Joint, seed: Tensor) -> list[fx.Node]:
    """The inputs of forward and backward: the forward's, the rank's shares of weights, the seed."""
    described = []
    for place in joint.places:
        one = joint.forward.inputs[place]
        name = f"{one.name}.shadow" if one.kind == "shadow" else one.name
        described.append((name, specialization.fixed[place], _ROLES[one.kind], one.index))
    described += [(f"share_{i}", held, "parameter", -1) for i, held in enumerate(specialization.shares)]
    described.append(("seed", seed, "buffer", -1))
    return [
        weaver.input(name, held, node.meta["val"], role, index)
        for node, (name, held, role, index) in zip(inputs_of(joint.module), described, strict=True)
    ]


def _summed(
    weaver: GraphStitcher, specialization: Specialization, window: dict[str, Tensor], grads: list[fx.Node]
) -> list[fx.Node]:
    """The window's sums with this call's gradients added, one per parameter."""
    sums: dict[str, fx.Node] = {}
    for (name, _), grad in zip(specialization.layout, grads, strict=True):
        if name not in sums:
            sums[name] = weaver.input(f"{name}.grad", window[name], _fake_like(grad, window[name]), "buffer")
        new = weaver.graph.call_function(torch.ops.aten.add.Tensor, (sums[name], grad))
        new.meta.update({"val": sums[name].meta["val"], "mp_phase": "optimizer", "mp_window": True})
        sums[name] = new
    return [sums[name] for name in window]


def _fake_like(node: fx.Node, tensor: Tensor) -> Tensor:
    with node.meta["val"].fake_mode:
        return torch.empty_like(node.meta["val"], dtype=tensor.dtype)


def _names(joint: Joint, specialization: Specialization, update: Update) -> dict[int, str]:
    """id of a live tensor -> what to call it."""
    pairs = zip(joint.forward.inputs, specialization.fixed, strict=True)
    names = {id(held): one.name for one, held in pairs if held is not None}
    names.update({id(p): name for name, p in specialization.named.items()})
    binding = update.binding
    for (i, key), state in zip(binding.tensors, binding.state_tensors(), strict=True):
        names[id(state)] = f"{names.get(id(binding.params[i]), 'parameter')}.{key}"
    for one in binding.shared:
        names[id(one.value)], names[id(one.base)] = one.key, f"{one.key}.all"
    names.update({id(t): f"loss_{field}" for field, t in update.scale._asdict().items()})
    names[id(update.numbers)] = "hyperparameters"
    return names


_ROLES = {
    "param": "parameter",
    "buffer": "buffer",
    "constant": "constant",
    "shadow": "parameter",
    "arg": "input",
    "seed": "buffer",
}


def _phase(node: fx.Node) -> Phase:
    return "backward" if node.meta.get("partitioner_tag") == "is_backward" else "forward"


def precision_graph(emitted: Emitted, joint: Joint) -> PrecisionGraph:
    """The emitted step as a decided precision graph: verdict, precision, phase and reason on every node."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(emitted.module.graph, {}))
    module = fx.GraphModule(emitted.module, copied)
    forward = joint.forward
    capture = read(module, {"device": forward.plan.row, "policy": str(forward.plan.policy)})
    graph, by_name = capture.graph, {n.name: n for n in module.graph.nodes}
    origins = _Origins(forward, module.graph)
    for node in graph:
        found = by_name[node.id]
        node.phase = found.meta.get("mp_phase", "optimizer")
        _set_precision(graph, node, forward.plan.policy.low)
        origins.explain(graph, node, found)
    note_origins(graph, forward.plan.policy.low)
    if emulated_kinds(forward.plan.device, forward.plan.policy.low, compiled=False):
        _mark_roundings(graph)
    return graph


def _mark_roundings(graph: PrecisionGraph) -> None:
    """Where a low type is emulated (all of FP16 on a CPU, norms op by op), an FP32 result that is rounded and widened again is
    a rounding, not a pair of casts.
    """
    for cast in graph.casts():
        before = graph.producer(cast.inputs[0])
        if before is not None and before.is_cast:
            low = str(before.attrs["to"])
            before.op, before.out_dtype, before.origin = "aten._to_copy.default", low, ""
            before.precision, before.reason = low, f"rounds to {low.upper()} what this device computes in FP32"  # type: ignore[assignment]


class Place(NamedTuple):
    """Where a node of a step comes from: the user's module and line, and the node of the plan (what overrides name)."""

    module: str = ""
    source: str = ""
    node: str = ""


def origins(joint: Joint) -> dict[str, Place]:
    """Node of a joint graph -> the place of the forward node that it is, or whose gradient it computes."""
    known = _Origins(joint.forward, joint.module.graph)
    found, sequence = dict[str, Place](), dict[int, Place]()
    for node in joint.module.graph.nodes:
        name = known.origin(node)
        planned = known.plan.nodes.get(name)
        place = Place(planned.module, planned.source, name) if planned else Place(module_path(node), source_line(node))
        number = node.meta.get("seq_nr", -1)
        # A cast of ours has no node in the plan, and its gradient no stack: its forward tells, or what it reads.
        before = next((found[n.name] for n in node.all_input_nodes if any(found[n.name])), place)
        found[node.name] = place if any(place) else sequence.get(number, before)
        found[node.name] = found[node.name] if any(found[node.name]) else before
        sequence.setdefault(number, found[node.name])
    return found


class _Origins:
    """Which node of the plan a node of the step comes from."""

    def __init__(self, forward: Forward, graph: fx.Graph) -> None:
        self.plan, self.low = forward.plan.graph, forward.plan.policy.low
        self.rules = rules_for("aten")
        self.written = {n.name: n.meta.get("mp_node", n.name) for n in forward.module.graph.nodes}
        self.sequence: dict[int, str] = {}
        for node in graph.nodes:
            origin = self._direct(node)
            if origin and isinstance(node.meta.get("val"), Tensor) and node.meta["val"].is_floating_point():
                self.sequence.setdefault(node.meta.get("seq_nr", -1), origin)

    def _direct(self, node: fx.Node) -> str:
        sources = node.meta.get("from_node") or ()
        return str(self.written.get(sources[-1].name, "")) if sources else ""

    def origin(self, node: fx.Node) -> str:
        """The plan's node that `node` is, or whose gradient it computes; "" if neither."""
        return self._direct(node) or self.sequence.get(node.meta.get("seq_nr", -1), "")

    def explain(self, graph: PrecisionGraph, node: Node, found: fx.Node) -> None:
        """Fill in kind, verdict, reason and who decided."""
        rule = self.rules.get(node.op)
        node.kind = rule.kind.name if rule else "custom"
        if node.is_cast:
            _explain_cast(graph, node, found)
            return
        name = self.origin(found)
        planned = self.plan.nodes.get(name)
        if "mp_window" in found.meta:
            node.decide(*backward.of_window(node))
        elif node.phase == "optimizer" and node.precision in LOW:
            node.decide("low", f"the optimizer's own code computes in {node.precision}", "user-cast")
        elif node.phase == "optimizer":
            node.decide("fp32", "law 6: unscaling, clipping, the update and the loss scale are FP32", "rule")
        elif node.op.startswith(_STORES):
            node.decide("propagate", "stores a value that is computed already", "rule")
        elif node.phase == "backward" and not self._direct(found) and (said := backward.of_sum(graph, node)):
            node.decide(*said, "rule")
        elif planned is not None and not planned.is_cast:
            node.module, node.source = node.module or planned.module, node.source or planned.source
            verdict, reason = planned.verdict or "propagate", planned.reason
            if node.phase == "backward":
                verdict, reason = backward.of_gradient(node, name, planned)
            node.decide(verdict, reason, planned.decided_by)
        else:
            verdict = rule.verdict_for(self.low) if rule else "propagate"
            verdict = "propagate" if verdict == "fp32" and node.precision in LOW else verdict
            node.decide(verdict, rule.why() if rule else _OURS.get(node.op, backward.JOINS), "rule")


_OURS = {"mpcompile.quantise.default": "makes the copies in which products read an operand in FP8, and their scales"}


def _set_precision(graph: PrecisionGraph, node: Node, low: str) -> None:
    """Read the node's precision off the dtypes that stand in the graph; name the operands that differ."""
    reads = [graph.values[name].dtype if graph.values[name].castable else "" for name in node.inputs]
    gives = [graph.values[name].dtype if graph.values[name].castable else "" for name in node.outputs]
    if node.op.startswith(_CASTS) and len(gives) == 1 and gives[0] and reads[:1] not in ([], [""], gives):
        node.op, node.attrs, node.out_dtype = CAST_OP, {"to": gives[0]}, ""
        node.origin = _cast_origin(graph, node)
        return
    node.out_dtype = ""
    if node.op.startswith(_STORES):
        # Moves a value that is computed already into its place, whatever that place holds.
        node.precision, node.operands = "keep", dict.fromkeys(node.slots, "any")
        return
    floats = [d for d in (gives if any(gives) else reads) if d]
    found: Any = next((d for d in floats if d in LOW), "fp32") if floats else "keep"
    if not any(gives) and "fp32" in floats:
        found = "fp32"  # in place on an FP32 operand
    node.precision = found
    for operand, dtype in enumerate(reads):
        if dtype and dtype != node.precision:
            slot = node.slots[operand]
            mixed = {reads[i] for i, s in enumerate(node.slots) if s == slot} != {dtype}
            node.operands = {**node.operands, slot: "fp32" if dtype == "fp32" and not mixed else "any"}
    for output, dtype in enumerate(gives):
        if dtype and dtype != node.precision:
            node.results = {**node.results, output: dtype}


def _cast_origin(graph: PrecisionGraph, node: Node) -> CastOrigin:
    if node.phase == "optimizer" and node.attrs["to"] in LOW:
        return "shadow"
    return "inserted"


def _explain_cast(graph: PrecisionGraph, node: Node, found: fx.Node) -> None:
    node.kind, node.verdict = "cast", "propagate"
    source, to = graph.values[node.inputs[0]], node.attrs["to"]
    before = graph.producer(node.inputs[0])
    if node.origin == "shadow" and any(not str(user.target).startswith(_STORES) for user in found.users):
        node.origin, node.reason = "existing", f"the optimizer's own code rounds to {to}"
    elif node.origin == "shadow":
        node.reason = "the shadow of the new master"
    elif node.phase == "optimizer" and before is not None and before.phase == "optimizer":
        node.origin, node.reason = "existing", f"the optimizer's own code goes from {source.dtype} to {to}"
    elif node.phase == "optimizer" and before is None and not source.name.endswith(".grad"):
        node.reason = f"a state that is held in {source.dtype} enters the update in FP32"
    elif node.phase == "optimizer":
        node.reason = "a gradient enters the update in FP32"
    else:
        node.reason = f"{source.dtype} meets {to} in the {node.phase}"
