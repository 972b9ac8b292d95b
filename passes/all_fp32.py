"""The plan of the policy "fp32": nothing is lowered and nothing is cast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpcompile.formats import LOW
from mpcompile.graph import PrecisionGraph
from mpcompile.passes.base import PassResult


@dataclass(frozen=True)
class AllFp32:
    """Every node runs as the user wrote it: `fp32`, or `keep` where it touches no FP32 tensor."""

    name: ClassVar[str] = "all-fp32"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        changed = False
        for node in graph.nodes.values():
            dtypes = {graph.values[name].dtype for name in (*node.inputs, *node.outputs)}
            precision = "fp32" if "fp32" in dtypes and not dtypes & LOW else "keep"
            if node.precision != precision or node.verdict != "fp32":
                node.decide("fp32", "the policy is fp32", node.decided_by)
                node.precision, changed = precision, True  # type: ignore[assignment]
        return PassResult(changed)
