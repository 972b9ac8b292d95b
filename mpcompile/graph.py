"""The precision graph: what every pass reads and writes.

One flat, topologically ordered graph of `Node`s and named `Value`s.  Front ends build it and write it back; the
passes decide on it; the report and the text form are views of it.  This room knows neither torch nor ONNX.

Nested graphs (an ONNX ``Loop`` body, the body of a higher-order op) are flattened: an inner node carries the path
of its region in ``scope``, and stands before the control node that owns the region.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from itertools import islice
from typing import Any, Literal, NoReturn

import networkx as nx

from mpcompile.formats import CASTABLE, ITEMSIZE

Verdict = Literal["low", "fp32", "propagate"]
Precision = Literal["fp16", "bf16", "fp32", "keep"]
DecidedBy = Literal["rule", "override", "hazard", "cost", "unknown", "user-cast", "autocast-region"]
Phase = Literal["forward", "backward", "optimizer"]
Role = Literal["input", "parameter", "buffer", "constant", "activation"]
CastOrigin = Literal["inserted", "existing", "shadow"]
Origin = Literal["", "rounded", "weight", "row", "full"]

CAST_OP = "mp.cast"


class _Nothing(dict[Any, Any]):
    """An empty dict that stays empty."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("nodes share this empty dict: give the node a dict of its own")

    __setitem__ = setdefault = update = __ior__ = _refuse


# What nodes have in common that have no attributes, or no operands or results of their own: most of a large graph.
NOTHING: dict[Any, Any] = _Nothing()


def _nothing() -> dict[Any, Any]:
    return NOTHING


@cache
def first_slots(count: int) -> tuple[int, ...]:
    """The slots of `count` operands of which none is left out."""
    return tuple(range(count))


