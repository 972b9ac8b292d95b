"""The range of a node's result, where the ranges of what it reads are known: sound, and as wide as it has to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from mpcompile.formats import LARGEST, SIGNIFICAND_BITS, SMALLEST_NORMAL
from mpcompile.graph import Node
from mpcompile.rules.hazards import CASTS, VIEWS, base

Interval = tuple[float, float]


def interval(node: Node, names: list[str], known: Mapping[str, Interval], always: Interval | None) -> Interval | None:
    """(least, greatest) element of the first result, or None.

    Args:
      names: the floating operands of `node`, in order; a tensor may stand there twice.
      known: ranges of values.
      always: what the operation's results are in any case.
    """
    if always is not None:
        return always
    fill = _number(node, "fill_value")
    if fill is not None and not names:
        return fill, fill
    given = [known.get(name) for name in names]
    if not given or None in given:
        return None
    found = [one for one in given if one is not None]
    rule = _RULES.get(base(node.op))
    result = rule(node, found) if rule is not None else None
    return None if result is None or any(map(math.isnan, result)) else result


def exact_in(known: Interval, low: str) -> bool:
    """True when all elements are one number, which the low type holds."""
    least, most = known
    if least != most or math.isinf(least):
        return least == most  # an infinity is one in every type
    mantissa, _ = math.frexp(least)
    scaled = mantissa * 2.0 ** SIGNIFICAND_BITS[low]
    return abs(least) <= LARGEST[low] and scaled == int(scaled) and (least == 0 or abs(least) >= SMALLEST_NORMAL[low])


def _number(node: Node, name: str) -> float | None:
    found = node.attrs.get(name)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _second(node: Node, given: list[Interval]) -> Interval | None:
    """The second operand: a tensor's range, or a number."""
    if len(given) > 1:
        return given[1]
    other = _number(node, "other")
    return None if other is None else (other, other)


def _hull(node: Node, given: list[Interval]) -> Interval | None:
    value = _number(node, "value")
    ends = given if value is None else [*given, (value, value)]
    return min(one[0] for one in ends), max(one[1] for one in ends)


def _pad(node: Node, given: list[Interval]) -> Interval | None:
    least, most = _hull(node, given) or (0.0, 0.0)
    return min(least, 0.0), max(most, 0.0)


def _corners(a: Interval, b: Interval, combine: Callable[[float, float], float]) -> Interval:
    ends = [combine(x, y) for x in a for y in b]
    return (math.nan, math.nan) if any(map(math.isnan, ends)) else (min(ends), max(ends))


def _mul(node: Node, given: list[Interval]) -> Interval | None:
    second = _second(node, given)
    return None if second is None else _corners(given[0], second, lambda x, y: 0.0 if 0.0 in (x, y) else x * y)


def _div(node: Node, given: list[Interval]) -> Interval | None:
    second = _second(node, given)
    if second is None or second[0] <= 0.0 <= second[1] or node.attrs.get("rounding_mode"):
        return None
    return _corners(given[0], second, lambda x, y: x / y)


def _add(node: Node, given: list[Interval]) -> Interval | None:
    second = _second(node, given)
    if second is None:
        return None
    factor = node.attrs.get("alpha", 1)
    if not isinstance(factor, (int, float)):
        return None
    name, ends = base(node.op), [factor * end for end in second]
    if name == "rsub":
        return min(ends) - given[0][1] * 1, max(ends) - given[0][0]
    if name in ("sub", "subtract"):
        return given[0][0] - max(ends), given[0][1] - min(ends)
    return given[0][0] + min(ends), given[0][1] + max(ends)


def _neg(node: Node, given: list[Interval]) -> Interval:
    return -given[0][1], -given[0][0]


def _abs(node: Node, given: list[Interval]) -> Interval:
    least, most = given[0]
    sizes = abs(least), abs(most)
    return (0.0 if least <= 0.0 <= most else min(sizes)), max(sizes)


def _clamp(node: Node, given: list[Interval]) -> Interval | None:
    if len(given) > 1:
        return None
    least, most = given[0]
    floor, ceiling = _number(node, "min"), _number(node, "max")
    if floor is not None:
        least, most = max(least, floor), max(most, floor)
    if ceiling is not None:
        least, most = min(least, ceiling), min(most, ceiling)
    return least, most


def _relu(node: Node, given: list[Interval]) -> Interval:
    return max(given[0][0], 0.0), max(given[0][1], 0.0)


def _floor(node: Node, given: list[Interval]) -> Interval | None:
    ends = given[0]
    return (math.floor(ends[0]), math.floor(ends[1])) if all(map(math.isfinite, ends)) else None


def _whole(node: Node, given: list[Interval]) -> Interval | None:
    least, most = given[0]
    return (math.floor(least), math.ceil(most)) if math.isfinite(least) and math.isfinite(most) else None


_RULES: dict[str, Callable[[Node, list[Interval]], Interval | None]] = {
    **dict.fromkeys(VIEWS | CASTS | {"cat", "concat", "stack", "where", "masked_fill", "embedding", "repeat", "tile", "roll",
                                     "flip", "index_select", "meshgrid", "broadcast_tensors", "amax", "amin", "copy"}, _hull),
    **dict.fromkeys(("pad", "constant_pad_nd", "tril", "triu", "trilu", "expand_dims"), _pad),
    **dict.fromkeys(("mul", "multiply"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide"), _div),
    **dict.fromkeys(("add", "sub", "subtract", "rsub"), _add),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("ceil", "round", "trunc"), _whole),
    "floor": _floor,
    "neg": _neg,
    "abs": _abs,
    "relu": _relu,
}  # fmt: skip
