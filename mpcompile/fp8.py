"""FP8 as a form in which a product reads an operand: what may be read so, in which layout, and what it costs.

A linear layer is three products of two operands each, and every one of them may read both of its own in FP8:

====================  =========================  ==========================
pass                  left                       right
====================  =========================  ==========================
output                input, as it lies          weight, as it lies
grad_input            gradient, as it lies       weight, transposed
grad_weight           gradient, transposed       input, transposed
====================  =========================  ==========================

FP8 kernels read both operands along the dimension that is summed over, so a transposed layout is a copy of its own.
Inputs and weights are E4M3 (more digits), gradients E5M2 (more range; E4M3 where each row has a scale of its own).
Nothing is stored in FP8 between nodes: a node's precision stays BF16.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mpcompile.devices import Device
from mpcompile.formats import LOW
from mpcompile.graph import Node, PrecisionGraph, Value

PASSES = ("output", "grad_input", "grad_weight")
RECIPES = ("tensorwise", "rowwise")
# The one operation of which all three products are known; its operands are (input, weight[, bias]).
LINEAR = "aten.linear.default"
# Elements of a row that FP8 kernels need a multiple of.
UNIT = 16
# Products with a smaller side lose what they gain: GPT-2's widths (768) ran slower end to end, and torchao's own filter
# leaves them out (docs/decisions/0030).
SMALLEST = 1024
# An FP8 product must be so many times as fast as BF16, operands included: the model is known to flatter it.
MARGIN = 1.15
# Kernels that make one operand's copies: the largest number, then the copies.
KERNELS = 2
_ASKED = "*"


@dataclass(frozen=True, order=True)
class Copy:
    """An operand's FP8 copy: of which value ("y:gradient" is what arrives for y), transposed or as it lies."""

    value: str
    transposed: bool


@dataclass(frozen=True)
class Sizes:
    """A linear layer's: rows of the input, its columns, columns of the result."""

    rows: int
    inner: int
    outer: int


def copies(node: Node) -> dict[str, tuple[Copy, Copy]]:
    """The two operands of each pass of a linear layer."""
    given, weight = node.inputs[0], node.inputs[1]
    gradient = f"{node.outputs[0]}:gradient"
    return {
        "output": (Copy(given, False), Copy(weight, False)),
        "grad_input": (Copy(gradient, False), Copy(weight, True)),
        "grad_weight": (Copy(gradient, True), Copy(given, True)),
    }


def form(copy: Copy, recipe: str) -> str:
    """The format of a copy."""
    wide = copy.value.endswith(":gradient") and recipe == "tensorwise"
    return "float8_e5m2" if wide else "float8_e4m3fn"


