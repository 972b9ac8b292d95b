"""What a plan costs: seconds of matrix work, of bytes moved, and of casts that a machine really executes.

Inside a fused region a cast is a register move.  So only values that are *materialised* cost bytes: those that a
library kernel makes or reads, that several readers share, that autograd saves, or that the graph returns; and only a
cast that stands alone (of a kernel's result or a graph input, in front of a kernel or an output) is a kernel of its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from mpcompile.devices import Device, device
from mpcompile.formats import ITEMSIZE, LOW
from mpcompile.graph import Node, PrecisionGraph, Value
from mpcompile.rules.table import Kind, load_kinds

# A fused cast costs an instruction: enough to prefer fewer of them, too little to outweigh a byte moved.
FUSED_CAST = 1e-11
# A shadow is cast once per optimizer step, in the update that writes the master anyway.
SHADOW_CAST = 1e-11


@dataclass
class CostModel:
    """Prices of one graph on one device.

    Fields:
      low: the low type.
      fused: the graph will be compiled; False prices every value and cast as materialised.
    """

    graph: PrecisionGraph
    device: Device
    low: str
    fused: bool = True

    def __post_init__(self) -> None:
        self._kinds = load_kinds()
        self.outputs = frozenset(self.graph.outputs)
        self._base: dict[str, str] = {}
        self._far: dict[str, bool] = {}
        self._kernels = frozenset(
            name for name, kind in self._kinds.items() if kind.fusion == "kernel" or not self.fused
        )
        self._keep_inputs = frozenset(name for name, kind in self._kinds.items() if kind.saves == "inputs")
        self._keep_output = frozenset(name for name, kind in self._kinds.items() if kind.saves == "output")
        self._views = frozenset(name for name, kind in self._kinds.items() if kind.fusion == "view")
        nodes = self.graph.nodes.values()
        # What views show; asked for by name, which spares a look at each maker.
        self._shown = {name for node in nodes if node.kind in self._views for name in node.outputs}
        # Values that a reader saves for the backward.
        self._saved = {name for node in nodes if node.kind in self._keep_inputs for name in node.inputs}
        # How many fused readers a value has.
        self._near = Counter(chain.from_iterable([n.inputs for n in nodes if n.kind not in self._kernels]))
        # Results that may be written for the sake of one reader; elements that a kernel has written for it alone.
        kernels = self._kernels - self._views
        self._loose = {name for node in nodes if node.kind not in kernels for name in node.outputs}
        self._private: dict[str, int] = {}

    @cached_property
    def readers(self) -> dict[str, list[Node]]:
        """Who reads each value, once per operand."""
        return self.graph.readers()

    @cached_property
    def _several(self) -> set[str]:
        """Values that are read more than once."""
        times = Counter(chain.from_iterable([node.inputs for node in self.graph.nodes.values()]))
        return {name for name, count in times.items() if count > 1}

    def kind(self, node: Node) -> Kind | None:
        return self._kinds.get(node.kind)

    @property
    def keeps(self) -> frozenset[str]:
        """The kinds of which the backward reads what they read."""
        return self._keep_inputs

    def keeps_inputs(self, node: Node) -> bool:
        """True where the backward reads what the node read."""
        return node.kind in self._keep_inputs

    def is_kernel(self, node: Node) -> bool:
        return node.kind in self._kernels

    def is_view(self, node: Node) -> bool:
        return node.kind in self._views

    def base(self, name: str) -> str:
        """The value that a chain of views shows."""
        seen: list[str] = []
        nodes, values, views = self.graph.nodes, self.graph.values, self._views
        while (known := self._base.get(name)) is None:
            producer = nodes.get(values[name].producer)
            if producer is None or producer.kind not in views or not producer.inputs:
                known = name
                break
            seen.append(name)
            name = producer.inputs[0]
        for shown in seen:
            self._base[shown] = known
        return known

    def stands_alone(self, name: str) -> bool:
        """True when a cast of the value cannot join the kernel that makes it."""
        producer = self.graph.producer(self.base(name))
        return producer is None or producer.kind in self._kernels

    def materialised(self, value: Value) -> bool:
        """True when the value's bytes are written, whatever reads it."""
        return self.traffic(value) > 0

    def store(self, value: Value, precision: str) -> float:
        """Seconds to keep a materialised value: written once, read by each reader, and once more by the backward."""
        return value.bytes_at(precision) * self.traffic(value)

    def traffic(self, value: Value) -> float:
        """Seconds per byte of a materialised value; 0.0 for one that is not."""
        maker = self.graph.nodes.get(value.producer)
        return 0.0 if maker is None else self.traffic_of(value.name, maker)

    def traffic_of(self, name: str, maker: Node) -> float:
        """The same, for a value whose maker is known."""
        if maker.kind in self._views:
            return 0.0
        # Whether autograd keeps the value for the backward, and how many fused readers it has.
        saved = maker.kind in self._keep_output or name in self._saved
        near = self._near.get(name, 0)
        if saved or maker.kind in self._kernels or name in self.outputs or name in self._several:
            return (1 + near + 2 * saved) / self.device.bandwidth
        return 0.0

    def work(self, node: Node, precision: str) -> float:
        """Seconds of matrix work and its call, and of the operands that this kernel alone makes someone write."""
        private = self.private(node)
        if not node.flops and not private:
            return 0.0
        seconds = node.flops / self.device.rate(precision, node.kind)
        seconds += self.device.low_call_overhead.get(precision, 0.0) if node.flops else 0.0
        return seconds + 2 * private * ITEMSIZE[precision] / self.device.bandwidth

    def private(self, node: Node) -> int:
        """Elements of the operands that this kernel alone makes someone write."""
        if node.kind not in self._kernels or self._loose.isdisjoint(node.inputs):
            return 0
        known = self._private.get(node.id)
        if known is None:
            values = [self.graph.values[name] for name in node.inputs if name in self._loose]
            known = sum([value.numel for value in values if value.castable and not self._shared(value)])
            self._private[node.id] = known
        return known

    def _shared(self, value: Value) -> bool:
        root = self._root(value)
        return not root.producer or self.traffic(root) > 0

    def _root(self, value: Value) -> Value:
        """What a chain of views shows; `value` itself when no view makes it."""
        return self.graph.values[self.base(value.name)] if value.name in self._shown else value

    def kept(self, value: Value) -> int:
        """Bytes of the value that autograd keeps for the backward, by its maker's kind and its readers'; else 0.

        Parameters and inputs are there anyway, and what views show counts once.
        """
        maker = self.graph.nodes.get(value.producer)
        if maker is None or maker.kind in self._views or not value.castable:
            return 0
        return value.bytes if maker.kind in self._keep_output or value.name in self._kept else 0

    @cached_property
    def _kept(self) -> set[str]:
        """What readers save, or views of it that they read."""
        return {self.base(name) for name in self._saved}

    def needs_memory(self, reader: Node) -> bool:
        """True for readers that read memory and cannot take a cast in: kernels, and views that a kernel looks through."""
        if reader.kind not in self._views:
            return reader.kind in self._kernels
        # Depth first, without Python's stack: a program may hold thousands of views of views.
        stack = [reader]
        while stack:
            node = stack[-1]
            if node.id in self._far:
                stack.pop()
                continue
            readers = [r for name in node.outputs for r in self.readers[name]]
            unknown = [r for r in readers if self.is_view(r) and r.id not in self._far]
            if unknown:
                stack.extend(unknown)
                continue
            returned = any(name in self.outputs for name in node.outputs)
            self._far[node.id] = returned or any(
                self._far[r.id] if self.is_view(r) else self.is_kernel(r) for r in readers
            )
        return self._far[reader.id]

    def cast(self, value: Value, target: str, *, in_memory: bool) -> float:
        """Seconds of one cast of `value` to `target`, shared by the readers that need it in memory (or do not)."""
        if target in LOW and self._root(value).role == "parameter":
            return SHADOW_CAST
        if not in_memory:
            return FUSED_CAST
        written = 2 * value.numel * ITEMSIZE[target]
        if self.fused and not self.stands_alone(value.name):
            return written / self.device.bandwidth
        # By the target, not by the value's dtype: a second run, which finds the plan's dtypes, must find these prices.
        moved = value.numel * (ITEMSIZE["fp32"] if target in LOW else ITEMSIZE[self.low]) + written
        return moved / self.device.bandwidth + self.device.launch


