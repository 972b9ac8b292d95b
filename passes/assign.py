"""Choose one precision per node at the lowest total cost: one s-t minimum cut.

The story.  Every node is low or FP32; say that low nodes are on the source's side of a cut and FP32 nodes on the sink's.

* A verdict `fp32` ties a node to the sink.  So does whatever the program fixed: its inputs, a dtype it names.
* A verdict `low` is a wish with a price: doing the same matrix work in FP32 takes longer, and that difference is the
  capacity from the source.  A product too small to pay for its casts stays FP32, and says so.  The caller's override
  is no wish: it ties the node to the source.
* A value is stored in its producer's precision, and costs its bytes where it is materialised (`mpcompile.cost`).
* A value read in another precision needs a cast.  One auxiliary vertex per value and direction makes it paid once,
  however many read it: reader -> vertex is infinite, vertex -> producer carries the price (and the mirror image for
  casts up).  Casts that can join a fused kernel and casts that stand alone have a vertex each.  A copy that one reader
  wants, or that a fixed reader wants in every plan, needs no vertex: it is one edge.
* Nodes that must agree (one storage that someone writes, loop carries, a group) are one vertex; FP32 wins in it.  A
  node of such a class gives up its own verdict: a low kernel that writes FP32 storage runs in FP32.

All these costs are of the form "pay c when a is low and b is not", so the cut is the exact optimum of the model.  Among
optima the one with the most low nodes is taken; it is unique, so the plan does not depend on node order.

``plan="autocast"`` cuts nothing: it follows torch.autocast's own rule forward, op by op.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from mpcompile.cost import CostModel, device
from mpcompile.cut import INFINITE, SINK, SOURCE, CutProblem
from mpcompile.formats import CASTABLE, ITEMSIZE, LOW
from mpcompile.graph import CAST_OP, DecidedBy, Node, PrecisionGraph, Value
from mpcompile.passes.base import PassResult
from mpcompile.passes.fp8_reads import FP8Reads


@dataclass(frozen=True)
class Assign:
    """Fields:
    low: the low type of the policy.
    device: name of a row of devices.toml; plan: "global", "autocast", or "strict" (verdicts raised before the cut).
    fused: the graph will be compiled, so casts inside a fused region are free.
    output: dtype of floating outputs: "fp32", "low" or "keep".
    source: whose operation names the graph uses (the passes share one signature; the costs do not differ).
    bind: a verdict "low" is kept whatever it costs: for files, whose sizes at run time nobody knows.
    fp8: how operands in FP8 are scaled ("" for none), and `fp8_asked`: only in layers that an override names.
    """

    low: str
    device: str = "cpu"
    plan: str = "global"
    fused: bool = True
    output: str = "fp32"
    source: str = "aten"
    bind: bool = False
    fp8: str = ""
    fp8_asked: bool = False

    name: ClassVar[str] = "assign"
    ensures: ClassVar[str] = "assigned"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        decided = operator.attrgetter("precision", "fp8", "verdict", "reason", "decided_by")
        before = [*map(decided, graph)]
        if self.plan == "autocast":
            _follow_autocast(graph, self.low)
        else:
            cost = CostModel(graph, device(self.device), self.low, self.fused)
            reads = FP8Reads(graph, cost, self.fp8, self.fp8_asked) if self.fp8 else None
            _CutProblem(graph, cost, self.low, self.output, self.bind).run(reads)
        return PassResult(before != [*map(decided, graph)])


def has_fixed_dtype(node: Node) -> bool:
    """The node's own precision is not a question: the program's cast, or a tensor made with a named dtype."""
    return node.op == CAST_OP or (bool(node.out_dtype) and (node.kind in ("cast", "factory") or not node.inputs))


_FIXED = frozenset({SOURCE, SINK})


@dataclass
class _CutProblem:
    graph: PrecisionGraph
    cost: CostModel
    low: str
    output: str
    bind: bool = False
    problem: CutProblem = field(default_factory=CutProblem)
    saving: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.classes = _Classes(self.graph)
        # For each node, in order: the vertex whose side is its precision; None where there is no question.
        self.places: list[int | None] = []
        # For each node, in order: its results. Looked up once: in a large graph a look-up by name is a wait for memory.
        self.made = made(self.graph)
        # Castable value -> the vertex whose side says how it is stored.
        self.sides: dict[str, int] = {}
        # Value -> (vertex whose side says how it is read, whether a cast would stand alone), for those not at its side.
        self.mismatched_reads: defaultdict[str, list[tuple[int, bool]]] = defaultdict(list)
        # A model has few reasons and many nodes: each text is made once.
        self._reasons: dict[tuple[str, bool, int], str] = {}

    def run(self, reads: FP8Reads | None = None) -> None:
        self.vertices()
        self._stored()
        self._readers()
        self._movers()
        for name, readers in self.mismatched_reads.items():
            # Paid in every plan, or in none, where nobody is free.
            if (side := self.sides[name]) not in _FIXED or not _FIXED.issuperset([at for at, _ in readers]):
                self._casts(self.graph.values[name], side, readers)
        if reads is not None:
            reads.add(self.problem, dict(zip(self.graph.nodes, self.places, strict=True)))
        side = self.problem.solve().tolist()
        self.write_back(side)
        if reads is not None:
            reads.write_back(side)

    def vertices(self) -> None:
        """A vertex per free node or class of nodes; fixed ones are the source or the sink itself."""
        classes, graph = self.classes, self.graph
        known = {root: SOURCE if dtype == self.low else SINK for root, dtype in classes.tied.items()}
        roots = [classes.root(node.id) if not has_fixed_dtype(node) and (any_float(values) or graph.has_floats(node)) else None
                 for node, values in zip(graph, self.made, strict=True)]  # fmt: skip
        for node, root in zip(self.graph, roots, strict=True):
            side = None if root is None else self._fixed_side(node)
            if root is None or side is None:
                continue
            if side == SOURCE:
                known.setdefault(root, SOURCE)
            elif root not in classes.tied:
                known[root] = SINK
        for root in roots:
            at = None if root is None else known.get(root)
            if at is None and root is not None:
                at = known[root] = self.problem.vertex()
            self.places.append(at)

    def _fixed_side(self, node: Node) -> int | None:
        if node.verdict == "fp32":
            return SINK
        if node.verdict == "low" and (node.decided_by == "override" or self.bind or not node.flops):
            return SOURCE
        return None

    def _stored(self) -> None:
        """The vertex whose side says how each value is stored, and the prices of work and of storing."""
        sides = self.sides
        for name, value in self.graph.values.items():
            if not value.producer and value.dtype in CASTABLE:
                sides[name] = SOURCE if value.dtype == self.low else SINK
        saved = ITEMSIZE["fp32"] - ITEMSIZE[self.low]
        for node, at, results in zip(self.graph, self.places, self.made, strict=True):
            if at is not None:
                self._work(node, at)
            plain = None if node.out_dtype or node.results else at
            for index, value in enumerate(results):
                if value.dtype not in CASTABLE:
                    continue
                side = sides[value.name] = self._stated(node, index, value, at) if plain is None else plain
                if side not in _FIXED and (traffic := self.cost.traffic_of(value.name, node)):
                    self.problem.edge(SOURCE, side, value.numel * saved * traffic)

    def _stated(self, node: Node, index: int, value: Value, at: int | None) -> int:
        """The side of a value whose maker is no question, or is told what it gives."""
        stated = "" if at is None else node.out_dtype or node.results.get(index, "")
        if at is not None and not stated:
            return at
        return SOURCE if (stated or value.dtype) == self.low else SINK

    def _work(self, node: Node, at: int) -> None:
        """The price of doing the node's work in either precision, where that is a question or a reason to give."""
        if at == SOURCE or (at == SINK and node.verdict != "low"):
            return
        if not node.flops and not self.cost.private(node):
            return
        low, fp32 = self.cost.work(node, self.low), self.cost.work(node, "fp32")
        if low != fp32:
            self.saving[node.id] = fp32 - low
            self.problem.edge(SOURCE, at, max(fp32 - low, 0.0))
            self.problem.edge(at, SINK, max(low - fp32, 0.0))

    def _readers(self) -> None:
        """Fill `mismatched_reads`."""
        sides, needs_memory = self.sides, self.cost.needs_memory
        for node, at in zip(self.graph, self.places, strict=True):
            if node.operands:
                self._pinned(node, at)
            elif at is not None:
                for name in node.inputs:
                    if sides.get(name, at) != at:
                        self.mismatched_reads[name].append((at, needs_memory(node)))
        if self.output == "keep":
            return
        wanted = SINK if self.output == "fp32" else SOURCE
        for name in self.cost.outputs:
            if sides.get(name, wanted) != wanted:
                self.mismatched_reads[name].append((wanted, True))

    def _pinned(self, node: Node, at: int | None) -> None:
        """Readers with operands of their own: "fp32", or "any", which is at the value's side whatever that is."""
        for slot, name in zip(node.slots, node.inputs, strict=True):
            pinned = node.operands.get(slot)
            here = SINK if pinned == "fp32" else None if pinned == "any" else at
            if here is not None and self.sides.get(name, here) != here:
                self.mismatched_reads[name].append((here, self.cost.needs_memory(node)))

    def _movers(self) -> None:
        """Law 10: what moves a full value may do so in the low type where each reader rounds it: low only if they are."""
        moving = [(place, value.name) for place, results in zip(self.places, self.made, strict=True)
                  if place is not None and place not in _FIXED for value in results if value.origin == "full"]  # fmt: skip
        at = dict(zip(self.graph.nodes, self.places, strict=True)) if moving else {}
        for place, name in moving:
            for reader in self.cost.readers[name]:
                if (there := at[reader.id]) is not None:
                    self.problem.edge(place, there, INFINITE)

    def _casts(self, value: Value, side: int, readers: list[tuple[int, bool]]) -> None:
        """At most one copy per direction and distance: a low one for low readers, an FP32 one for FP32 readers."""
        if len(readers) == 1:
            at, in_memory = readers[0]
            if side != SOURCE and at != SINK:
                self.problem.edge(at, side, self.cost.cast(value, self.low, in_memory=in_memory))
            if side != SINK and at != SOURCE:
                self.problem.edge(side, at, self.cost.cast(value, "fp32", in_memory=in_memory))
            return
        for in_memory in (False, True):
            found = {reader for reader, stands in readers if stands == in_memory}
            if side != SOURCE and (low := found - {SINK}):
                self._copy(side, low, self.cost.cast(value, self.low, in_memory=in_memory), up=False)
            if side != SINK and (up := found - {SOURCE}):
                self._copy(side, up, self.cost.cast(value, "fp32", in_memory=in_memory), up=True)

    def _copy(self, side: int, readers: set[int], price: float, *, up: bool) -> None:
        """Pay `price` once when any of `readers` wants the copy and the value is not stored so."""
        fixed = SINK if up else SOURCE
        if fixed in readers:  # wanted in every plan: the others have it for nothing
            readers = {fixed}
        if len(readers) == 1:
            copy = next(iter(readers))
        else:
            copy = self.problem.vertex()
            for reader in readers:
                self.problem.edge(copy if up else reader, reader if up else copy, INFINITE)
        self.problem.edge(side if up else copy, copy if up else side, price)

    def write_back(self, low_side: Sequence[bool]) -> None:
        """Write each node's precision and the dtypes of its results; `low_side` tells the side of each vertex."""
        for node, at, results in zip(self.graph, self.places, self.made, strict=True):
            self._write_back(node, results, at, at is not None and low_side[at])
            _fix_values(node, results)

    def _write_back(self, node: Node, results: list[Value], at: int | None, low: bool) -> None:
        if at is None:
            node.precision = node.out_dtype if has_fixed_dtype(node) and node.out_dtype in CASTABLE else "keep"  # type: ignore[assignment]
            return
        node.precision = self.low if low else "fp32"  # type: ignore[assignment]
        if (tied := self.classes.tied_to(node.id)) in LOW:
            node.precision = tied  # type: ignore[assignment]
            node.decide("propagate", f"writes into storage that the program made {tied}", "user-cast")
            return
        if node.verdict == "fp32" or node.decided_by in ("override", "hazard", "autocast-region", "unknown"):
            return
        if node.verdict == "low" and not low:
            node.decide("low", self._why_not(node), "cost")
        elif node.verdict == "propagate":
            node.decide("propagate", self._why(node, results, low), "cost")

    def _why_not(self, node: Node) -> str:
        gain = self.saving.get(node.id, 0.0) * 1e6
        if gain > 0:
            return f"too small: low precision would save {gain:.3g} us, less than its casts cost"
        rates = [self.cost.device.rate(precision, node.kind) for precision in (self.low, "fp32")]
        if rates[0] > rates[1]:
            call = self.cost.device.low_call_overhead.get(self.low, 0.0) * 1e6
            return f"too small: a {self.low} call takes {call:.3g} us more on this device than its work saves"
        return f"{node.kind} kernels for {self.low} are no faster than for FP32 on this device"

    def _why(self, node: Node, results: list[Value], low: bool) -> str:
        size = -1
        if low and not self.cost.is_view(node):
            size = sum([value.numel for value in results if value.dtype in CASTABLE]) * ITEMSIZE[self.low]
        key = node.reason, low, size
        if (known := self._reasons.get(key)) is None:
            side = "low, as its neighbours are" if low else "FP32, as its neighbours are"
            fewer = f": {size:,} bytes fewer than in FP32" if size >= 0 else ""
            said = f"; {side}{fewer}"
            known = self._reasons[key] = f"{node.reason.removesuffix(said)}{said}"  # on a plan it is said already
        return known


