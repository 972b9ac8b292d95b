"""Measured ranges: how large and how small the values and gradients of a model's nodes were, as data in a JSON file.

A node is known by its module's path, its operation and its number among the like in that module, so that every entrance
(drop-in, step, export) finds it.  Sizes are counted by powers of two: what share of a tensor a type rounds to zero, at
whatever loss scale, is then known without the tensor.  This room knows no framework.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpcompile.errors import RuleError
from mpcompile.formats import LARGEST, ROUNDS_TO_ZERO
from mpcompile.graph import Node, PrecisionGraph
from mpcompile.measured_graph import LOSS, MeasuredGraph, keyed, measured_graph, place
from mpcompile.passes.measured_hazards import VANISHING, Measured

SCHEMA = "mpcompile.ranges/2"
# How many times larger values may become while the weights move.
HEADROOM = 4.0
# Loss scales that are tried: 1 to 2**24, as `LossScale.dynamic` has them.
SCALES = tuple(2.0**power for power in range(25))
FIRST_SCALE = 2.0**16


def write_whole(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write a JSON file; it appears whole or not at all."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    draft = f"{os.fspath(path)}.{os.getpid()}.draft"
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):  # it took its place, or was never begun
            os.unlink(draft)


@dataclass(frozen=True)
class Call:
    """A batch as a call of the model, with arguments and keywords: for `calibrate`, and for `compare` beside its options."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """What was seen of one tensor over all batches.

    Fields:
      least, most: smallest and largest finite element.
      sizes: power of two -> how many elements have a size from it to the next one; zeros are not counted.
    """

    least: float = 0.0
    most: float = 0.0
    sizes: Mapping[int, int] = field(default_factory=dict)

    @property
    def largest(self) -> float:
        return max(abs(self.least), abs(self.most))

    def joined(self, other: Spread) -> Spread:
        sizes = Counter(self.sizes) + Counter(other.sizes)
        return Spread(min(self.least, other.least), max(self.most, other.most), dict(sorted(sizes.items())))

    def vanishing(self, limit: float) -> float:
        """The share of the elements that are not zero and smaller than `limit`, a power of two."""
        whole = sum(self.sizes.values())
        return sum(n for power, n in self.sizes.items() if 2.0 ** (power + 1) <= limit) / whole if whole else 0.0

    def measured(self, low: str) -> Measured:
        return Measured(self.least, self.most, self.vanishing(ROUNDS_TO_ZERO[low]))


@dataclass
class Ranges:
    """Ranges of a model's values and gradients; `save`, `Ranges.load`, and ``mpcompile(model, "fp16", ranges=...)``.

    Fields:
      values: node's key -> what its result was. gradients: node's key -> what the gradient of its result was, unscaled; with
        "|parameters" behind it, those of the parameters that it reads.
      parameters: name -> shape, of the model that was measured.
      graphs: what was measured, one for each signature of a batch. batches: how many were run.
    """

    values: dict[str, Spread] = field(default_factory=dict)
    gradients: dict[str, Spread] = field(default_factory=dict)
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    graphs: list[MeasuredGraph] = field(default_factory=list)
    batches: int = 0

    def note(self, key: str, spread: Spread, *, gradient: bool = False) -> None:
        table = self.gradients if gradient else self.values
        table[key] = table[key].joined(spread) if key in table else spread

    def check(self, parameters: Mapping[str, Sequence[int]]) -> None:
        """Refuse a model of other parameters.

        Raises:
          RuleError: MP207.
        """
        mine, given = self.parameters, {name: tuple(shape) for name, shape in parameters.items()}
        for name in (*mine, *given):
            if mine.get(name) != given.get(name):
                was, now = (str(list(table[name])) if name in table else "none" for table in (mine, given))
                raise RuleError("MP207", "the ranges were measured on another model", where=name,
                                why=f"the parameter was {was} and is {now}", try_="measure them again: calibrate")  # fmt: skip

    def note_graph(self, graph: MeasuredGraph) -> None:
        if graph not in self.graphs:
            self.graphs.append(graph)

    @property
    def operations(self) -> set[str]:
        """Keys of all nodes that were measured."""
        return {key for one in self.graphs for key in one.nodes}

    def check_graph(self, graph: PrecisionGraph, outside: Collection[str] = (), *, piece: bool = False) -> None:
        """Refuse a graph that computes what was not there when the ranges were measured.

        What the loss function computes is its own: of another loss nothing is known, and nothing is taken.

        Args:
          outside: ids of the nodes that are the loss function's own.
          piece: the graph is one of several of the model, behind a graph break.

        Raises:
          RuleError: MP207.
        """
        self._check(_Now(self, graph, outside, piece))

    def _check(self, now: _Now) -> None:
        for key, node in now.nodes():
            if why := "" if key.startswith(LOSS) else now.differs(key):
                raise RuleError("MP207", "the ranges were measured on another graph",
                                where=node.module or node.source or node.id, why=f"{node.id} ({node.op}): {why}",
                                try_="measure them again: calibrate")  # fmt: skip

    def found(
        self, graph: PrecisionGraph, low: str, outside: Collection[str] = (), *, piece: bool = False
    ) -> tuple[dict[str, Measured], dict[str, str]]:
        """(value -> what was measured, value -> why its gradient is unfit for `low`) for the values of `graph`.

        Raises:
          RuleError: MP207, as `check_graph`.
        """
        now = _Now(self, graph, outside, piece)
        self._check(now)
        unfit = unfit_gradients(self.gradients, low)
        values, gradients = dict[str, Measured](), dict[str, str]()
        for keys, node in now.known():
            if not node.outputs:
                continue
            seen = [self.values[key].measured(low) for key in keys if key in self.values]
            if seen:
                values[node.outputs[0]] = functools.reduce(Measured.join, seen)
            reasons = (unfit.get(key) or unfit.get(f"{key}|parameters") for key in keys)
            if reason := next(filter(None, reasons), ""):
                gradients[node.outputs[0]] = reason
        return values, gradients

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "batches": self.batches,
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
            "graphs": [one.to_dict() for one in self.graphs],
            "values": {key: _plain(one) for key, one in self.values.items()},
            "gradients": {key: _plain(one) for key, one in self.gradients.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file; it appears whole or not at all."""
        write_whole(path, self.to_dict())

    @classmethod
    def load(cls, given: Any) -> Ranges:
        """`given` itself, or what its file holds.

        Raises:
          RuleError: MP208.
        """
        if isinstance(given, Ranges):
            return given
        if not isinstance(given, (str, os.PathLike)):
            raise RuleError("MP208", f"a {type(given).__name__} holds no ranges", try_='ranges="ranges.json"')
        try:
            with open(given, encoding="utf-8") as file:
                return cls._read(json.load(file))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RuleError("MP208", f"{os.fspath(given)} holds no ranges", why=f"{type(error).__name__}: {error}",
                            try_="mpcompile calibrate TARGET -o ranges.json") from error  # fmt: skip

    @classmethod
    def _read(cls, data: Any) -> Ranges:
        if data["schema"] != SCHEMA:
            raise ValueError(f"its schema is {data['schema']!r}, not {SCHEMA!r}")
        values, gradients = ({key: _spread(one) for key, one in data[name].items()} for name in ("values", "gradients"))
        parameters = {name: tuple(map(int, shape)) for name, shape in data["parameters"].items()}
        return cls(
            values, gradients, parameters, [MeasuredGraph.read(one) for one in data["graphs"]], int(data["batches"])
        )