@dataclass(frozen=True)
class Parts:
    """The seconds of a plan, by what they are of: node -> work, (value, dtype) -> its cast, value -> its bytes moved."""

    work: dict[str, float]
    casts: dict[tuple[str, str], float]
    moved: dict[str, float]

    @property
    def total(self) -> float:
        total = sum(self.work.values(), 0.0)
        for part in (self.casts, self.moved):
            for seconds in part.values():
                total += seconds
        return total


def plan_parts(graph: PrecisionGraph, model: CostModel, output: str = "keep") -> Parts:
    """The parts of what a graph costs whose nodes have precisions and whose casts are not yet inserted.

    `output` is the precision in which floating outputs are wanted, or "keep".
    """
    running = [node for node in graph if node.precision not in ("", "keep") and not node.is_cast]
    work = {node.id: model.work(node, node.precision) for node in running if not node.out_dtype or node.inputs}
    asked = {
        (name, node.reads_at(operand), model.needs_memory(node)): None
        for node in running
        for operand, name in enumerate(node.inputs)
    }
    asked.update({(name, output, True): None for name in graph.outputs})
    casts: dict[tuple[str, str], float] = {}
    for name, wanted, in_memory in asked:
        value = graph.values[name]
        if value.castable and wanted not in ("any", "keep", value.dtype):
            casts[name, wanted] = casts.get((name, wanted), 0.0) + model.cast(value, wanted, in_memory=in_memory)
    moved = {
        value.name: model.store(value, value.dtype)
        for value in graph.values.values()
        if value.castable and model.materialised(value)
    }
    return Parts(work, casts, moved)


def plan_cost(graph: PrecisionGraph, model: CostModel, output: str = "keep") -> float:
    """Seconds of the whole: see `plan_parts`."""
    return plan_parts(graph, model, output).total


__all__ = ["CostModel", "Device", "Parts", "device", "plan_cost", "plan_parts"]
