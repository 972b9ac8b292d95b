"""What the plan is estimated to cost, beside the same graph in FP32 and under torch.autocast's decisions."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpcompile.cost import CostModel, device, plan_cost
from mpcompile.formats import LOW
from mpcompile.graph import PrecisionGraph
from mpcompile.passes.assign import Assign
from mpcompile.passes.classify import Classify
from mpcompile.passes.normalize import Normalize
from mpcompile.pipeline import run
from mpcompile.policy import Policy


@dataclass(frozen=True)
class Estimate:
    """Seconds of one forward, by the cost model that the plan was made with; good for ratios, not for clocks."""

    graph: PrecisionGraph
    policy: Policy
    device: str
    source: str = "fx"

    def to_dict(self) -> dict[str, float]:
        return {"fp32": self._price(self._all_fp32()), "plan": self._price(self._bare()), "autocast": self._autocast()}

    def with_node(self, node: str, precision: str) -> float:
        """The plan's seconds if this one node ran in `precision` and all others as they do."""
        graph = self._bare()
        changed = graph.nodes[node]
        changed.precision = precision  # type: ignore[assignment]
        for index, name in enumerate(changed.outputs):
            if graph.values[name].castable and (given := changed.gives_at(index)) != "keep":
                graph.values[name].dtype = given
        return self._price(graph)

    def _price(self, graph: PrecisionGraph) -> float:
        low = self.policy.low if self.policy.low in LOW else "bf16"
        output = {"fp32": "fp32", "low": low}.get(self.policy.output, "keep")
        return plan_cost(graph, CostModel(graph, device(self.device), low, self.source != "onnx"), output)

    def _bare(self) -> PrecisionGraph:
        """The graph without our casts, decisions kept."""
        return run(self.graph, [Normalize()])[0]

    def _all_fp32(self) -> PrecisionGraph:
        graph = self._bare()
        for node in graph:
            node.precision = "fp32" if node.precision in LOW else node.precision
        for value in graph.values.values():
            value.dtype = "fp32" if value.dtype in LOW else value.dtype
        return graph

    def _autocast(self) -> float:
        if self.policy.low not in LOW:
            return self._price(self._bare())
        source = "onnx" if self.source == "onnx" else "aten"
        policy = replace(self.policy, plan="autocast")
        classify = Classify(policy.low, source, policy.plan, (), (), False)
        assign = Assign(policy.low, self.device, policy.plan, self.source != "onnx", policy.output, source)
        return self._price(run(self.graph, [Normalize(), classify, assign])[0])