class _Now:
    """A graph beside those that were measured."""

    def __init__(self, ranges: Ranges, graph: PrecisionGraph, outside: Collection[str], piece: bool) -> None:
        self.graphs, self.parameters = ranges.graphs, ranges.parameters
        self.now = measured_graph(graph, outside)
        self.keyed = list(keyed(graph, outside))
        self.here = Counter(map(place, self.now.nodes))
        self.measured: defaultdict[str, list[str]] = defaultdict(list)
        for key in sorted(ranges.operations):
            self.measured[place(key)].append(key)
        self.piece = piece

    def nodes(self) -> Iterator[tuple[str, Node]]:
        """(key, node) of those whose results are measured."""
        return ((key, node) for key, node in self.keyed if key in self.now.nodes)

    def differs(self, key: str) -> str:
        """Why none of the measured graphs has this node, in words; "" where one has."""
        made, why = self.now.nodes[key], "nothing was measured of it"
        if self._is_one_of_several(key):
            return "" if self.measured[place(key)] else why
        for one in self.graphs:
            if key not in one.nodes:
                continue
            sizes = self.now.shapes <= one.shapes
            why = one.nodes[key].differs(made, sizes=sizes, piece=self.piece, parameters=self.parameters)
            if not why:
                return ""
        return why

    def known(self) -> Iterator[tuple[list[str], Node]]:
        """(keys, node) of each node. Where a graph has not as many of an operation in a module as were measured (it is a
        piece behind a graph break), nobody knows which of them a node is, and all of them count.
        """
        for key, node in self.nodes():
            if self._is_one_of_several(key):
                yield self.measured[place(key)], node
            elif not key.startswith(LOSS) or not self.differs(key):
                yield [key], node

    def _is_one_of_several(self, key: str) -> bool:
        where = place(key)
        return self.piece and not key.startswith(LOSS) and self.here[where] != len(self.measured[where])


def unfit_gradients(gradients: Mapping[str, Spread], low: str) -> dict[str, str]:
    """Gradients that `low` cannot hold at the loss scale that suits most of them, and why.

    Each gradient has an interval of scales, from where half of it is no longer rounded to zero to where it overflows; the
    scale is the power of two that lies in most intervals.
    """
    spans = {key: _span(one, low) for key, one in gradients.items() if one.sizes}
    if not spans:
        return {}
    fit = {scale: sum(low_end <= scale <= high_end for low_end, high_end in spans.values()) for scale in SCALES}
    scale = max(SCALES, key=lambda one: (fit[one], -abs(math.log2(one / FIRST_SCALE))))
    found = dict[str, str]()
    for key, (low_end, high_end) in spans.items():
        size = gradients[key].largest
        whose = "a gradient of its parameters" if key.endswith("|parameters") else "its gradient"
        if scale > high_end:
            found[key] = f"{whose} reaches {size:.3g}, beyond {low} at a loss scale of {scale:g}, which others need"
        elif scale < low_end:
            found[key] = (
                f"half of {whose.replace('its', 'the')} (at most {size:.3g}) is zero in {low} at a loss scale of {scale:g}"
            )
    return found


def _span(one: Spread, low: str) -> tuple[float, float]:
    """(smallest scale at which at most `VANISHING` of it is rounded to zero, largest at which it is finite)."""
    high_end = LARGEST[low] / one.largest if one.largest else math.inf
    for scale in SCALES:
        if one.vanishing(ROUNDS_TO_ZERO[low] / scale) <= VANISHING:
            return scale, high_end
    return math.inf, high_end


def _plain(one: Spread) -> list[Any]:
    return [one.least, one.most, {str(power): count for power, count in one.sizes.items()}]


def _spread(data: Any) -> Spread:
    least, most, sizes = data
    return Spread(float(least), float(most), {int(power): int(count) for power, count in sizes.items()})


__all__ = ["HEADROOM", "Call", "Ranges", "Spread", "unfit_gradients"]
