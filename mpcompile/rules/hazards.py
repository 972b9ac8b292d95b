"""The static hazards: one row each, and the small tests that the rows name.

A hazard starts at a node (`starts` gives the reason, or "") and travels with the node's value: through nodes named in
`carries`, to nodes named in `ends`.  All of them must be FP32, since a cast in between would lose what FP32 saved.
A row with `only_if_ended` says nothing until an end is reached: a product by 3 matters in front of a softmax, and
nowhere else.

Operations are compared by base name, so that one row serves every front end: "aten.masked_fill.Scalar" is
"masked_fill", "aten._softmax.default" is "softmax", "onnx::ReduceMean" is "reducemean".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from mpcompile.formats import LARGEST, SIGNIFICAND_BITS, SMALLEST_NORMAL
from mpcompile.graph import Node, PrecisionGraph, Value

NO_BOUND = 3.4e38  # clip(x, max=FLT_MAX): no bound is meant
DEEP = 4096  # terms of a reduction from where its FP32 result is a rounding error in bytes

SQUARES = frozenset({"mul", "square", "pow"})
REDUCTIONS = frozenset({"sum", "mean", "reducesum", "reducemean", "nansum"})
SPREADS = frozenset({"var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "reducel1", "reducel2",
                     "reducesumsquare", "reducelogsumexp"})  # fmt: skip
SCANS = frozenset({"cumsum", "cumprod"})
VIEWS = frozenset(
    {
        "view",
        "reshape",
        "expand",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "permute",
        "transpose",
        "t",
        "narrow",
        "expand_as",
        "broadcast_to",
        "flatten",
        "unflatten",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "identity",
        "lift_fresh_copy",
        "index",
        "gather",
        "split",
        "chunk",
        "unbind",
    }
)
CASTS = frozenset({"to", "to_copy", "cast", "convert_element_type", "type_as"})
THROUGH = VIEWS | CASTS  # fmt: skip
ADDS = frozenset({"add", "sub", "rsub"})
BOUNDS = frozenset({"clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "max", "min"})
SELECTS = frozenset({"where", "masked_fill", "cat", "concat", "stack", "pad", "constant_pad_nd", "triu", "tril"})
FILLS = frozenset({"full", "full_like", "new_full", "fill", "scalar_tensor", "threshold"})
SOFTMAXES = frozenset({"softmax", "log_softmax", "logsoftmax", "safe_softmax", "logsumexp"})
ROOTS = frozenset({"sqrt", "rsqrt", "pow", "reciprocal"})
ARITHMETIC = ADDS | BOUNDS | {"mul", "div", "true_divide", "pow", "log", "log2", "exp", "exp2", "neg", "abs", "sqrt",
                              "reciprocal", "fmod", "remainder", "mod"}  # fmt: skip
BOUNDED = frozenset({"exp", "sigmoid", "tanh"})
PRODUCTS = frozenset({"matmul", "mm", "bmm", "einsum", "outer", "ger"})
ROUNDINGS = frozenset({"floor", "ceil", "round", "trunc", "sin", "cos"})


# One row becomes many, or stands among others.
SPREAD = VIEWS | {"repeat", "tile"}
PLACED = frozenset({"cat", "concat", "stack"})
NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "native_layer_norm", "native_group_norm", "instance_norm"})
# A norm gives the gradient of a row back divided by the row's size: of smaller ones, FP16 holds no gradient at a scale of 65,536.
SMALL = 2.0**-6
MASK_SLOT = 3  # where an attention has its additive mask

# Arguments whose numbers are none that the operation computes with.
NO_NUMBERS = frozenset({"dim", "alpha", "dtype", "axis", "keepdim", "to"})


def _is_number(item: object) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool)


@cache
def base(op: str) -> str:
    """The name of an operation without front end, overload and decoration."""
    if "::" in op:
        return op.rpartition("::")[2].lower()
    parts = op.split(".")
    return (parts[1] if len(parts) > 1 else op).strip("_").lower()


@dataclass
class Facts:
    """What the tests may ask of the graph."""

    graph: PrecisionGraph
    low: str
    # Parameters of which no element is larger than `SMALL`.
    small: frozenset[str] = frozenset()
    # The node whose numbers were asked for last, and they: each row that may start at a node asks.
    _asked: tuple[Node | None, list[float]] = field(default=(None, []))

    def values(self, node: Node) -> list[Value]:
        return [self.graph.values[name] for name in node.inputs]

    def numbers(self, node: Node) -> list[float]:
        """Scalar arguments of `node`, and the ends of the ranges of its constant operands."""
        if self._asked[0] is not node:
            found = [float(item) for key, item in node.attrs.items() if key not in NO_NUMBERS and _is_number(item)]
            for value in self.values(node):
                if value.range is not None and value.castable:
                    found += value.range
            self._asked = node, found
        return self._asked[1]

    def behind(self, name: str) -> Node | None:
        """The node that computes `name`, looking through views and casts."""
        node = self.graph.producer(name)
        for _ in range(8):
            if node is None or not node.inputs or not (node.is_cast or base(node.op) in THROUGH):
                break
            node = self.graph.producer(node.inputs[0])
        return node

    def source(self, name: str) -> str:
        """The value of which `name` is a view (or itself)."""
        while (node := self.graph.producer(name)) is not None and len(node.inputs) == 1 and base(node.op) in SPREAD:
            name = node.inputs[0]
        return name

    def depth(self, node: Node) -> int:
        """How many terms each result of a reduction has; for a scan, the length of its axis."""
        if not node.inputs or not node.outputs:
            return 0
        source = self.graph.values[node.inputs[0]]
        if base(node.op) not in SCANS:
            return source.numel // max(1, self.graph.values[node.outputs[0]].numel)
        sizes, axis = source.shape, node.attrs.get("dim", node.attrs.get("axis"))
        if isinstance(axis, int) and -len(sizes) <= axis < len(sizes):
            sizes = (sizes[axis],)
        return max((s for s in sizes if isinstance(s, int)), default=source.numel)


# ---------------------------------------------------------------------------------------------- where a hazard starts


def out_of_range(facts: Facts, node: Node) -> str:
    limit, bounds = LARGEST[facts.low], base(node.op) in BOUNDS
    for number in facts.numbers(node):
        size = abs(number)
        if limit < size < math.inf and not (bounds and size >= NO_BOUND):
            return f"{number:.4g} is beyond {facts.low}'s largest number, {limit:.6g}"
    return ""


def beyond(value: Value, low: str) -> str:
    """Why a parameter, buffer or constant of known range is no tensor of the low type; "" where it is one."""
    if value.range is None or not value.castable:
        return ""
    number = max((end for end in value.range if math.isfinite(end)), key=abs, default=0.0)
    # What rounds to the largest number is one of the type.
    if abs(number) < LARGEST[low] * (1 + 2.0 ** -(SIGNIFICAND_BITS[low] + 1)):
        return ""
    what = f"{number:.4g} is" if value.role == "constant" else f"{value.role} {value.name!r} reaches {number:.4g},"
    return f"{what} beyond {low}'s largest number, {LARGEST[low]:.6g}"


def square(facts: Facts, node: Node) -> str:
    return "x * x overflows fp16 from |x| > 255" if is_square(facts, node) else ""


def is_square(facts: Facts, node: Node | None) -> bool:
    if node is None or base(node.op) not in SQUARES:
        return False
    if base(node.op) == "mul":
        return len(node.inputs) == 2 and node.inputs[0] == node.inputs[1]
    if base(node.op) == "square":
        return True
    raised = bool(node.slots) and node.slots[0] == 0 and facts.values(node)[0].range is None
    return raised and set(facts.numbers(node)) == {2.0}


def mean_of_squares(facts: Facts, node: Node) -> str:
    if not node.inputs or not is_square(facts, facts.behind(node.inputs[0])):
        return ""
    return f"a hand-written norm: {SIGNIFICAND_BITS[facts.low]} bits of a mean of squares would scale a whole row"


def tiny_number(facts: Facts, node: Node) -> str:
    limit = SMALLEST_NORMAL[facts.low]
    tiny = next((n for n in facts.numbers(node) if 0 < abs(n) < limit), None)
    return "" if tiny is None else f"{tiny:.4g} is below {facts.low}'s smallest normal number, {limit:.2g}"


def grows(facts: Facts, node: Node) -> str:
    """An exponential, a product over an axis, or a power above 1: what reads its result in fp16 may read infinity."""
    name = base(node.op)
    if name == "pow":
        powers = set(facts.numbers(node))
        if powers and all(abs(power) <= 1 for power in powers):
            return ""
    return _may_overflow(name, facts.low)


@cache
def _may_overflow(name: str, low: str) -> str:
    return f"the result of {name} may be beyond {low}'s largest number, {LARGEST[low]:.6g}"


def rounds_to_one(facts: Facts, node: Node) -> str:
    step = 2.0 ** -(SIGNIFICAND_BITS[facts.low] + 1)
    near = next((n for n in facts.numbers(node) if 0 < 1 - abs(n) <= step), None)
    return "" if near is None else f"the bound {near!r} is 1 in {facts.low}"


def deep_reduction(facts: Facts, node: Node) -> str:
    terms = facts.depth(node)
    return f"a reduction of {terms} terms, whose fp32 result is small" if terms >= DEEP else ""


def long_scan(facts: Facts, node: Node) -> str:
    exact, terms = 2 ** SIGNIFICAND_BITS[facts.low], facts.depth(node)
    return f"a running total over {terms} terms; {facts.low} counts to {exact}" if terms > exact else ""


def scaled_up(facts: Facts, node: Node) -> str:
    """A product by more than 1, a quotient by less, or a product by an exponential."""
    name = base(node.op)
    for number in facts.numbers(node):
        factor = number if name == "mul" else 1 / number if number else 0.0
        if abs(factor) > 1:
            return f"logits are scaled up by {abs(factor):.4g}, and fp16's rounding with them"
    learned = name == "mul" and any(_is_exponential(facts.behind(n)) for n in node.inputs)
    return "logits are scaled up by an exponential, and fp16's rounding with them" if learned else ""


def _is_exponential(node: Node | None) -> bool:
    return node is not None and base(node.op) in ("exp", "exp2", "softplus")


def float_index(facts: Facts, node: Node) -> str:
    """Integers turned into floats: an arange of floats, or a cast of an integer (a bool is a mask, not a number)."""
    if not node.outputs or not facts.graph.values[node.outputs[0]].castable:
        return ""
    from_integer = base(node.op) not in CASTS or "int" in facts.values(node)[0].dtype
    exact = 2 ** SIGNIFICAND_BITS[facts.low]
    return f"index arithmetic in floats; {facts.low} counts to {exact}" if from_integer else ""


def small_rows(facts: Facts, node: Node) -> str:
    """Rows of a parameter near zero (a class token, latents) among others, which a norm may read."""
    found = next((name for name in map(facts.source, node.inputs) if name in facts.small), None)
    if found is None:
        return ""
    return f"parameter {found!r} is at most {SMALL:g} large, and what a norm gives back to such rows leaves {facts.low}'s range"


# --------------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True, eq=False)
class Hazard:
    """One row.

    Fields:
      low: the low types that it applies to.
      at, starts: base names of the operations where it may start, and the test that says why it does ("": it does not).
      carries: base names through which it travels; `ends`: those that need FP32 too, and where it stops.
      only_if_ended: nothing is raised unless an end is reached.
      shrinks: it does not travel to values larger than it started with.
      range: it is about numbers too large or too small for the low type, not about digits: what it raises to FP32 carries
        the roundings of what it reads, as in the low type (`mpcompile.origins`).
      rows: it travels through sums only where every other operand is a parameter near zero, or hazardous too.
      alone: it travels only where every other operand is made of constants and buffers, or hazardous too.
    """

    name: str
    low: tuple[str, ...]
    at: frozenset[str]
    starts: Callable[[Facts, Node], str]
    carries: frozenset[str] = frozenset()
    ends: frozenset[str] = frozenset()
    only_if_ended: bool = False
    shrinks: bool = False
    alone: bool = False
    range: bool = False
    rows: bool = False


FP16, BOTH = ("fp16",), ("fp16", "bf16")
DIVISIONS = ROOTS | {"div", "true_divide", "log", "log2", "log1p", "log10"}
COUNTS = frozenset({"arange", "range", "linspace"}) | CASTS

HAZARDS = (
    Hazard("out-of-range", BOTH, ARITHMETIC | SELECTS | FILLS, out_of_range,
           ADDS | SELECTS | THROUGH | {"mul", "neg", "maximum", "minimum"}, SOFTMAXES | BOUNDED,
           range=True),
    Hazard("square", FP16, SQUARES, square, THROUGH, REDUCTIONS, only_if_ended=True, range=True),
    Hazard("mean-of-squares", BOTH, REDUCTIONS, mean_of_squares,
           ADDS | BOUNDS | THROUGH | {"div", "mul"}, ROOTS, shrinks=True),
    Hazard("wide-result", FP16, frozenset({"exp", "exp2", "expm1", "pow", "cosh", "sinh", "prod", "cumprod"}), grows,
           ADDS | SELECTS | THROUGH | {"mul", "div", "true_divide", "neg", "abs", "sqrt", "maximum", "minimum"}, SOFTMAXES,
           range=True),
    Hazard("tiny-number", FP16, ADDS | BOUNDS, tiny_number, THROUGH | ADDS, DIVISIONS, only_if_ended=True, range=True),
    Hazard("rounds-to-one", BOTH, BOUNDS, rounds_to_one, THROUGH | ADDS | {"neg"}, DIVISIONS, only_if_ended=True),
    Hazard("deep-reduction", BOTH, REDUCTIONS | SPREADS, deep_reduction),
    Hazard("long-scan", BOTH, SCANS, long_scan),
    Hazard("scaled-logits", FP16, frozenset({"mul", "div"}), scaled_up,
           ADDS | SELECTS | THROUGH, SOFTMAXES, only_if_ended=True, shrinks=True),
    Hazard("small-rows", FP16, SPREAD | PLACED, small_rows, SPREAD | PLACED | ADDS | CASTS | {"dropout"},
           NORMS | SQUARES - {"mul"}, only_if_ended=True, range=True, rows=True),
    Hazard("float-index", BOTH, COUNTS, float_index,
           ARITHMETIC | SELECTS | THROUGH | PRODUCTS | SCANS | REDUCTIONS, ROUNDINGS, alone=True),
)  # fmt: skip
OUT_OF_RANGE = next(row for row in HAZARDS if row.name == "out-of-range")
