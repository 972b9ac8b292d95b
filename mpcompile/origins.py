"""What rounding a value would lose: its origin, and what every operation does with the origins that it reads.

Time and bytes have prices; rounding has a law (law 10).  A value is

- ``rounded``: it carries roundings of the low type already (what a product, convolution, attention, norm, or an activation
  of such values gives, and an input that arrives low).  Storing it low adds one more of their size.
- ``weight``: a parameter.  ``row``: rows of a weight, looked up by an integer index.
- ``full``: all else that is held in FP32: inputs, buffers, tensors that the program makes, results of FP32 nodes.
- "": a number, or nothing but numbers, which kernels compute with in FP32; integers and bools.

A full value is never stored or read low but by a product, a convolution or attention, which round what they read in every
mixed-precision scheme, or where a rule here has evidence that nothing is lost.  `Flow` finds the origins of a graph: the
greatest fixpoint, so node order does not matter.  What an operation does (its *behaviour*) is a column of the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from mpcompile.behaviours import MOVERS, Behaviours, is_forced, subtracts
from mpcompile.formats import CASTABLE, LOW
from mpcompile.graph import Node, Origin, PrecisionGraph, Value
from mpcompile.intervals import Interval, exact_in, interval
from mpcompile.rules.hazards import HAZARDS
from mpcompile.statistics import Statistics
from mpcompile.sum_readers import WITH_WEIGHT, SumReaders

# Results of FP32 nodes are full, but what these give is what they were given, or of size 1 by construction.
_KEPT = MOVERS | {"norm", "cast", "none", "power"}
# How the reasons of hazards begin that are about range.
_OF_RANGE = tuple(f"{row.name}:" for row in HAZARDS if row.range)
# How large a multiplier of known range may be, and how small its largest number: FP16 has little room on either side.
MULTIPLIERS = {"fp16": (2.0**-8, 64.0), "bf16": (0.0, 2.0**60)}


@dataclass
class Flow:
    """The origins of a graph whose nodes have verdicts.

    Fields:
      low: the low type.
      origin: castable value -> origin, once `solve` has run.
      ranges: value -> (least, greatest) element, where known.
      tables: buffers that nobody writes to, and views and rows of them.
      exact: values whose elements are exact in the low type (0/1 masks, fills).
      wide: nodes that read full values in FP32 and give rounded ones: norms that are written by hand.
      sums: sums that are rounded if their readers allow it, with the full operand of known range ("" for none).
      denied: those of them whose readers do not.
    """

    graph: PrecisionGraph
    low: str
    origin: dict[str, Origin] = field(default_factory=dict)
    ranges: dict[str, Interval] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    exact: set[str] = field(default_factory=set)
    wide: set[str] = field(default_factory=set)
    sums: dict[str, str] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.behaviours = Behaviours(self.graph.header.get("source", "fx"))
        self.statistics = Statistics(self.graph)
        self._allows = SumReaders(self)
        # Storage and groups of which one member is full.
        self._shared: set[str] = set()
        # Results of `sums`, and views of them.
        self._leaning: set[str] = set()
        self._transfer: dict[str, Callable[[Node, list[str]], Origin]] = {
            "round": lambda node, names: "rounded",
            "norm": lambda node, names: "rounded",
            "map": self._map,
            "select": self._join,
            "move": self._move,
            "place": self._place,
            "gather": self._gather,
            "add": self._add,
            "multiply": self._multiply,
            "divide": self._divide,
            "power": self._power,
        }

    @cached_property
    def readers(self) -> dict[str, list[Node]]:
        return self.graph.readers()

    @cached_property
    def returned(self) -> frozenset[str]:
        return frozenset(self.graph.outputs)

    def solve(self) -> Flow:
        """Find the origins. Each round only turns more values full, so this ends; nearly always after one or two."""
        while True:
            self._sweep()
            if not (self._spread() | self._deny()):
                return self

    def _sweep(self) -> None:
        self.origin.clear()
        self.sums.clear()
        self._leaning.clear()
        for name, value in self.graph.values.items():
            if not value.producer and value.dtype in CASTABLE:
                self.origin[name] = self._given(value)
        for node in self.graph.nodes.values():
            self._visit(node)

    def _given(self, value: Value) -> Origin:
        """The origin of a graph input."""
        if value.range is not None:
            self.ranges[value.name] = value.range
            if exact_in(value.range, self.low):
                self.exact.add(value.name)
        if value.role in ("buffer", "constant") and not value.alias:
            self.tables.add(value.name)
        if value.dtype in LOW:
            return "rounded"
        if value.role == "constant" and (not value.shape or value.numel == 1):
            return ""
        return "weight" if value.role == "parameter" else "full"

    def _visit(self, node: Node) -> None:
        values, origin = self.graph.values, self.origin
        results = [name for name in node.outputs if values[name].dtype in CASTABLE]
        if not results:
            return
        names = self.operands(node)
        found = self._found(node, names)
        if names:
            self.statistics.visit(node, names, results)
        self._limits(node, names, results)
        group = f"group {node.group}" if node.group else ""
        for index, name in enumerate(node.outputs):
            if name not in results:
                continue
            alias = values[name].alias
            full = node.results.get(index) == "fp32" or alias in self._shared or group in self._shared
            origin[name] = "full" if full and found else found

    def operands(self, node: Node) -> list[str]:
        """The floats that `node` reads in its own precision."""
        values, pinned = self.graph.values, node.operands
        if not pinned:
            return [name for name in node.inputs if values[name].dtype in CASTABLE]
        read = zip(node.slots, node.inputs, strict=True)
        return [name for slot, name in read if values[name].dtype in CASTABLE and pinned.get(slot) != "fp32"]

    def _found(self, node: Node, names: list[str]) -> Origin:
        how = self.behaviours.of(node)
        if how == "cast" or node.out_dtype in LOW:
            return self._cast(node, names)
        if is_forced(node):
            return "rounded"
        if names and not any(self.origin[name] for name in names):
            return ""  # numbers alone
        if node.verdict == "fp32" and self._keeps_digits(node, how):
            return "full"
        transfer = self._transfer.get(how)
        if transfer is None:
            return self._made(node, names)
        if node.out_dtype and not names:
            return self._made(node, names)
        return "full" if node.out_dtype == "fp32" and how == "map" else transfer(node, names)

    def _keeps_digits(self, node: Node, how: str) -> bool:
        """True for an FP32 node that is FP32 for the digits of its result."""
        if how in _KEPT:
            return how == "norm" and node.decided_by == "autocast-region"
        return not (node.decided_by == "hazard" and node.reason.startswith(_OF_RANGE)) or how not in self._transfer

    def _made(self, node: Node, names: list[str]) -> Origin:
        """What the program makes: a number where it has no dimension, else full."""
        first = self.graph.values[node.outputs[0]]
        return "" if not first.shape and first.numel == 1 and not any(self.origin[n] for n in names) else "full"

    def _cast(self, node: Node, names: list[str]) -> Origin:
        """The user's own: to the low type it rounds; to FP32 it says that the digits matter."""
        if node.out_dtype in LOW:
            return "rounded"
        if names and (not node.out_dtype or self._gives_back(names[0])):
            return self._join(node, names)
        if names and self.origin[names[0]] == "weight":
            return "weight"  # a parameter is FP32 whether or not the program says so
        if not names and node.inputs and self.graph.values[node.inputs[0]].dtype == "bool":
            self.exact.update(node.outputs)
        return "" if names and not self.origin[names[0]] else "full"

    def _gives_back(self, name: str) -> bool:
        """``.to(input_dtype)`` after a norm that is written out: it ends the FP32 arithmetic, and asks for none."""
        return self.origin[name] == "rounded" and self.graph.values[name].producer in self.wide

    def _limits(self, node: Node, names: list[str], results: list[str]) -> None:
        """The range of the results, and whether they are exact in the low type."""
        rule = self.behaviours.rule(node)
        known = interval(node, names, self.ranges, rule.range if rule else None)
        how = rule.origins if rule else ""
        if known is None and how == "cast" and not names and self.exact.issuperset(node.outputs):
            known = (0.0, 1.0)
        if known is not None:
            self.ranges.update(dict.fromkeys(results, known))
        if how == "source" and known is not None:
            made = exact_in(known, self.low)
        else:
            made = how in ("move", "place", "select", "gather") and bool(names) and self.exact.issuperset(names)
        if made:
            self.exact.update(results)
        if how in MOVERS and names and self.tables.issuperset(names):
            self.tables.update(results)

    def takes_low(self, node: Node, how: str) -> bool:
        """True for sums and products that a rule lets read full operands low: they give rounded values."""
        evident = how in ("add", "multiply") and node.id not in self.wide and node.verdict != "fp32"
        return evident and all(self.origin.get(name) == "rounded" for name in node.outputs)

    # ------------------------------------------------------------------------------------- what each behaviour does

    def _kinds(self, names: Iterable[str]) -> list[Origin]:
        return [self.origin[name] for name in names]

    def _join(self, node: Node, names: list[str]) -> Origin:
        """Elements of one or several values: the one that has most to lose."""
        found = set(self._kinds(names))
        for one in ("full", "rounded", "row", "weight"):
            if one in found:
                return one
        return ""

    def _move(self, node: Node, names: list[str]) -> Origin:
        if self._leaning and not self._leaning.isdisjoint(names):
            self._leaning.update(node.outputs)
        return self._join(node, names)

    def _place(self, node: Node, names: list[str]) -> Origin:
        """The same, where numbers that the low type holds (zeros to pad with) may stand beside any."""
        return self._join(node, [name for name in names if name not in self.exact] or names)

    def _gather(self, node: Node, names: list[str]) -> Origin:
        found = self._join(node, names)
        return "row" if found == "weight" and self.by_index(node) else found

    def by_index(self, node: Node) -> bool:
        """True when an integer tensor says which elements are read."""
        return any("int" in self.graph.values[name].dtype for name in node.inputs) or not node.inputs[1:]

    def _map(self, node: Node, names: list[str]) -> Origin:
        """A curve: of rounded values rounded, of weights alone something that nobody has rounded yet."""
        found = set(self._kinds(names)) - {""}
        if not found:
            return ""
        return "rounded" if "rounded" in found and "full" not in found else "full"

    def _add(self, node: Node, names: list[str]) -> Origin:
        # A sum of rows is one more row to what is added to it: it may not lean on itself.
        found: list[Origin] = ["row" if name in self._leaning else self.origin[name] for name in names]
        full = [name for name in names if self.origin[name] == "full"]
        if full:
            fits = len(full) == 1 and full[0] in self.ranges and not {"rounded", "row"}.isdisjoint(found)
            return self._if_read_gently(node, full[0]) if fits and not self._counts(node) else "full"
        real = [one for one in found if one]
        if self._counts(node):
            return "full" if real else ""
        if "rounded" in found:
            return "rounded" if real.count("rounded") == len(real) else self._if_not_heard(node)
        if len(real) < 2:
            return real[0] if real else ""
        if "row" not in real or subtracts(node):
            return "full"
        return self._if_read_gently(node, "")

    def _counts(self, node: Node) -> bool:
        """True where a tensor of integers is an operand: exact, and of any size."""
        values = self.graph.values
        return any("int" in values[name].dtype and values[name].shape for name in node.inputs)

    def _if_read_gently(self, node: Node, full: str) -> Origin:
        if node.id in self.denied:
            return "full"
        self.sums[node.id] = full
        self._leaning.update(node.outputs)
        return "rounded"

    def _power(self, node: Node, names: list[str]) -> Origin:
        """x ** 3 is x * x * x; what other powers do to a rounding depends on x."""
        power = node.attrs.get("exponent")
        plain = len(names) == 1 and isinstance(power, (int, float)) and 1 <= power <= 4
        return self._map(node, names) if plain else "full"

    def _if_not_heard(self, node: Node) -> Origin:
        """A rounded value and a weight, which may be the larger one: what is returned, or looked at in FP32, keeps its digits."""
        if node.id in self.denied:
            return "full"
        self.sums[node.id] = WITH_WEIGHT
        return "rounded"

    def _multiply(self, node: Node, names: list[str]) -> Origin:
        found = self._kinds(names)
        if self.statistics.normalizes(node, names, inverse=True):
            return self._norm(node, found)
        if self._counts(node):
            return "full"
        if "full" in found:
            bounded = all(self._is_multiplier(name) for name in names if self.origin[name] == "full")
            return self._by_multiplier(node, found) if bounded else "full"
        return self._scaled(found)

    def _by_multiplier(self, node: Node, found: list[Origin]) -> Origin:
        """Rounded values times a gate; rows times a number that is held in a buffer, which is read as it is."""
        rest = [one for one in found if one not in ("", "full")]
        if "rounded" in rest:
            return "rounded"
        self.wide.add(node.id)
        return "row" if rest == ["row"] else "full"

    def _divide(self, node: Node, names: list[str]) -> Origin:
        found = self._kinds(names)
        if self.statistics.normalizes(node, names, inverse=False):
            return self._norm(node, found)
        if "full" in found or (len(names) == 1 and node.inputs and node.inputs[0] != names[0]):
            return "full"  # or a number divided by a tensor
        return self._scaled(found)

    def _scaled(self, found: list[Origin]) -> Origin:
        if "rounded" in found:
            return "rounded"
        real = [one for one in found if one]
        return "" if not real else real[0] if len(real) == 1 else "full"

    def _norm(self, node: Node, found: list[Origin]) -> Origin:
        """A value by a statistic of its own: a norm that is written out. It reads as it comes, and gives size 1."""
        if "full" in found:
            self.wide.add(node.id)
        return "rounded"

    def _is_multiplier(self, name: str) -> bool:
        """A factor of known range (a gate, a probability, a cosine, a 0/1 mask), not where a state starts."""
        known = self.ranges.get(name)
        maker = self.graph.producer(name)
        if known is None or (maker is not None and maker.kind == "factory"):
            return False
        least, most = MULTIPLIERS[self.low]
        size = max(map(abs, known))
        return size == 0.0 or least <= size <= most

    # ----------------------------------------------------------------------------------------- what else turns full

    def _spread(self) -> bool:
        """What shares storage with a full value, or carries it around a loop, is full."""
        before = len(self._shared)
        for node in self.graph.nodes.values():
            if node.group and any(self.origin.get(name) == "full" for name in (*node.inputs, *node.outputs)):
                self._shared.add(f"group {node.group}")
        for name, one in self.origin.items():
            if one == "full" and (alias := self.graph.values[name].alias):
                self._shared.add(alias)
        return len(self._shared) > before

    def _deny(self) -> bool:
        """Sums that somebody reads who is no norm, product, dropout, or sum with rounded values: last ones first."""
        before = len(self.denied)
        for key in reversed(self.sums):
            full = self.sums[key]
            name = self.graph.nodes[key].outputs[0]
            if not self._allows.sum(full, name):
                self.denied.add(key)
        return len(self.denied) > before
