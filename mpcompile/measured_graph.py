"""What a graph was when its ranges were measured: by node, what it reads and what it is told, as data.

Ranges say something about the values of one program.  Its modules and parameters may all be there still while its own
lines are others: another operation between two layers, another order, another factor.  So each node is held against
what it was.  Sizes come with the batch: what follows from them is compared where the inputs have the measured shapes.
This room knows no framework.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpcompile.graph import Node, PrecisionGraph

# Operations that come and go with the mode of a model and the way in which it is read: what they read is read instead.
UNCERTAIN = (
    "dropout",
    "rand",
    "aten.to.",
    "aten._to_copy",
    "aten.detach",
    "aten.clone",
    "aten.contiguous",
    "aten.alias",
)
# Arguments that say how, with which mode or where, and not what is computed.
ASIDE = frozenset((
    "dtype", "device", "layout", "pin_memory", "memory_format", "training", "train", "p", "dropout_p", "generator",
    "non_blocking", "copy", "cudnn_enabled", "momentum",
))  # fmt: skip
# Whole numbers that no size of a batch moves.
FIXED = frozenset(("dim", "dims", "dim0", "dim1", "axis", "keepdim", "exponent", "groups", "approximate"))
# A factor may change by so much: values have as much headroom.
NEAR = 4.0
# Before the module's path in keys of what the loss function computes outside of the model.
LOSS = "loss_fn:"
ATTENTION, MASK = "scaled_dot_product_attention", 3
INPUT, PARAMETER = "input", "parameter"


@dataclass(frozen=True)
class Made:
    """How a value comes about.

    Fields:
      reads: of each operand the key of the node that makes it, or what kind of input it is.
      told: name of an argument -> numbers, words, or a tuple of them.
    """

    reads: tuple[str, ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)

    def differs(self, now: Made, *, sizes: bool, piece: bool, parameters: Collection[str] = ()) -> str:
        """What is otherwise in `now`, in words; "" for nothing.

        Args:
          sizes: the inputs have the shapes that were measured, so that what follows from them is the same.
          piece: `now` is of a part of the program: its inputs may be any of the values, and its numbers start anew.
          parameters: names of the model's. One that is none of them is a second name of a shared parameter, or a piece's own.
        """
        if len(self.reads) != len(now.reads):
            return f"it reads {len(now.reads)} values and read {len(self.reads)}"
        for was, one in zip(self.reads, now.reads, strict=True):
            if was == one or (piece and (_kind(one) == INPUT or place(was) == place(one))):
                continue
            if _may_be_one(was, one, parameters):
                continue
            return f"it reads {spoken(one)} and read {spoken(was)}"
        for name in self.told.keys() & now.told.keys():
            if not alike(name, self.told[name], now.told[name], sizes):
                return f"its {name} is {now.told[name]} and was {self.told[name]}"
        return ""


@dataclass(frozen=True)
class MeasuredGraph:
    """One graph.

    Fields:
      shapes: of its inputs, in words.
      nodes: key -> how its value comes about; of those with float results.
    """

    shapes: frozenset[str] = frozenset()
    nodes: Mapping[str, Made] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        nodes = {key: [list(made.reads), dict(made.told)] for key, made in self.nodes.items()}
        return {"shapes": sorted(self.shapes), "nodes": nodes}

    @classmethod
    def read(cls, data: Any) -> MeasuredGraph:
        nodes = {str(key): Made(tuple(map(str, reads)), _tuples(told)) for key, (reads, told) in data["nodes"].items()}
        return cls(frozenset(map(str, data["shapes"])), nodes)


def keyed(graph: PrecisionGraph, outside: Collection[str] = ()) -> Iterator[tuple[str, Node]]:
    """(key, node) of every node that is no cast of ours: "encoder.0.fc|aten.linear.default|0".

    Args:
      outside: ids of the nodes that are the loss function's own.
    """
    counts = Counter[str]()
    for node in graph:
        if node.is_cast or node.phase != "forward":
            continue
        where = f"{LOSS if node.id in outside else ''}{node.module}|{node.op}"
        yield f"{where}|{counts[where]}", node
        counts[where] += 1


def measured_graph(graph: PrecisionGraph, outside: Collection[str] = ()) -> MeasuredGraph:
    """`graph` as data; `outside` as `keyed` has it."""
    keys = {node.id: key for key, node in keyed(graph, outside)}
    shapes = frozenset(str(list(one.shape)) for one in map(graph.values.__getitem__, graph.inputs) if one.role == INPUT)
    nodes = {
        key: Made(tuple(_read(graph, name, keys) for name in _operands(node)), _told(node))
        for key, node in keyed(graph, outside)
        if graph.has_float_results(node) and not is_uncertain(node)
    }
    return MeasuredGraph(shapes, nodes)


def is_uncertain(node: Node) -> bool:
    return node.is_cast or any(word in node.op for word in UNCERTAIN)


def place(key: str) -> str:
    """A key without its number."""
    return key.rpartition("|")[0] if "|" in key else key


def spoken(key: str) -> str:
    """A key in words: "relu of encoder.0", "an input"."""
    if "|" not in key:
        return key if key else "an integer"
    module, op, _ = key.split("|")
    return f"{op.split('.')[1] if '.' in op else op} of {module or 'the model itself'}"


def _operands(node: Node) -> list[str]:
    """What a node reads, without the mask of an attention: how that is written depends on who reads the program."""
    if ATTENTION not in node.op:
        return node.inputs
    return [name for name, slot in zip(node.inputs, node.slots, strict=True) if slot != MASK]


def _read(graph: PrecisionGraph, name: str, keys: Mapping[str, str]) -> str:
    value = graph.values[name]
    if not value.castable:
        return ""
    node = graph.producer(name)
    while node is not None and is_uncertain(node) and node.inputs:
        value = graph.values[node.inputs[0]]
        node = graph.producer(value.name)
    if node is not None:
        return keys.get(node.id, node.op)
    return (
        f"{PARAMETER} {value.name} {list(value.shape)}"
        if value.role == PARAMETER
        else f"{value.role} of {len(value.shape)} dimensions"
    )


def _kind(read: str) -> str:
    return read.partition(" ")[0]


def _may_be_one(was: str, now: str, parameters: Collection[str]) -> bool:
    """Two parameters of one shape, of which one has a name that the model does not list."""
    (kind, _, before), (other, _, after) = was.partition(" "), now.partition(" ")
    if kind != PARAMETER or other != PARAMETER:
        return False
    (name, _, shape), (second, _, given) = before.partition(" "), after.partition(" ")
    return shape == given and not (name in parameters and second in parameters)


def _told(node: Node) -> dict[str, Any]:
    return {name: told for name, told in node.attrs.items() if name not in ASIDE}


def _tuples(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(one) if isinstance(one, list) else one for name, one in told.items()}


def alike(name: str, was: Any, now: Any, sizes: bool) -> bool:
    """Whether an argument's values say the same; `sizes` as `Made.differs` has it."""
    if isinstance(was, tuple) and isinstance(now, tuple):
        return len(was) == len(now) and all(alike(name, a, b, sizes) for a, b in zip(was, now, strict=True))
    if was == now or isinstance(was, str) != isinstance(now, str):  # a size that has a name is no number
        return True
    if isinstance(was, str):
        return not (was.isalpha() and now.isalpha())
    if name in FIXED or not (_is_number(was) and _is_number(now)):
        return False
    if isinstance(was, float) or isinstance(now, float):
        return was * now > 0 and math.isfinite(was * now) and 1 / NEAR <= was / now <= NEAR
    return not sizes


def _is_number(one: Any) -> bool:
    return isinstance(one, (int, float)) and not isinstance(one, bool)


__all__ = ["LOSS", "Made", "MeasuredGraph", "alike", "is_uncertain", "keyed", "measured_graph", "place"]
