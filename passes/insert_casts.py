"""Write the plan into the graph: one shared cast per value and target, right after the value is made.

Every operand says in which precision it is read (`Node.reads_at`).  Where the value has another one, its reader is
redirected to a cast.  A cast of a parameter is its *shadow*: the runtime refreshes it when the master changes.  A
parameter that the graph itself writes to has none.

Storage that someone writes to is the one exception to "right after": the readers before and after a write see
different numbers, so a cast of such a value stands in front of its first reader and is shared up to the next write.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

from mpcompile import laws
from mpcompile.formats import CASTABLE
from mpcompile.graph import CAST_OP, CastOrigin, Node, PrecisionGraph, Value
from mpcompile.passes.base import PassResult


@dataclass(frozen=True)
class InsertCasts:
    """Fields:
    low: the low type of the policy.
    output: dtype of computed floating outputs: "fp32", "low", or "keep" (as the last node gives it).
    """

    low: str
    output: str = "fp32"

    name: ClassVar[str] = "insert-casts"
    ensures: ClassVar[str] = "cast"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        writer = _Writer(graph)
        for node in graph.nodes.values():
            writer.redirect(node)
        writer.outputs({"fp32": "fp32", "low": self.low}.get(self.output, "keep"))
        made = writer.finish()
        shadows = sum(cast.origin == "shadow" for cast in made)
        notes = (f"{len(made)} casts inserted, {shadows} of them shadows of parameters",) if made else ()
        return PassResult(bool(made), notes)


@dataclass
class _Writer:
    """The casts made so far, by target and value (and how often its storage was written), and in order, with their source."""

    graph: PrecisionGraph
    casts: defaultdict[str, dict[str | tuple[str, int], Node]] = field(default_factory=lambda: defaultdict(dict))
    made: list[tuple[Value, Node]] = field(default_factory=list)
    # Reader -> the casts that must stand right before it, because of writes to storage.
    before: dict[str, list[Node]] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.writers = laws.writers(self.graph)
        # A graph that has casts already shares them.
        for cast in self.graph.casts():
            if not self.graph.values[cast.inputs[0]].alias:
                self.casts[str(cast.attrs["to"])][cast.inputs[0]] = cast

    def redirect(self, node: Node) -> None:
        """Let `node` read each operand in the precision that it wants."""
        values, own, usual = self.graph.values, node.operands, node.reads()
        for operand, name in enumerate(node.inputs if own or usual != "any" else ()):
            dtype = values[name].dtype
            want = own.get(node.slots[operand], usual) if own else usual
            if want != dtype and dtype in CASTABLE and want in CASTABLE:
                node.inputs[operand] = self.cast(name, want, node.id)
        # Asked again, since a node does not write to what it now reads through a cast.
        for alias in laws.writes(self.graph, node) if node.id in self.writers else ():
            self.written[alias] = self.written.get(alias, 0) + 1

    def outputs(self, want: str) -> None:
        """Give computed floating outputs the dtype `want`; what the user cast himself stays as he wrote it."""
        graph = self.graph
        for index, name in enumerate(graph.outputs if want != "keep" else ()):
            value, node = graph.values[name], graph.producer(name)
            if node is None or not value.castable or value.dtype == want or node.out_dtype:
                continue
            graph.outputs[index] = self.cast(name, want, "")

    def cast(self, name: str, to: str, reader: str) -> str:
        """The name of `name` cast `to`, for `reader` ("" for the end of the graph)."""
        source = self.graph.values[name]
        key = name if not source.alias else (name, self.written.get(source.alias, 0))
        casts = self.casts[to]
        made = casts.get(key)
        if made is None:
            casts[key] = made = make_cast(self.graph, source, to)
            self.made.append((source, made))
            if source.alias:
                self.before.setdefault(reader, []).append(made)
        return made.outputs[0]

    def finish(self) -> list[Node]:
        """Put the casts in place; the casts that were made."""
        order, loose = [*self.graph.nodes.values()], self.made
        if self.before:
            order = [each for node in order for each in (*self.before.get(node.id, ()), node)]
            order += self.before.get("", ())
            placed = {cast.id for casts in self.before.values() for cast in casts}
            loose = [(source, cast) for source, cast in self.made if cast.id not in placed]
        place(self.graph, order, loose)
        return [cast for _, cast in self.made]


def make_cast(graph: PrecisionGraph, source: Value, to: str) -> Node:
    """A new cast of `source`, with its value, that stands nowhere yet."""
    name = graph.fresh_name(f"{source.name}_{to}")
    cast = _blank(source.dtype, to).copy()
    cast.id, cast.inputs, cast.outputs, cast.scope = name, [source.name], [name], source.scope
    cast.origin = origin_of(source)
    if (maker := graph.nodes.get(source.producer)) is not None:
        cast.phase, cast.module, cast.source = maker.phase, maker.module, maker.source
    graph.values[name] = Value(name, to, source.shape, source.numel, name, "activation", None, "", source.scope)
    return cast


def origin_of(source: Value) -> CastOrigin:
    """Whose cast it is. What the graph itself writes to has no shadow: that of before the write would be read."""
    return "shadow" if source.role == "parameter" and not source.alias else "inserted"


@cache
def _blank(dtype: str, to: str) -> Node:
    """What all casts from `dtype` to `to` have in common."""
    return Node("", CAST_OP, [""], slots=[0], attrs={"to": to}, kind="cast", verdict="propagate",
                precision=to, reason=f"{dtype} is needed as {to}")  # type: ignore[arg-type]  # fmt: skip


def place(graph: PrecisionGraph, order: list[Node], casts: list[tuple[Value, Node]]) -> None:
    """Rebuild the node table: `order`, with each of `casts` (source, cast) right after its source is made.

    Casts of graph inputs stand at the beginning; those of the inputs of an inner region before their first reader.
    """
    after: dict[str, list[Node]] = {}
    waiting: dict[str, Node] = {}
    for source, cast in casts:
        if source.scope and not source.producer:
            waiting[cast.outputs[0]] = cast
        elif (found := after.get(source.producer)) is not None:
            found.append(cast)
        else:
            after[source.producer] = [cast]
    placed = after.pop("", [])
    for node in order:
        if waiting:
            placed += [waiting.pop(name) for name in node.inputs if name in waiting]
        placed.append(node)
        if (found := after.get(node.id)) is not None:
            placed += found
    graph.rebuild_order([*placed, *waiting.values()])