def made(graph: PrecisionGraph) -> list[list[Value]]:
    """Of each node, in order."""
    return [[*map(graph.values.__getitem__, node.outputs)] for node in graph]


def any_float(values: list[Value]) -> bool:
    return bool(values) and (values[0].dtype in CASTABLE or any(value.dtype in CASTABLE for value in values))


class _Classes:
    """Union-find over nodes that must agree; `tied` holds the dtype of the roots whose storage the program made."""

    def __init__(self, graph: PrecisionGraph) -> None:
        self._parent: dict[str, str] = {}
        self.tied: dict[str, str] = {}
        first: dict[str, str] = {}
        aliases = {name: value.alias for name, value in graph.values.items() if value.alias}
        for node in graph:
            if not node.group and not aliases:
                continue
            keys = [f"group {node.group}"] if node.group else []
            keys += [f"alias {aliases[name]}" for name in node.outputs if name in aliases]
            for key in keys:
                self._join(node.id, first.setdefault(key, node.id))
        if aliases:
            self._tie(graph, first)

    def _tie(self, graph: PrecisionGraph, first: dict[str, str]) -> None:
        named = [graph.values[name] for name in graph.inputs]
        named += [graph.values[name] for node in graph if has_fixed_dtype(node) for name in node.outputs]
        for value in named:
            if value.castable and f"alias {value.alias}" in first:
                root = self.root(first[f"alias {value.alias}"])
                made = graph.nodes.get(value.producer)
                dtype = made.out_dtype if made else value.dtype
                self.tied[root] = "fp32" if "fp32" in (dtype, self.tied.get(root)) else dtype

    def tied_to(self, node: str) -> str:
        """The dtype of the storage that the program made and `node` writes to, if any."""
        return self.tied.get(self.root(node), "") if self.tied else ""

    def root(self, node: str) -> str:
        while (parent := self._parent.get(node, node)) != node:
            self._parent[node] = self._parent.get(parent, parent)
            node = parent
        return node

    def _join(self, one: str, other: str) -> None:
        a, b = self.root(one), self.root(other)
        if a != b:
            self._parent[max(a, b)] = min(a, b)


