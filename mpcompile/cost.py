"""What a plan costs: seconds of matrix work, of bytes moved, and of casts that a machine really executes.

Inside a fused region a cast is a register move.  So only values that are *materialised* cost bytes: those that a
library kernel makes or reads, that several readers share, that autograd saves, or that the graph returns; and only a
cast that stands alone (of a kernel's result or a graph input, in front of a kernel or an output) is a kernel of its own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from mpcompile.graph import ITEMSIZE, LOW, Node, PrecisionGraph, Value
from mpcompile.rules.table import Kind, load_kinds

# A fused cast costs an instruction: enough to prefer fewer of them, too little to outweigh a byte moved.
FUSED_CAST = 1e-11
# A shadow is cast once per optimizer step, in the update that writes the master anyway.
SHADOW_CAST = 1e-11


@dataclass(frozen=True)
class Device:
    """One row of devices.toml: FLOP/s by precision, bytes/s, seconds per kernel, kinds with a speedup of their own, and the
    seconds that a library's low product takes more than its FP32 one, however small, by precision.
    """

    name: str
    fp32: float
    bf16: float
    fp16: float
    bandwidth: float
    launch: float
    speedup: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    low_call: Mapping[str, float] = field(default_factory=dict)

    def rate(self, precision: str, kind: str = "") -> float:
        own = self.speedup.get(kind, {}).get(precision)
        if own is not None:
            return own * self.fp32
        return {"bf16": self.bf16, "fp16": self.fp16}.get(precision, self.fp32)


@cache
def device(name: str) -> Device:
    """The row of a device; an unknown name has the row of its family ("cuda:1" -> "cuda"), else "cpu"."""
    rows = tomllib.loads(resources.files("mpcompile").joinpath("devices.toml").read_text(encoding="utf-8"))
    row = rows.get(name) or rows.get(name.partition(":")[0]) or rows["cpu"]
    return Device(name, **row)


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
    uses: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kinds = load_kinds()
        self.uses = self.uses or self.graph.uses()
        self.outputs = frozenset(self.graph.outputs)
        self._base: dict[str, str] = {}
        self._far: dict[str, bool] = {}
        self._materialised: dict[str, bool] = {}
        # Elements of a kernel's operands that it alone reads.
        self._private: dict[str, int] = {}
        self._kernels = frozenset(
            name for name, kind in self._kinds.items() if kind.fusion == "kernel" or not self.fused
        )
        self._keeps = {
            what: frozenset(name for name, kind in self._kinds.items() if kind.saves == what)
            for what in ("inputs", "output")
        }
        self._views = frozenset(name for name, kind in self._kinds.items() if kind.fusion == "view")

    def kind(self, node: Node) -> Kind | None:
        return self._kinds.get(node.kind)

    def is_kernel(self, node: Node) -> bool:
        return node.kind in self._kernels

    def is_view(self, node: Node) -> bool:
        return node.kind in self._views

    def base(self, name: str) -> str:
        """The value that a chain of views shows."""
        seen: list[str] = []
        while (known := self._base.get(name)) is None:
            seen.append(name)
            producer = self.graph.producer(name)
            if producer is None or not self.is_view(producer) or not producer.inputs:
                known = name
                break
            name = producer.inputs[0]
        for shown in seen:
            self._base[shown] = known
        return known

    def stands_alone(self, name: str) -> bool:
        """True when a cast of the value cannot join the kernel that makes it."""
        producer = self.graph.producer(self.base(name))
        return producer is None or self.is_kernel(producer)

    def materialised(self, value: Value) -> bool:
        """True when the value's bytes are written, whatever reads it."""
        known = self._materialised.get(value.name)
        if known is None:
            known = self._materialised[value.name] = self._is_materialised(value)
        return known

    def _is_materialised(self, value: Value) -> bool:
        producer = self.graph.nodes.get(value.producer)
        if producer is None or self.is_view(producer):
            return False
        readers = self.uses[value.name]
        return self.is_kernel(producer) or len(readers) > 1 or value.name in self.outputs or self.saved(value, producer)

    def saved(self, value: Value, producer: Node) -> bool:
        """True when autograd keeps the value for the backward."""
        if producer.kind in self._keeps["output"]:
            return True
        nodes, keeps = self.graph.nodes, self._keeps["inputs"]
        return not keeps.isdisjoint([nodes[reader].kind for reader, _ in self.uses[value.name]])

    def store(self, value: Value, precision: str) -> float:
        """Seconds to keep a materialised value: written once, read by each reader, and once more by the backward."""
        return value.bytes_at(precision) * self.traffic(value)

    def traffic(self, value: Value) -> float:
        """Seconds per byte of a materialised value."""
        nodes, near = self.graph.nodes, 0
        for reader, _ in self.uses[value.name]:
            near += nodes[reader].kind not in self._kernels
        return (1 + near + 2 * self.saved(value, nodes[value.producer])) / self.device.bandwidth

    def work(self, node: Node, precision: str) -> float:
        """Seconds of matrix work and its call, and of the operands that this kernel alone makes someone write."""
        seconds = node.flops / self.device.rate(precision, node.kind)
        seconds += self.device.low_call.get(precision, 0.0) if node.flops else 0.0
        if not self.is_kernel(node):
            return seconds
        private = self._private.get(node.id)
        if private is None:
            values = (self.graph.values[name] for name in node.inputs)
            private = self._private[node.id] = sum(v.numel for v in values if v.castable and not self._shared(v))
        return seconds + 2 * private * ITEMSIZE[precision] / self.device.bandwidth

    def _shared(self, value: Value) -> bool:
        root = self.graph.values[self.base(value.name)]
        return not root.producer or self.materialised(root)

    def is_far(self, reader: Node) -> bool:
        """True for readers that read memory and cannot take a cast in: kernels, and views that a kernel looks through."""
        if not self.is_view(reader):
            return self.is_kernel(reader)
        # Depth first, without Python's stack: a program may hold thousands of views of views.
        stack = [reader]
        while stack:
            node = stack[-1]
            if node.id in self._far:
                stack.pop()
                continue
            readers = [self.graph.nodes[r] for name in node.outputs for r, _ in self.uses[name]]
            unknown = [r for r in readers if self.is_view(r) and r.id not in self._far]
            if unknown:
                stack.extend(unknown)
                continue
            returned = any(name in self.outputs for name in node.outputs)
            self._far[node.id] = returned or any(
                self._far[r.id] if self.is_view(r) else self.is_kernel(r) for r in readers
            )
        return self._far[reader.id]

    def cast(self, value: Value, target: str, *, far: bool) -> float:
        """Seconds of one cast of `value` to `target`, shared by the readers that are (not) far."""
        if self.graph.values[self.base(value.name)].role == "parameter" and target in LOW:
            return SHADOW_CAST
        if not far:
            return FUSED_CAST
        written = 2 * value.bytes_at(target)
        if self.fused and not self.stands_alone(value.name):
            return written / self.device.bandwidth
        # By the target, not by the value's dtype: a second run, which finds the plan's dtypes, must find these prices.
        moved = value.numel * (ITEMSIZE["fp32"] if target in LOW else ITEMSIZE[self.low]) + written
        return moved / self.device.bandwidth + self.device.launch


def plan_cost(graph: PrecisionGraph, model: CostModel, output: str = "keep") -> float:
    """Seconds of a graph whose nodes have precisions and whose casts are not yet inserted.

    `output` is the precision in which floating outputs are wanted, or "keep".
    """
    running = [node for node in graph if node.precision not in ("", "keep") and not node.is_cast]
    total = sum((model.work(node, node.precision) for node in running if not node.out_dtype or node.inputs), 0.0)
    asked = {
        (name, node.reads_at(operand), model.is_far(node)): None
        for node in running
        for operand, name in enumerate(node.inputs)
    }
    asked.update({(name, output, True): None for name in graph.outputs})
    for name, wanted, far in asked:
        value = graph.values[name]
        if value.castable and wanted not in ("any", "keep", value.dtype):
            total += model.cast(value, wanted, far=far)
    for value in graph.values.values():
        if value.castable and model.materialised(value):
            total += model.store(value, value.dtype)
    return total