@dataclass(slots=True)
class Value:
    """One tensor of the graph.

    ``dtype`` is the dtype in the graph *as it stands*: the original program's before ``assign``, the plan's after.
    ``shape`` holds ints, or strings for symbolic dimensions; ``numel`` is the element count (a hint where symbolic).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] = ()
    numel: int = 1
    producer: str = ""  # node id; "" for a graph input
    role: Role = "activation"
    # Known range of the elements, for constants: (min, max). None: unknown.
    range: tuple[float, float] | None = None
    # Values that share storage which someone mutates: they must keep one precision. "": not shared.
    alias: str = ""
    # Region path ("" = top level), as on nodes.
    scope: str = ""
    # What rounding the value would lose: `mpcompile.origins`. "": nothing has been said, or there is nothing to lose.
    origin: Origin = ""

    @property
    def castable(self) -> bool:
        """True for fp32/fp16/bf16; integers, bools, fp64 and complex are never cast (law 2)."""
        return self.dtype in CASTABLE

    def bytes_at(self, precision: str) -> int:
        """Bytes of the value stored at `precision` (its own dtype for "keep")."""
        dtype = precision if self.castable and precision != "keep" else self.dtype
        return self.numel * ITEMSIZE.get(dtype, 8)

    @property
    def bytes(self) -> int:
        return self.bytes_at(self.dtype)


@dataclass(slots=True)
class Node:
    """One operation.

    ``inputs[i]`` is the name of the value read at operand slot ``slots[i]`` (the position of the argument in the
    op's schema; the tensors of a list argument share its slot).  ``attrs`` holds every non-tensor argument.
    Empty ``attrs``, ``operands``, ``results`` and ``fp8`` are one sealed dict that all nodes share: do not change it, replace it.
    The last block is written by passes.
    """

    id: str
    op: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    slots: Sequence[int] = ()  # a tuple once the node is made
    attrs: dict[str, Any] = field(default_factory=_nothing)
    module: str = ""
    source: str = ""
    phase: Phase = "forward"
    scope: str = ""
    flops: int = 0
    # The user's own autocast region around the node: None, "off" or a precision.
    region: str | None = None
    # dtype that torch.library.register_autocast gives a custom op: "" for none.
    autocast: str = ""
    # dtype the op is told to produce (an explicit dtype argument, a user's cast): "" when it follows its inputs.
    out_dtype: str = ""
    # Nodes of one group run in one precision (loop carries, in-place chains); "": none.
    group: str = ""

    kind: str = ""
    verdict: Verdict | Literal[""] = ""
    precision: Precision | Literal[""] = ""
    reason: str = ""
    decided_by: DecidedBy = "rule"
    # Operand slot -> "fp32" (stays FP32 whatever the node's precision) or "any" (read as it comes).
    operands: dict[int, str] = field(default_factory=_nothing)
    # Output index -> "fp32" (statistics such as mean and rstd).
    results: dict[int, str] = field(default_factory=_nothing)
    # Casts only (op == CAST_OP, attrs["to"]).
    origin: CastOrigin | Literal[""] = ""
    # Pass of a linear layer whose operands are read in FP8 -> why (`mpcompile.fp8`).
    fp8: dict[str, str] = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        count = len(self.inputs)
        self.slots = tuple(self.slots) if len(self.slots) == count else first_slots(count)

    def copy(self) -> Node:
        """A twin, field by field: a third of the time that the constructor takes, and a large graph is mostly copying."""
        twin = Node.__new__(Node)
        twin.id, twin.op, twin.module, twin.source = self.id, self.op, self.module, self.source
        twin.inputs, twin.outputs, twin.slots = self.inputs.copy(), self.outputs.copy(), tuple(self.slots)
        twin.attrs = self.attrs.copy() if self.attrs else NOTHING
        twin.operands = self.operands.copy() if self.operands else NOTHING
        twin.results = self.results.copy() if self.results else NOTHING
        twin.fp8 = self.fp8.copy() if self.fp8 else NOTHING
        twin.phase, twin.scope, twin.group, twin.flops = self.phase, self.scope, self.group, self.flops
        twin.region, twin.autocast, twin.out_dtype = self.region, self.autocast, self.out_dtype
        twin.kind, twin.verdict, twin.precision = self.kind, self.verdict, self.precision
        twin.reason, twin.decided_by, twin.origin = self.reason, self.decided_by, self.origin
        return twin

    @property
    def is_cast(self) -> bool:
        return self.op == CAST_OP

    def decide(self, verdict: Verdict, reason: str, by: DecidedBy) -> bool:
        """Set verdict, reason and who decided, which belong together; True when one of them changed."""
        before = self.verdict, self.reason, self.decided_by
        self.verdict, self.reason, self.decided_by = verdict, reason, by
        return before != (verdict, reason, by)

    def raise_to_fp32(self, reason: str, by: DecidedBy = "hazard", *, must: bool = False) -> bool:
        """Decide for FP32, unless it is so already, or someone with a better right decided; True when it is new.

        A cast has no precision of its own. The caller's override, the program's own cast and a type that the program
        names are better rights than evidence of a risk.

        Args:
          must: the operation has no low form (a schema, a kernel), whoever asked for one.
        """
        if self.verdict == "fp32" or self.kind == "cast" or self.is_cast:
            return False
        if not must and (self.decided_by in ("override", "user-cast") or self.out_dtype):
            return False
        return self.decide("fp32", reason, by)

    def reads(self) -> str:
        """Precision in which an operand is read that has none of its own: fp16 | bf16 | fp32, or "any" (as it comes)."""
        if self.op == CAST_OP or self.precision in ("", "keep") or (self.out_dtype and self.kind == "cast"):
            return "any"
        return self.precision

    def reads_at(self, operand: int) -> str:
        """Precision in which operand number `operand` is read, or "any"."""
        return self.operands.get(self.slots[operand], self.reads())

    def gives_at(self, output: int) -> str:
        """Precision of castable output number `output`, or "keep" where the node has no say."""
        if self.op == CAST_OP:
            return str(self.attrs["to"])
        if self.out_dtype:
            return self.out_dtype
        return self.results.get(output, self.precision or "keep")


@dataclass(slots=True)
class PrecisionGraph:
    """Nodes in topological order, values by name, and the graph's own inputs and outputs (names, in order).

    `header` carries facts that travel with the text form: source ("fx" | "onnx"), device, policy line.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    header: dict[str, str] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        """For notebooks: one line a node, the first thousand."""
        cells = [
            (node.id, node.op, ", ".join(node.inputs), ", ".join(self._typed(name) for name in node.outputs),
             node.precision or node.verdict, node.module)
            for node in islice(self, 1000)
        ]  # fmt: skip
        head = "".join(f"<th>{name}</th>" for name in ("node", "op", "reads", "gives", "precision", "module"))
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
        said = f"{len(self)} nodes, {len(self.inputs)} inputs, {len(self.outputs)} outputs"
        return f"<p>{said}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def _typed(self, name: str) -> str:
        """ "x: fp32[8, 16]"; a half-built graph may lack the value."""
        value = self.values.get(name)
        return f"{name}: {value.dtype}[{', '.join(map(str, value.shape))}]" if value else f"{name}: ?"

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self.nodes)

    def add_input(self, value: Value) -> Value:
        """Append a graph input."""
        self.values[value.name] = value
        self.inputs.append(value.name)
        return value

    def add(self, node: Node, outputs: Iterable[Value] = ()) -> Node:
        """Append `node` (its inputs must exist) with its output values."""
        for value in outputs:
            value.producer = node.id
            value.scope = node.scope
            self.values[value.name] = value
            node.outputs.append(value.name)
        self.nodes[node.id] = node
        return node

    def producer(self, value: str) -> Node | None:
        """The node that makes `value`; None for a graph input."""
        return self.nodes.get(self.values[value].producer)

    def has_floats(self, node: Node) -> bool:
        """True when `node` reads or gives a castable value: of others nothing is decided."""
        values = self.values
        for name in node.outputs:  # mostly the first one tells
            if values[name].dtype in CASTABLE:
                return True
        return not CASTABLE.isdisjoint([values[name].dtype for name in node.inputs])

    def has_float_results(self, node: Node) -> bool:
        return any(self.values[name].dtype in CASTABLE for name in node.outputs)

    def uses(self) -> dict[str, list[tuple[str, int]]]:
        """Value name -> [(reader id, operand index)], in node order. Built afresh: O(edges)."""
        table: dict[str, list[tuple[str, int]]] = {name: [] for name in self.values}
        for node in self.nodes.values():
            for operand, name in enumerate(node.inputs):
                table[name].append((node.id, operand))
        return table

    def readers(self) -> dict[str, list[Node]]:
        """Value name -> the nodes that read it, once per operand, in node order. Built afresh, as `uses` is."""
        table: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes.values():
            for name in node.inputs:
                table[name].append(node)
        return table

    def copy(self) -> PrecisionGraph:
        """A graph that shares nothing mutable with this one."""
        return PrecisionGraph(
            {k: n.copy() for k, n in self.nodes.items()},
            {k: _copy_value(v) for k, v in self.values.items()},
            list(self.inputs),
            list(self.outputs),
            dict(self.header),
        )

    def casts(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.op == CAST_OP]

    def to_networkx(self) -> nx.DiGraph[str]:
        """Node ids as vertices, one edge per (producer, reader), with the values on it."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(self.nodes)
        for node in self.nodes.values():
            for name in node.inputs:
                source = self.values[name].producer
                if source:
                    values = graph.get_edge_data(source, node.id, {"values": ()})["values"]
                    graph.add_edge(source, node.id, values=(*values, name))
        return graph

    def fresh_name(self, stem: str) -> str:
        """`stem`, or `stem_2`, `stem_3`… : free both as a node id and as a value name."""
        if stem not in self.nodes and stem not in self.values:
            return stem
        number = 2
        while f"{stem}_{number}" in self.nodes or f"{stem}_{number}" in self.values:
            number += 1
        return f"{stem}_{number}"

    def rebuild_order(self, ordered: Iterable[Node]) -> None:
        """Replace the node table by `ordered` (a pass that inserted or removed nodes)."""
        self.nodes = {node.id: node for node in ordered}


def joined(parts: Mapping[str, PrecisionGraph]) -> PrecisionGraph:
    """The parts side by side as one graph, every name prefixed with its part's ("graph0/linear")."""
    whole = PrecisionGraph()
    for prefix, part in parts.items():
        twin = part.copy()
        for value in twin.values.values():
            value.name = f"{prefix}/{value.name}"
            value.producer = f"{prefix}/{value.producer}" if value.producer else ""
            whole.values[value.name] = value
        for node in twin.nodes.values():
            node.id = f"{prefix}/{node.id}"
            node.inputs = [f"{prefix}/{name}" for name in node.inputs]
            node.outputs = [f"{prefix}/{name}" for name in node.outputs]
            whole.nodes[node.id] = node
        whole.inputs += [f"{prefix}/{name}" for name in twin.inputs]
        whole.outputs += [f"{prefix}/{name}" for name in twin.outputs]
        whole.header = whole.header or twin.header
    return whole


def _copy_value(value: Value) -> Value:
    return Value(value.name, value.dtype, value.shape, value.numel, value.producer, value.role, value.range, value.alias,
                 value.scope, value.origin)  # fmt: skip


def numel_of(shape: Iterable[int]) -> int:
    return math.prod(shape)