def sizes(graph: PrecisionGraph, node: Node) -> Sizes:
    given, weight = graph.values[node.inputs[0]], graph.values[node.inputs[1]]
    outer, inner = (one if isinstance(one, int) else 1 for one in weight.shape)
    return Sizes(given.numel // max(inner, 1), inner, outer)


def impossible(graph: PrecisionGraph, node: Node, step: str = "output") -> str:
    """Why a pass of this node can read no FP8, whoever asks for it; "" where it can."""
    if node.op != LINEAR or len(node.slots) < 2 or tuple(node.slots[:2]) != (0, 1):
        return "only linear layers read FP8"
    given, weight = (graph.values[uncast(graph, name)] for name in node.inputs[:2])
    if weight.role != "parameter" or len(weight.shape) != 2 or not given.shape:
        return "its second operand is no weight of two dimensions"
    if any(not isinstance(size, int) or size % UNIT for size in weight.shape):
        return f"its weight is {_times(weight)}: FP8 kernels need multiples of {UNIT}"
    if given.alias or weight.alias:
        return "what it reads shares storage that someone writes"
    if given.origin in ("full", "row"):
        return "its input holds digits that no rounding has touched yet"
    rows = given.shape[:-1]
    if step == "grad_weight" and (any(not isinstance(size, int) for size in rows) or _product(rows) % UNIT):
        return f"its input has {_times(given)} elements: the sum over rows needs multiples of {UNIT}, known beforehand"
    return ""


def uncast(graph: PrecisionGraph, name: str) -> str:
    """The value that our casts above `name` read."""
    node = graph.producer(name)
    while node is not None and node.is_cast:
        name = node.inputs[0]
        node = graph.producer(name)
    return name


def _times(value: Value) -> str:
    return " x ".join(map(str, value.shape))


def _product(shape: Iterable[int | str]) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total


def ends(graph: PrecisionGraph) -> dict[str, str]:
    """Node -> why it stays BF16 unless asked for: outside of the model's numbered blocks, in the first, or in the last."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    layers = [node for node in graph if node.op == LINEAR]
    for node in layers:
        if place := _block(node.module):
            found[place[0]].add(place[1])
    return {node.id: why for node in layers if (why := _end(node, found))}


_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def _block(module: str) -> tuple[str, int] | None:
    """ "decoder.layers.3.fc1" -> ("decoder.layers", 3)."""
    match = _NUMBER.search(module)
    return (module[: match.start()], int(match[1])) if match else None


def _end(node: Node, found: dict[str, set[int]]) -> str:
    if "router" in node.module.split("."):
        return "a router: what it decides does not bear coarser numbers"
    place = _block(node.module)
    if place is None:
        return "outside of the model's blocks, where heads and stems are"
    numbers = found[place[0]]
    if place[1] == min(numbers):
        return "in the first block"
    return "in the last block" if place[1] == max(numbers) else ""


def small(size: Sizes) -> str:
    """Why a layer is too small by evidence, not by price; "" where it is not."""
    if min(size.inner, size.outer) < SMALLEST:
        return f"{size.inner} x {size.outer} is below {SMALLEST}, where FP8 loses end to end"
    return ""


@dataclass
class Prices:
    """Seconds of FP8 and BF16 products, and of FP8 copies, on one device.

    A copy's price is what it takes to make it: the largest number (2 bytes read), which both layouts share, then the
    layout (2 bytes read once for both, 1 written for each).
    """

    graph: PrecisionGraph
    device: Device
    recipe: str
    low: str = "bf16"
    margin: float = MARGIN
    _sizes: dict[str, int] = field(default_factory=dict)

    @property
    def available(self) -> bool:
        return bool(self.device.fp8.get(self.recipe))

    def gain(self, node: Node) -> float:
        """Seconds that one pass saves in FP8, its copies apart, after the margin."""
        rate = self.device.fp8.get(self.recipe, 0.0)
        return self.bf16(node) - self.margin * node.flops / rate if rate else 0.0

    def bf16(self, node: Node) -> float:
        """Seconds of one pass in the low type."""
        return node.flops / self.device.rate(self.low, node.kind)

    def fp8(self, node: Node) -> float:
        """Seconds of one pass in FP8, its copies apart; infinite where the device has none."""
        rate = self.device.fp8.get(self.recipe, 0.0)
        return node.flops / rate if rate else float("inf")

    def look(self, value: str) -> float:
        """Seconds to find an operand's largest number and to read it for its copies, after the margin."""
        return self.margin * (4 * self._elements(value) / self._speed() + KERNELS * self.device.launch)

    def write(self, copy: Copy) -> float:
        """Seconds to write one copy, after the margin."""
        return self.margin * self._elements(copy.value) / self._speed()

    def kept(self, value: str) -> float:
        """Seconds that go with the bytes saved where the backward keeps an input in FP8 alone."""
        return 2 * self._elements(value) / self.device.bandwidth

    def _speed(self) -> float:
        return self.device.quantise or self.device.bandwidth

    def _elements(self, value: str) -> int:
        return self.graph.values[value.removesuffix(":gradient")].numel


def plan_cost(
    graph: PrecisionGraph, prices: Prices, saves: frozenset[str] = frozenset(), steps: Iterable[str] = PASSES
) -> float:
    """Seconds that the FP8 reads of a decided graph add to its cost (below zero: what they save), of some passes or all.

    `saves` are the kinds of which the backward reads what they read.
    """
    total, made = 0.0, set[Copy]()
    for node in graph:
        counted = [step for step in steps if step in node.fp8]
        total -= prices.gain(node) * len(counted)
        made.update(copy for step in counted for copy in copies(node)[step])
    total += sum(prices.look(value) for value in sorted({copy.value for copy in made}))
    total += sum(map(prices.write, sorted(made)))
    readers = graph.readers() if "grad_weight" in steps else {}
    for value in sorted({node.inputs[0] for node in graph if "grad_weight" in node.fp8 and readers}):
        if all("grad_weight" in node.fp8 for node in readers[value] if node.kind in saves):
            total -= prices.kept(value)
    return total


@dataclass(frozen=True, slots=True)
class Read:
    """How one pass of a linear layer reads one operand.

    Fields:
      step: "output", "grad_input" or "grad_weight".
      operand: "input", "weight" or "gradient"; value: its name (of a gradient: that of the value it belongs to).
      format: "float8_e4m3fn", "float8_e5m2", or the low type.
      transposed: from a copy in the other layout.
      scale: "tensorwise" or "rowwise"; "" without FP8.
      seconds: of the product in the low type, and in FP8 with copies that nothing else reads (None: no FP8 there).
    """

    step: str
    operand: str
    value: str
    format: str
    transposed: bool
    scale: str
    reason: str
    seconds_low: float
    seconds_fp8: float | None


def reads(graph: PrecisionGraph, node: Node, prices: Prices, ends: dict[str, str]) -> list[Read]:
    """Every operand of each product of a low linear layer, and why it is read so; nothing for other nodes."""
    if node.op != LINEAR or node.precision != prices.low or len(node.inputs) < 2:
        return []
    found = []
    for step, pair in copies(node).items():
        alone = sum(prices.look(one.value) + prices.write(one) for one in pair)
        fast = prices.fp8(node) + alone if prices.available else None
        why = node.fp8.get(step) or _why_not(graph, node, step, prices, ends)
        for one in pair:
            value = one.value.removesuffix(":gradient")
            what = "gradient" if value != one.value else "input" if value == node.inputs[0] else "weight"
            narrow = step in node.fp8
            kind = form(one, prices.recipe) if narrow else prices.low
            scale = prices.recipe if narrow else ""
            turned = one.transposed and narrow
            found.append(Read(step, what, uncast(graph, value), kind, turned, scale, why, prices.bf16(node), fast))
    return found


def _why_not(graph: PrecisionGraph, node: Node, step: str, prices: Prices, ends: dict[str, str]) -> str:
    if why := impossible(graph, node, step) or ends.get(node.id, ""):
        return why
    if not prices.available:
        return f"the device {prices.device.name} has no FP8 products"
    return small(sizes(graph, node)) or "its copies cost more than the product saves"


def asked(node: Node) -> str:
    """The override that asks for FP8 here; "" for none."""
    return node.fp8.get(_ASKED, "")


def ask(node: Node, reason: str) -> None:
    node.fp8 = {_ASKED: reason}


def layers(graph: PrecisionGraph) -> Iterator[Node]:
    """The nodes that read something in FP8."""
    return (node for node in graph if node.fp8 and node.precision in LOW)
