"""``plan="strict"``: nothing is stored below what torch.autocast stores.

The cut then only chooses what autocast leaves low: it may keep more in FP32, never less.  The price is what the low stream
saves; what is gained is a proof: no value carries a rounding that autocast's does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpcompile.graph import PrecisionGraph
from mpcompile.passes.assign import Assign
from mpcompile.passes.base import PassResult
from mpcompile.passes.classify import Classify


@dataclass(frozen=True)
class Strict:
    """Fields:
    low: the low type of the policy.
    source: whose operation names the graph uses: "aten" or "onnx".
    """

    low: str
    source: str = "aten"

    name: ClassVar[str] = "strict"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        peer = graph.copy()
        Classify(self.low, self.source, "autocast", partial=True).apply(peer)
        Assign(self.low, plan="autocast").apply(peer)
        raised = 0
        for node in graph:
            if peer.nodes[node.id].precision == "fp32":
                raised += node.raise_to_fp32("FP32, because torch.autocast stores it so and the plan is strict", "rule")
        return PassResult(raised > 0, (f"{raised} nodes raised to fp32",) if raised else ())
