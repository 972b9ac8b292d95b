"""What the plan is estimated to cost, beside the same graph in FP32 and under torch.autocast's decisions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING

from mpcompile import fp8
from mpcompile.cost import CostModel, Parts, device, plan_parts
from mpcompile.formats import LOW
from mpcompile.graph import NOTHING, PrecisionGraph
from mpcompile.passes.assign import Assign
from mpcompile.passes.classify import Classify
from mpcompile.passes.normalize import Normalize
from mpcompile.pipeline import run
from mpcompile.policy import Policy

if TYPE_CHECKING:
    from mpcompile.report.model import Report

_FP8 = attrgetter("fp8")


@dataclass(frozen=True)
class Estimate:
    """Seconds of one forward, by the cost model that the plan was made with; good for ratios, not for clocks."""

    graph: PrecisionGraph
    policy: Policy
    device: str
    source: str = "fx"

    @classmethod
    def of(cls, report: Report) -> Estimate:
        """The estimate of a report's graph."""
        return cls(report.graph, Policy.parse(report.policy), report.device, report.source)

    def to_dict(self) -> dict[str, float]:
        return {
            "fp32": self._price(self._all_fp32()),
            "plan": self._price(self._bare()),
            "autocast": self._price(self._autocast()),
        }

    def breakdown(self) -> dict[str, dict[str, float]]:
        """What each of the three is made of: seconds of "work", "moved" bytes and "casts", their "total", "kept" bytes.

        "kept" are bytes of values that autograd keeps for the backward.
        """
        graphs = {"fp32": self._all_fp32(), "autocast": self._autocast(), "plan": self._bare()}
        return {name: self._sums(graph) for name, graph in graphs.items()}

    def _sums(self, graph: PrecisionGraph) -> dict[str, float]:
        model, parts, fast = self._model(graph), self.parts(graph), self._fp8(graph)
        return {
            "work": sum(parts.work.values()) + fast,
            "moved": sum(parts.moved.values()),
            "casts": sum(parts.casts.values()),
            "total": parts.total + fast,
            "kept": sum(model.kept(value) for value in graph.values.values()),
        }

    def with_node(self, node: str, precision: str) -> float:
        """The plan's seconds if this one node ran in `precision` and all others as they do."""
        return self.with_nodes([node], precision)

    def with_nodes(self, nodes: Iterable[str], precision: str) -> float:
        """The plan's seconds if these nodes ran in `precision` and all others as they do."""
        graph = self._bare()
        for changed in map(graph.nodes.__getitem__, nodes):
            changed.precision = precision  # type: ignore[assignment]
            changed.fp8 = changed.fp8 if precision == self.policy.low else NOTHING
            for index, name in enumerate(changed.outputs):
                if graph.values[name].castable and (given := changed.gives_at(index)) != "keep":
                    graph.values[name].dtype = given
        return self._price(graph)

    def _price(self, graph: PrecisionGraph) -> float:
        return self.parts(graph).total + self._fp8(graph)

    def _fp8(self, graph: PrecisionGraph) -> float:
        """Seconds that FP8 operands add to the forward; below zero where they save."""
        row = device(self.device)
        if not row.fp8.get(self.policy.fp8) or not any(map(_FP8, graph)):
            return 0.0
        return fp8.plan_cost(graph, fp8.Prices(graph, row, self.policy.fp8, self._low, margin=1.0), steps=("output",))

    def parts(self, graph: PrecisionGraph | None = None) -> Parts:
        """Seconds of each node's work, of each cast and of each value's bytes: of the plan, or of `graph`."""
        graph = graph or self._bare()
        low = self._low
        output = {"fp32": "fp32", "low": low}.get(self.policy.output, "keep")
        return plan_parts(graph, self._model(graph), output)

    def _model(self, graph: PrecisionGraph) -> CostModel:
        return CostModel(graph, device(self.device), self._low, self.source != "onnx")

    @property
    def _low(self) -> str:
        return self.policy.low if self.policy.low in LOW else "bf16"

    def _bare(self) -> PrecisionGraph:
        """The graph without our casts, decisions kept."""
        return run(self.graph, [Normalize()])[0]

    def _all_fp32(self) -> PrecisionGraph:
        graph = self._bare()
        for node in graph:
            node.precision = "fp32" if node.precision in LOW else node.precision
            node.fp8 = NOTHING
        for value in graph.values.values():
            value.dtype = "fp32" if value.dtype in LOW else value.dtype
        return graph

    def _autocast(self) -> PrecisionGraph:
        if self.policy.low not in LOW:
            return self._bare()
        source = "onnx" if self.source == "onnx" else "aten"
        policy = replace(self.policy, plan="autocast", products="low")
        classify = Classify(policy.low, source, policy.plan, (), (), False)
        assign = Assign(policy.low, self.device, policy.plan, self.source != "onnx", policy.output, source)
        return run(self.graph, [Normalize(), classify, assign])[0]
