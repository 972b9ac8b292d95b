"""Remove casts that buy nothing, and move casts across views to where there is less to cast.

Never costs more: each step removes a cast, or leaves fewer bytes to read and write.  The user's own casts stay as they
are, with their rounding and their readers: whether one of his could serve for one of ours would depend on the order of
nodes, and both compilers behind us merge equal casts anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import ClassVar

from mpcompile import laws
from mpcompile.formats import ITEMSIZE
from mpcompile.graph import CAST_OP, Node, PrecisionGraph, Value
from mpcompile.passes.base import PassResult
from mpcompile.passes.insert_casts import make_cast, origin_of, place
from mpcompile.rules.table import load_kinds


@dataclass(frozen=True)
class SimplifyCasts:
    """No options."""

    name: ClassVar[str] = "simplify-casts"
    ensures: ClassVar[str] = "simplified"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        if not _worth_a_look(graph):
            return PassResult(False)
        before, casts = cast_bytes(graph), len(graph.casts())
        editor = _Editor(graph)
        while editor.round():
            pass
        if not editor.changed:
            return PassResult(False)
        editor.finish()
        saved = f"{casts} casts became {len(graph.casts())}, {before - cast_bytes(graph)} bytes less to cast"
        return PassResult(True, (saved,))


def _worth_a_look(graph: PrecisionGraph) -> bool:
    """False when no cast is one that a rewrite starts from: many plans are as small as they can be.

    What is found first costs least: a graph that is worth it shows so early.
    """
    casts, kinds, nodes = graph.casts(), _views(), graph.nodes.values()
    if not laws.lean(graph, casts):
        return True
    views = [node for node in nodes if node.kind in kinds]
    shown, given = {name for view in views for name in view.outputs}, {cast.outputs[0] for cast in casts}
    if any(cast.inputs[0] in shown for cast in casts if shown):
        return True
    if any(not given.isdisjoint(view.inputs) for view in views):
        return True  # one that may sink
    return bool(given.difference(graph.outputs, chain.from_iterable([node.inputs for node in nodes])))


@cache
def _views() -> frozenset[str]:
    return frozenset(name for name, kind in load_kinds().items() if kind.fusion == "view")


def cast_bytes(graph: PrecisionGraph) -> int:
    """Bytes that our casts read and write."""
    return sum(_bytes(graph, cast) for cast in graph.casts())


def _bytes(graph: PrecisionGraph, cast: Node) -> int:
    source = graph.values[cast.inputs[0]]
    return source.numel * (ITEMSIZE[source.dtype] + ITEMSIZE[str(cast.attrs["to"])])


class _Editor:
    """The graph, who reads what, and the rewrites; each rewrite says whether it applied."""

    def __init__(self, graph: PrecisionGraph) -> None:
        self.graph, self.changed = graph, False
        self.views = _views()
        self.readers = graph.readers()
        self.returned: dict[str, list[int]] = {}
        for index, name in enumerate(graph.outputs):
            self.returned.setdefault(name, []).append(index)

    def round(self) -> bool:
        """One look at every cast; True when something was found."""
        found = False
        for cast in self.graph.casts():
            found |= cast.id in self.graph.nodes and self.step(cast)
        self.changed |= found
        return found

    def step(self, cast: Node) -> bool:
        return self.drop(cast) or self.shorten(cast) or self.share(cast) or self.hoist(cast) or self.sink(cast)

    def finish(self) -> None:
        """Put every cast right after its source; those of written storage stay where they are."""
        values, nodes = self.graph.values, self.graph.nodes.values()
        loose = {node.id for node in nodes if node.is_cast and not values[node.inputs[0]].alias}
        casts = [(values[n.inputs[0]], n) for n in nodes if n.id in loose]
        place(self.graph, [n for n in nodes if n.id not in loose], casts)

    # Each of the next five is one rewrite.

    def drop(self, cast: Node) -> bool:
        """Nobody reads it."""
        name = cast.outputs[0]
        if self.readers[name] or name in self.returned:
            return False
        self.remove(cast)
        return True

    def shorten(self, cast: Node) -> bool:
        """It reads a cast of ours, or has nothing to do."""
        source = self.graph.values[cast.inputs[0]]
        root = self.root(source)
        if root.dtype == cast.attrs["to"]:
            return self.replace(cast, root.name)
        if root is source:
            return False
        self.reread(cast, 0, root.name)
        cast.origin = origin_of(root)
        return True

    def share(self, cast: Node) -> bool:
        """Another cast gives the same."""
        source = self.graph.values[cast.inputs[0]]
        if source.alias or len(self.readers[source.name]) == 1:
            return False
        twin = self.twin(source, str(cast.attrs["to"]), cast)
        return twin is not None and self.replace(cast, twin.outputs[0])

    def hoist(self, cast: Node) -> bool:
        """``cast(view(x))`` is ``view(cast(x))``: better where x is smaller, or cast already."""
        given, to = self.graph.values[cast.inputs[0]], str(cast.attrs["to"])
        view = self.graph.nodes.get(given.producer)
        if view is None or view.kind not in self.views or self.readers[given.name] != [cast]:
            return False
        if given.name in self.returned:
            return False
        operand = self.through(view)
        if operand is None:
            return False
        root = self.root(self.graph.values[view.inputs[operand]])
        twin = self.twin(root, to)
        free = twin is not None or root.dtype == to
        cost = 0 if free else root.numel * (ITEMSIZE[root.dtype] + ITEMSIZE[to])
        # A shadow of the whole parameter is refreshed once per step: worth it at equal bytes.
        if cost > _bytes(self.graph, cast) - (root.role != "parameter"):
            return False
        name = root.name if root.dtype == to else (twin or self.new_cast(root, to)).outputs[0]
        self.retype(view, operand, name, to)
        return self.replace(cast, given.name)

    def sink(self, cast: Node) -> bool:
        """``view(cast(x))`` is ``cast(view(x))``: better where the view is smaller."""
        name, source = cast.outputs[0], self.graph.values[cast.inputs[0]]
        if len(self.readers[name]) != 1 or name in self.returned or source.alias or source.role == "parameter":
            return False
        view = self.readers[name][0]
        operand = self.through(view)
        if operand is None:
            return False
        given, to = self.graph.values[view.outputs[0]], str(cast.attrs["to"])
        if given.numel >= source.numel or any(reader.is_cast for reader in self.readers[given.name]):
            return False
        self.retype(view, operand, source.name, source.dtype)
        self.remove(cast)
        self.redirect(given.name, self.new_cast(given, to).outputs[0])
        return True

    # What the rewrites are made of.

    def root(self, value: Value) -> Value:
        """What `value` was before our casts."""
        while (node := self.graph.nodes.get(value.producer)) is not None and node.is_cast:
            before = self.graph.values[node.inputs[0]]
            if before.alias:
                break
            value = before
        return value

    def twin(self, value: Value, to: str, other: Node | None = None) -> Node | None:
        """Our cast of `value` that gives `to`, if there is one besides `other`."""
        for reader in self.readers[value.name]:
            if reader.op == CAST_OP and reader is not other and reader.attrs["to"] == to:
                return reader
        return None

    def through(self, view: Node) -> int | None:
        """The operand that `view` shows, when its precision is free to change; else None."""
        values = self.graph.values
        floats = [operand for operand, name in enumerate(view.inputs) if values[name].castable]
        fixed = bool(view.verdict != "propagate" or view.group or view.out_dtype or view.results or view.region)
        fixed = fixed or view.phase == "optimizer"
        if view.kind not in self.views or fixed or len(floats) != 1 or len(view.outputs) != 1:
            return None
        shares = values[view.outputs[0]].alias or values[view.inputs[floats[0]]].alias
        return None if shares or view.slots[floats[0]] in view.operands else floats[0]

    def new_cast(self, source: Value, to: str) -> Node:
        cast = make_cast(self.graph, source, to)
        self.graph.nodes[cast.id] = cast
        self.readers[cast.outputs[0]] = []
        self.readers[source.name].append(cast)
        return cast

    def retype(self, view: Node, operand: int, name: str, precision: str) -> None:
        """Let `view` read `name`, in another precision than before."""
        self.reread(view, operand, name)
        self.graph.values[view.outputs[0]].dtype = precision
        view.precision = precision  # type: ignore[assignment]
        view.decide(view.verdict or "propagate", f"{precision}, so that fewer bytes are cast", "cost")

    def reread(self, reader: Node, operand: int, name: str) -> None:
        self.readers[reader.inputs[operand]].remove(reader)
        self.readers[name].append(reader)
        reader.inputs[operand] = name

    def redirect(self, old: str, new: str) -> None:
        """All who read `old` read `new`, except the node that makes `new`."""
        maker = self.graph.values[new].producer
        for reader in [r for r in self.readers[old] if r.id != maker]:
            self.reread(reader, reader.inputs.index(old), new)
        for index in self.returned.pop(old, ()):
            self.graph.outputs[index] = new
            self.returned.setdefault(new, []).append(index)

    def replace(self, cast: Node, name: str) -> bool:
        self.redirect(cast.outputs[0], name)
        self.remove(cast)
        return True

    def remove(self, cast: Node) -> None:
        self.readers[cast.inputs[0]].remove(cast)
        del self.graph.nodes[cast.id], self.graph.values[cast.outputs[0]], self.readers[cast.outputs[0]]
