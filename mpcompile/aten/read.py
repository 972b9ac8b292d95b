"""The torch.fx front end: an ATen `fx.GraphModule` to a precision graph, and a decided one back.

Every ATen node becomes a `Node` with the fx node's name; `getitem` of a tuple is not a node but names the tuple's
value.  Parameters, buffers and constants are graph inputs with a role.  Nothing here decides a precision.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mpcompile.aten import facts
from mpcompile.aten.custom_ops import registered_autocast
from mpcompile.aten.flops import flops
from mpcompile.aten.functional import make_explicit, mutated_storages
from mpcompile.aten.rewrites.masks import fold_masks
from mpcompile.aten.rewrites.noop_casts import keep_noop_casts_local
from mpcompile.graph import Node, PrecisionGraph, Role, Value
from mpcompile.torch_internals.operators import schema_of


@dataclass
class FxCapture:
    """An ATen graph and its reading.

    Fields:
      module: the (explicit) ATen graph that was read.
      graph: what the passes work on.
      origin: value name -> (fx node, index into its tuple or None).
    """

    module: fx.GraphModule
    graph: PrecisionGraph
    origin: dict[str, tuple[fx.Node, int | None]] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)

    @property
    def outside(self) -> frozenset[str]:
        """Ids of the nodes that the loss function computes outside of the model."""
        return frozenset(node.name for node in self.module.graph.nodes if node.meta.get(facts.LOSS_OWN))

    @property
    def code(self) -> dict[str, str]:
        """The user's own code by place: {"model.py:41": "x = self.head(x)"}."""
        return facts.code_lines(self.module.graph)


def read(module: fx.GraphModule, header: dict[str, str] | None = None) -> FxCapture:
    """Read an ATen graph (each node's ``meta["val"]`` must hold its fake result).

    `module` is made explicit in place, and its constant attention masks are folded.
    """
    make_explicit(module)
    keep_noop_casts_local(module)
    fold_masks(module)
    capture = FxCapture(module, PrecisionGraph(header={"source": "fx", **(header or {})}))
    reader = _Reader(capture, mutated_storages(module.graph))
    for node in module.graph.nodes:
        reader.visit(node)
    return capture


def operands(node: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """The fx nodes among a node's arguments, in a fixed order, each with its slot in the op's schema."""
    schema = schema_of(node.target)
    places = {a.name: i for i, a in enumerate(schema.arguments)} if schema is not None else {}
    found: list[fx.Node] = []
    for slot, argument in enumerate(node.args):
        found.clear()
        fx.map_arg(argument, found.append)
        yield from ((n, slot) for n in tuple(found))
    for offset, (name, argument) in enumerate(node.kwargs.items()):
        found.clear()
        fx.map_arg(argument, found.append)
        yield from ((n, places.get(name, len(node.args) + offset)) for n in tuple(found))


class _Reader:
    def __init__(self, capture: FxCapture, shared: dict[fx.Node, str]) -> None:
        self.capture, self.graph, self.shared = capture, capture.graph, shared
        self.tuples: dict[Any, str] = {}

    def visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            self._input(node)
        elif node.op == "call_function" and node.target is operator.getitem and self._is_tuple(node.args[0]):
            self._item(node)
        elif node.op == "call_function":
            self._operation(node)
        elif node.op == "output":
            self.graph.outputs = [self.capture.names[n] for n, _ in operands(node) if n in self.capture.names]

    def _is_tuple(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and not isinstance(node.meta.get("val"), torch.Tensor)

    def _input(self, node: fx.Node) -> None:
        held = _attribute(self.capture.module, node) if node.op == "get_attr" else None
        sample = node.meta.get("val", held)
        if node.op == "get_attr" and not isinstance(held, torch.Tensor):
            return  # the body of a higher-order op
        name = self._name(node.meta.get("mp_name") or str(node.target if node.op == "get_attr" else node.name))
        value = facts.value_of(name, sample)
        value.role = _role(node, held)
        value.alias = self.shared.get(node, "")
        value.range = facts.range_of(held) if value.role == "constant" else None
        self.graph.add_input(value)
        self._bind(name, node, None)

    def _name(self, stem: str) -> str:
        return self.graph.fresh_name(stem)

    def _bind(self, name: str, node: fx.Node, index: int | None) -> None:
        self.capture.origin[name] = (node, index)
        if index is None:
            self.capture.names[node] = name
        else:
            self.tuples[node, index] = name

    def _operation(self, node: fx.Node) -> None:
        read = [(self.capture.names[n], slot) for n, slot in operands(node) if n in self.capture.names]
        made = Node(
            id=node.name,
            op=facts.op_name(node.target),
            inputs=[name for name, _ in read],
            slots=[slot for _, slot in read],
            attrs=facts.attributes(node),
            module=facts.module_path(node),
            source=facts.source_line(node),
            region=node.meta.get("mp_region"),
            flops=flops(node),
            autocast=registered_autocast(node),
        )
        results = self._results(node)
        castable = [v for v in results if v.castable]
        if castable and (facts.names_dtype(node) or not self._reads_floats(made)):
            made.out_dtype = castable[0].dtype
        self.graph.add(made, results)

    def _reads_floats(self, node: Node) -> bool:
        return any(self.graph.values[name].castable for name in node.inputs)

    def _results(self, node: fx.Node) -> list[Value]:
        sample = node.meta.get("val")
        if sample is None and (users := _items(node)):
            sample = [users[i].meta.get("val") if i in users else None for i in range(max(users) + 1)]
        if isinstance(sample, (list, tuple)):
            return [self._result(f"{node.name}.{i}", node, item, i) for i, item in enumerate(sample)]
        return [] if sample is None else [self._result(node.name, node, sample, None)]

    def _result(self, name: str, node: fx.Node, sample: Any, index: int | None) -> Value:
        if index is not None and index in (users := _items(node)):
            name = users[index].name
        # Inputs have the user's names, and a buffer may well be called `mean`.
        value = facts.value_of(self._name(name), sample)
        value.alias = self.shared.get(node, "") if index is None else ""
        self._bind(value.name, node, index)
        return value

    def _item(self, node: fx.Node) -> None:
        """`getitem` of a tuple: the first of its kind named the value, a second one is the same value."""
        source, index = node.args
        name = self.tuples.get((source, index))
        if name is None:
            return
        self.capture.names[node] = name
        if node in self.shared:
            self.graph.values[name].alias = self.shared[node]


def _items(node: fx.Node) -> dict[int, fx.Node]:
    """Index -> first `getitem` of the node's tuple."""
    found: dict[int, fx.Node] = {}
    for user in node.users:
        if user.op == "call_function" and user.target is operator.getitem and isinstance(user.args[1], int):
            found.setdefault(user.args[1], user)
    return found


def _attribute(module: torch.nn.Module, node: fx.Node) -> Any:
    held: Any = module
    for part in str(node.target).split("."):
        held = getattr(held, part)
    return held


def _role(node: fx.Node, held: Any) -> Role:
    if isinstance(held, torch.nn.Parameter):
        return "parameter"
    if node.op == "get_attr":
        return (
            "constant" if str(node.target).startswith(("_constant", "_tensor_constant", "lifted_tensor")) else "buffer"
        )
    role: Role = node.meta.get("mp_role", "input")
    return role