def _fix_values(node: Node, results: list[Value]) -> None:
    """The plan's dtype of each castable output."""
    plain = "" if node.out_dtype or node.results or node.op == CAST_OP else node.precision or "keep"
    for index, value in enumerate(results):
        if value.dtype not in CASTABLE:
            continue
        given = plain or node.gives_at(index)
        if given != "keep":
            value.dtype = given


def _follow_autocast(graph: PrecisionGraph, low: str) -> None:
    """torch.autocast on CUDA, op by op: its lists cast, and anything else takes the widest of what it reads.

    What is written in place keeps the type of its storage, as torch's in-place operations do.
    """
    classes, stored = _Classes(graph), dict[str, str]()
    for node, results in zip(graph, made(graph), strict=True):
        if has_fixed_dtype(node) or not graph.has_floats(node):
            node.precision = node.out_dtype if has_fixed_dtype(node) and node.out_dtype in CASTABLE else "keep"  # type: ignore[assignment]
        elif node.verdict == "low":
            node.precision = low  # type: ignore[assignment]
        elif node.verdict == "fp32":
            node.precision = "fp32"
        else:
            read = [
                graph.values[name] for i, name in enumerate(node.inputs) if node.operands.get(node.slots[i]) is None
            ]
            node.precision = _widest([v for v in read if v.castable], low)  # type: ignore[assignment]
            why = f"{node.reason}; on no autocast list: {node.precision} as its operands"
            node.decide(node.verdict or "propagate", why, "rule")
        if node.precision in CASTABLE and any(value.alias for value in results) and not has_fixed_dtype(node):
            _keep_storage(node, classes, stored)
        _fix_values(node, results)


def _keep_storage(node: Node, classes: _Classes, stored: dict[str, str]) -> None:
    """Give a node the precision of the storage that its result is in; `stored` has that of each class, by its first node."""
    root = classes.root(node.id)
    kept = classes.tied.get(root) or stored.setdefault(root, node.precision)
    if kept == node.precision:
        return
    node.precision = kept  # type: ignore[assignment]
    by: DecidedBy = "user-cast" if classes.tied.get(root) else "rule"
    reason = f"its storage is {kept}, and an operation in place changes no type"
    node.decide("propagate" if kept in LOW else "fp32", reason, by)


def _widest(values: list[Value], low: str) -> str:
    """Torch's type promotion: a 0-dim tensor does not widen a tensor that has dimensions."""
    shaped = [v for v in values if v.shape] or values
    return low if shaped and all(v.dtype == low for v in shaped) else "fp32"
