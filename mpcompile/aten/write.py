"""Write a decided precision graph back as an ATen `fx.GraphModule`.

The original nodes are copied in their order; a cast of the plan becomes ``aten.to.dtype``, standing where the plan
has it.  With `shadows`, the cast of a parameter becomes a new graph input that the run time keeps up to date, tied to
its master so that the gradient reaches the master in FP32.  With `emulate`, low nodes of the named kinds compute in
FP32 and round their result, for devices whose kernels do not take the low type.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mpcompile.aten.facts import TORCH_DTYPES
from mpcompile.aten.graphs import shown_by
from mpcompile.aten.read import FxCapture, operands
from mpcompile.formats import LOW
from mpcompile.fp8 import copies
from mpcompile.graph import Node, PrecisionGraph
from mpcompile.rules.hazards import MASK_SLOT, SELECTS, THROUGH, base
from mpcompile.torch_internals.dynamo import codegen_of

_COPIED_META = ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id", "custom", "mp_name", "tensor_dict")

_ATEN = torch.ops.aten
# Operations whose numbers are bounds of a value; a kernel of a low type refuses one that the type does not have.
_BOUNDED = frozenset({_ATEN.clamp.default, _ATEN.clamp_.default, _ATEN.clamp_min.default, _ATEN.clamp_min_.default,
                      _ATEN.clamp_max.default, _ATEN.clamp_max_.default, _ATEN.clip.default, _ATEN.hardtanh.default,
                      _ATEN.hardtanh_.default})  # fmt: skip


def _in_range(given: Any, dtype: torch.dtype) -> Any:
    """A number as `dtype` would round it: beyond its range, an infinity."""
    if isinstance(given, bool) or not isinstance(given, (int, float)) or abs(given) <= torch.finfo(dtype).max:
        return given
    return given if math.isnan(given) else math.copysign(math.inf, given)


@dataclass
class Written:
    """A rewritten module.

    Fields:
      shadows: per added input, the parameter's value and the low type.
      low_buffers: buffers and constants, of the graph's inputs, that it casts to FP16 itself, seen through views.
    """

    module: fx.GraphModule
    shadows: list[tuple[str, str]] = field(default_factory=list)
    low_buffers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FP8Linear:
    """What a linear layer that reads FP8 calls in the graph.

    Fields:
      quantise: (an input, as it lies, transposed, recipe) -> its copies; `transposed` is made for a backward alone.
      quantise_weight: the same of a weight.
      multiply: (input, weight, bias, the input's copies, the weight's, passes in FP8, recipe) -> the result.
    """

    quantise: Callable[..., Any]
    quantise_weight: Callable[..., Any]
    multiply: Callable[..., Any]


@dataclass
class _Writer:
    capture: FxCapture
    plan: PrecisionGraph
    use_shadow: Callable[..., Any] | None
    emulate: frozenset[str]
    graph: fx.Graph = field(default_factory=fx.Graph)
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)
    values: dict[str, fx.Node] = field(default_factory=dict)
    linear: FP8Linear | None = None
    # Copies in FP8 made so far, by the value that they are of.
    made: dict[str, fx.Node] = field(default_factory=dict)
    layouts: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    recipe: str = "tensorwise"
    shadows: list[tuple[str, str]] = field(default_factory=list)
    low_buffers: dict[str, None] = field(default_factory=dict)
    last_input: fx.Node | None = None
    # Casts that attention reads as its additive mask.
    masks: frozenset[str] = frozenset()

    def run(self) -> Written:
        self.masks = _masks(self.plan)
        self.recipe = "rowwise" if "fp8=rowwise" in self.plan.header.get("policy", "") else "tensorwise"
        casts = _casts_after(self.plan)
        inputs_done = False
        for node in self.capture.module.graph.nodes:
            if node.op not in ("placeholder", "get_attr") and not inputs_done:
                inputs_done = True
                self._casts(casts.get("", ()))
            self._copy(node)
            self._casts(casts.get(node.name, ()) if node.op == "call_function" else ())
        self.graph.lint()
        # An exported graph takes and gives the user's own structures.
        self.graph.set_codegen(codegen_of(self.capture.module.graph))
        module = fx.GraphModule(self.capture.module, self.graph)
        module.meta.update({k: v for k, v in self.capture.module.meta.items() if k != "dynamo_compile_id"})
        return Written(module, self.shadows, list(self.low_buffers))

    def _copy(self, node: fx.Node) -> None:
        if node.op == "output":
            self._output(node)
            return
        if node in self.env:
            return  # a get_attr that a cast fetched early
        planned = self.plan.nodes.get(node.name) if node.op == "call_function" else None
        if planned is not None and planned.fp8 and self.linear is not None:
            self.env[node] = self._fp8(node, planned, self.linear)
            return
        new = self.graph.node_copy(node, self._argument_map(node, planned))
        new.meta = {k: node.meta[k] for k in _COPIED_META if k in node.meta}
        if node.op == "placeholder":
            self.last_input = new
        if planned is not None:
            new.meta["mp_node"] = planned.id
            if planned.precision in LOW and node.target in _BOUNDED:
                new.args = tuple(_in_range(one, TORCH_DTYPES[planned.precision]) for one in new.args)
                new.kwargs = {k: _in_range(one, TORCH_DTYPES[planned.precision]) for k, one in new.kwargs.items()}
            new = self._rounded(new, planned)
        self.env[node] = new

    def _fp8(self, node: fx.Node, planned: Node, linear: FP8Linear) -> fx.Node:
        """A linear layer that reads FP8: its operands' copies, each made once, and the products."""
        call, given = self.graph.call_function, [self.fetch(name) for name in planned.inputs]
        bias = given[2] if len(given) > 2 else None
        meta = {k: node.meta[k] for k in _COPIED_META if k in node.meta}
        quantised = []
        ways = (linear.quantise, linear.quantise_weight)
        for name, source, way in zip(planned.inputs[:2], given, ways, strict=False):
            if name not in self.made:
                self.made[name] = call(way, (source, *self._layouts()[name], self.recipe))
                self.made[name].meta = dict(meta)
            quantised.append(self.made[name])
        new = call(linear.multiply, (given[0], given[1], bias, *quantised, tuple(planned.fp8), self.recipe))
        new.meta = {**meta, "mp_node": planned.id}
        return new

    def _layouts(self) -> dict[str, tuple[bool, bool]]:
        """Value -> which copies its readers want: as it lies, transposed."""
        if not self.layouts:
            wanted: dict[str, set[bool]] = {}
            for node in self.plan:
                for copy in [copy for step in node.fp8 for copy in copies(node)[step]]:
                    wanted.setdefault(copy.value, set()).add(copy.transposed)
            self.layouts = {name: (False in found, True in found) for name, found in wanted.items()}
        return self.layouts

    def _argument_map(self, node: fx.Node, planned: Node | None) -> Callable[[fx.Node], fx.Node]:
        """Maps the old arguments, in the order in which `node_copy` visits them, to what the plan reads."""
        if planned is None:
            return lambda n: self.env[n]
        tensors = [n for n, _ in operands(node) if n in self.capture.names]
        read = iter(zip(tensors, planned.inputs, strict=True))

        def take(old: fx.Node) -> fx.Node:
            if old not in self.capture.names:
                return self.env[old]
            _, name = next(read)
            return self._operand(name, planned)

        return take

    def _operand(self, name: str, reader: Node) -> fx.Node:
        found = self.fetch(name)
        if not self._emulated(reader) or self.plan.values[name].dtype not in LOW:
            return found
        return self._cast(found, torch.float32)

    def _emulated(self, node: Node) -> bool:
        return node.precision in LOW and node.kind in self.emulate

    def _rounded(self, new: fx.Node, planned: Node) -> fx.Node:
        if not self._emulated(planned) or len(planned.outputs) != 1:
            return new
        return self._cast(new, TORCH_DTYPES[self.plan.values[planned.outputs[0]].dtype])

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        new = self.graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
        new.meta = {k: node.meta[k] for k in _COPIED_META[:4] if k in node.meta}
        return new

    def fetch(self, name: str) -> fx.Node:
        """The new node that holds a value: a cast's, an original's, or an item of its tuple."""
        if name in self.values:
            return self.values[name]
        old, index = self.capture.origin[name]
        if old not in self.env:
            self._copy(old)
        new = self.env[old]
        if index is not None:
            new = self._item(name, old, new, index)
        self.values[name] = new
        return new

    def _item(self, name: str, old: fx.Node, new: fx.Node, index: int) -> fx.Node:
        planned, dtype = self.plan.nodes.get(old.name), self.plan.values[name].dtype
        emulated = planned is not None and self._emulated(planned) and dtype in LOW
        # Right behind its tuple: who reads it first may stand under `torch.no_grad`, where a cast has no gradient.
        with self.graph.inserting_after(new):
            item = self.graph.call_function(operator.getitem, (new, index))
        if not emulated:
            return item
        with self.graph.inserting_after(item):
            return self._cast(item, TORCH_DTYPES[dtype])

    def _casts(self, casts: Iterable[Node]) -> None:
        for cast in casts:
            self.values[cast.outputs[0]] = self._write_cast(cast)

    def _write_cast(self, cast: Node) -> fx.Node:
        name, target = cast.inputs[0], str(cast.attrs["to"])
        source = self.fetch(name)
        if cast.origin == "shadow" and self.use_shadow is not None and source.op == "placeholder":
            return self._shadow(name, target, source)
        if cast.outputs[0] in self.masks:
            source = self._saturated(source, TORCH_DTYPES[target])
        elif target == "fp16":
            self._note_buffer(source)
        return self._cast(source, TORCH_DTYPES[target])

    def _note_buffer(self, source: fx.Node) -> None:
        shown = shown_by(source)
        if shown.op != "placeholder":
            return
        name = next((n for n, new in self.values.items() if new is shown), "")
        if name and self.plan.values[name].role in ("buffer", "constant"):
            self.low_buffers[name] = None

    def _saturated(self, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`mask` with no number below the low type's lowest: -1e9 means "hardly", and minus infinity "never"."""
        aten, call = torch.ops.aten, self.graph.call_function
        never = call(aten.eq.Scalar, (mask, -math.inf))
        bounded = call(aten.clamp.default, (mask, torch.finfo(dtype).min))
        return call(aten.where.self, (never, mask, bounded))

    def _shadow(self, name: str, target: str, master: fx.Node) -> fx.Node:
        assert self.last_input is not None
        with self.graph.inserting_after(self.last_input):
            self.last_input = self.graph.placeholder(f"shadow_{len(self.shadows)}")
        self.last_input.meta["mp_name"] = f"{name}.shadow"
        self.shadows.append((name, target))
        used = self.graph.call_function(self.use_shadow, (master, self.last_input))  # type: ignore[arg-type]
        used.meta["mp_low"] = target
        return used

    def _output(self, node: fx.Node) -> None:
        names = iter(self.plan.outputs)
        tensors = self.capture.names

        def take(old: fx.Node) -> fx.Node:
            return self.fetch(next(names)) if old in tensors else self.env[old]

        self.graph.output(fx.map_arg(node.args[0], take))


def write(
    capture: FxCapture,
    plan: PrecisionGraph,
    *,
    use_shadow: Callable[..., Any] | None = None,
    emulate: Iterable[str] = (),
    linear: FP8Linear | None = None,
) -> Written:
    """The rewritten module.

    Args:
      capture: what `read` gave.
      plan: its graph after the passes.
      use_shadow: called as ``use_shadow(master, shadow)`` in the graph for every shadow cast of a graph input; None
        keeps shadow casts as ordinary casts.
      emulate: kinds whose low nodes compute in FP32 and round (see `mpcompile.hardware.emulated_kinds`).
      linear: what linear layers that read FP8 call; None writes them as the low layers that they are.
    """
    return _Writer(capture, plan, use_shadow, frozenset(emulate), linear=linear).run()


def read_shadows(module: fx.GraphModule, use_shadow: Callable[..., Any], names: Container[str] | None = None) -> None:
    """Let readers of ``use_shadow(master, shadow)`` read the shadow itself, of all inputs or of those in `names`."""
    for node in module.graph.find_nodes(op="call_function", target=use_shadow):
        if names is None or node.args[1].name in names:
            node.replace_all_uses_with(node.args[1])
            module.graph.erase_node(node)
    module.recompile()


def read_apart(module: fx.GraphModule, use_shadow: Callable[..., Any]) -> frozenset[str]:
    """Give each reader of a shadow, seen through views, a call of its own: their gradients then add up in FP32, at the master.

    Returns:
      names of the shadows' inputs that several read.
    """
    several = set[str]()
    for node in module.graph.find_nodes(op="call_function", target=use_shadow):
        if _copies_for_readers(node):
            several.add(node.args[1].name)
    if several:
        module.recompile()
    return frozenset(several)


def _copies_for_readers(node: fx.Node) -> bool:
    """A twin of `node` for each of its users but the first; True where it has several."""
    for user in list(node.users):
        if user.target in _VIEWED:
            _copies_for_readers(user)
    users = list(node.users)
    for user in users[1:]:
        with node.graph.inserting_before(node):
            user.replace_input_with(node, node.graph.node_copy(node))
    return len(users) > 1


_VIEWED = frozenset({_ATEN.t.default, _ATEN.numpy_T.default, _ATEN.transpose.int, _ATEN.permute.default, _ATEN.view.default,
                     _ATEN.reshape.default, _ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.slice.Tensor,
                     _ATEN.select.int, _ATEN.expand.default})  # fmt: skip


def has_user_low_cast(plan: PrecisionGraph) -> bool:
    """True when the user's own code rounds to a low type: the backend must keep that rounding."""
    return any(node.kind == "cast" and not node.is_cast and node.out_dtype in LOW for node in plan)


def _casts_after(plan: PrecisionGraph) -> dict[str, list[Node]]:
    """Id of the last original node before a cast ("" for none) -> the casts that stand there, in order."""
    found: dict[str, list[Node]] = {}
    anchor = ""
    for node in plan:
        if node.is_cast:
            found.setdefault(anchor, []).append(node)
        else:
            anchor = node.id
    return found


def _masks(plan: PrecisionGraph) -> frozenset[str]:
    """Casts to a low type whose value is the additive mask of an attention, moved about or not."""
    found, seen = set[str](), set[str]()
    left = [name for node in plan if node.kind == "attention" for slot, name in zip(node.slots, node.inputs, strict=True)
            if slot == MASK_SLOT]  # fmt: skip
    while left:
        name = left.pop()
        maker = plan.producer(name)
        if maker is None or name in seen:
            continue
        seen.add(name)
        if maker.is_cast and maker.attrs["to"] in LOW and plan.values[maker.inputs[0]].dtype == "fp32":
            found.add(name)
        elif base(maker.op) in THROUGH | SELECTS:
            left += maker.inputs
    return frozenset(found)
