"""Which operands linear layers read in FP8: further variables of the one cut that `assign` makes.

Per layer and pass (output, grad_input, grad_weight) one vertex `y`, on the source's side where the pass reads FP8:

* source -> y: what the product saves in FP8; y -> the layer's own vertex, infinite: only a low layer reads FP8.
* y -> a vertex per copy (value, layout), infinite; copy -> sink its bytes, and copy -> a vertex per value, infinite,
  which pays once for the largest number.  Products that read one value so share all of it.
* source -> r -> every y that reads an input's transpose: the bytes saved where the backward keeps that input in FP8 alone.

Each is "pay c when a is on one side and b on the other": the cut stays the exact optimum of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from mpcompile import fp8
from mpcompile.cost import CostModel
from mpcompile.cut import INFINITE, SINK, SOURCE, CutProblem
from mpcompile.graph import NOTHING, Node, PrecisionGraph


@dataclass
class FP8Reads:
    """Fields:
    recipe: how operands are scaled.
    asked: only layers that an override names.
    """

    graph: PrecisionGraph
    cost: CostModel
    recipe: str
    asked: bool
    # (layer, pass) -> its vertex.
    vertices: dict[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prices = fp8.Prices(self.graph, self.cost.device, self.recipe, self.cost.low)
        self._copies: dict[fp8.Copy, int] = {}
        self._looks: dict[str, int] = {}

    def add(self, problem: CutProblem, places: dict[str, int | None]) -> None:
        """Add the variables; `places` has each node's own vertex."""
        ends = fp8.ends(self.graph)
        for node in self.graph:
            at = places.get(node.id)
            if node.op != fp8.LINEAR or at is None or at == SINK:
                continue
            for step in fp8.PASSES:
                if (gain := self._wish(node, step, ends)) > 0:
                    self._pass(problem, node, step, at, gain)
        self._kept(problem)

    def _wish(self, node: Node, step: str, ends: dict[str, str]) -> float:
        """What a pass saves; infinite where it is asked for, 0.0 where it is no question."""
        if fp8.impossible(self.graph, node, step):
            return 0.0
        if fp8.asked(node):
            return INFINITE
        if self.asked or node.id in ends or fp8.small(fp8.sizes(self.graph, node)):
            return 0.0
        return max(self.prices.gain(node), 0.0)

    def _pass(self, problem: CutProblem, node: Node, step: str, at: int, gain: float) -> None:
        y = SOURCE if gain == INFINITE else problem.vertex()
        self.vertices[node.id, step] = y
        problem.edge(SOURCE, y, gain)
        problem.edge(y, at, INFINITE)
        for copy in fp8.copies(node)[step]:
            problem.edge(y, self._copy(problem, copy), INFINITE)

    def _copy(self, problem: CutProblem, copy: fp8.Copy) -> int:
        known = self._copies.get(copy)
        if known is None:
            known = self._copies[copy] = problem.vertex()
            problem.edge(known, SINK, self.prices.write(copy))
            look = self._looks.get(copy.value)
            if look is None:
                look = self._looks[copy.value] = problem.vertex()
                problem.edge(look, SINK, self.prices.look(copy.value))
            problem.edge(known, look, INFINITE)
        return known

    def _kept(self, problem: CutProblem) -> None:
        reading: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (name, step), y in self.vertices.items():
            if step == "grad_weight":
                reading[self.graph.nodes[name].inputs[0]][name] = y
        for value, found in reading.items():
            keepers = {node.id for node in self.cost.readers[value] if self.cost.keeps_inputs(node)}
            if keepers <= found.keys():
                kept = problem.vertex()
                problem.edge(SOURCE, kept, self.prices.kept(value))
                for y in found.values():
                    problem.edge(kept, y, INFINITE)

    def write_back(self, low_side: Sequence[bool]) -> None:
        """Write down which passes read FP8, and why."""
        chosen: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for (name, step), y in self.vertices.items():
            node = self.graph.nodes[name]
            if low_side[y] and node.precision == self.cost.low:
                chosen[name][step] = fp8.asked(node) or self._why(node)
        for node in self.graph:
            node.fp8 = chosen.get(node.id, NOTHING)

    def _why(self, node: Node) -> str:
        low, fast = self.prices.bf16(node) * 1e6, self.prices.fp8(node) * 1e6
        return f"the product takes {fast:.3g} us in FP8, {low:.3g} in BF16, and its copies less than that saves"
