"""Multiply-adds of products, from the shapes of the trace: the formulas that rows of `rules/aten.toml` name.

A product without a formula is bound to the low type whatever it costs; one with a formula is priced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mpcompile.aten.facts import hint, op_name
from mpcompile.rules import rules_for
from mpcompile.torch_internals.operators import schema_of

Sizes = list[int]


def flops(node: fx.Node) -> int:
    """Multiply-adds counted as two; 0 for what is not matrix work, or has no formula."""
    rule = rules_for("aten").get(op_name(node.target))
    if rule is None or rule.flops in ("", "none"):
        return 0
    if rule.flops == "recurrent":
        return _recurrence(node)
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        value = value[0] if isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor) else None
    return int(FORMULAS[rule.flops](_arguments(node), _sizes(value))) if value is not None else 0


def _arguments(node: fx.Node) -> list[Any]:
    """As the schema orders them, wherever they were given."""
    schema: Any = schema_of(node.target)
    later = [node.kwargs.get(a.name) for a in schema.arguments[len(node.args) :]] if schema is not None else []
    return list(map(_given, (*node.args, *later)))


def _given(argument: Any) -> Any:
    """The sizes of a tensor, those of several, or a plain argument as it is."""
    if isinstance(argument, fx.Node):
        return _sizes(argument.meta.get("val"))
    if isinstance(argument, (list, tuple)):
        return [_given(one) for one in argument]
    return _sizes(argument) if isinstance(argument, torch.Tensor) else argument


def _sizes(tensor: Any) -> Sizes:
    return [hint(s) for s in tensor.shape] if isinstance(tensor, torch.Tensor) else []


def _recurrence(node: fx.Node) -> int:
    """Every weight of an LSTM, GRU or RNN, or of one cell, is multiplied with every row of the input."""
    schema: Any = schema_of(node.target)
    given: dict[str, Any] = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    rows = next(iter(given.values())).meta.get("val")
    weights = given.get("params") or [given.get("w_ih"), given.get("w_hh")]
    sizes = [_sizes(w.meta.get("val")) for w in weights if isinstance(w, fx.Node)]
    return 2 * math.prod(_sizes(rows)[:-1]) * sum(math.prod(size) for size in sizes if len(size) == 2)


def _inner(args: list[Any], out: Sizes) -> Any:
    return 2 * math.prod(out) * args[0][-1]


def _elements(args: list[Any], out: Sizes) -> Any:
    return 2 * max(math.prod(args[0]), math.prod(args[1]))


def _linear(args: list[Any], out: Sizes) -> Any:
    return 2 * math.prod(args[0]) * math.prod(args[1][:-1])


def _addmm(args: list[Any], out: Sizes) -> Any:
    return 2 * math.prod(out) * args[1][-1]


def _addmv(args: list[Any], out: Sizes) -> Any:
    return 2 * math.prod(args[1])


def _outer(args: list[Any], out: Sizes) -> Any:
    return 2 * math.prod(out)


def _bilinear(args: list[Any], out: Sizes) -> Any:
    """Of (rows, left), (rows, right), (outputs, left, right)."""
    return 2 * math.prod(args[0][:-1]) * math.prod(args[2])


def _tensordot(args: list[Any], out: Sizes) -> Any:
    return 2 * math.prod(out) * math.prod(args[0][d] for d in args[2])


def _einsum(args: list[Any], out: Sizes) -> Any:
    """Every index once: exact for two operands, and more than a good order of several needs."""
    operands = args[0].partition("->")[0].replace(" ", "").split(",")
    found = dict[str, int]()
    for letters, sizes in zip(operands, args[1], strict=True):
        before, dots, after = letters.partition("...")
        named = (*zip(before, sizes, strict=False), *zip(reversed(after), reversed(sizes), strict=False))
        hidden = [(f"...{i}", n) for i, n in enumerate(reversed(sizes[len(before) : len(sizes) - len(after)]))]
        for letter, size in (*named, *(hidden if dots else ())):
            found[letter] = max(size, found.get(letter, 1))
    return 2 * math.prod(found.values())


def _chain(args: list[Any], out: Sizes) -> Any:
    """From left to right."""
    first, *rest = args[0]
    rows = math.prod(first[:-1])
    return sum(2 * rows * math.prod(each) for each in rest)


def _conv(args: list[Any], out: Sizes) -> Any:
    return 2 * math.prod(out) * math.prod(args[1][1:])


def _conv_transpose(args: list[Any], out: Sizes) -> Any:
    return 2 * math.prod(args[0]) * math.prod(args[1][1:])


def _attention(args: list[Any], out: Sizes) -> Any:
    query, key = args[0], args[1]
    return 4 * math.prod(query) * key[-2]


# Of the arguments as the schema orders them (sizes for tensors) and the sizes of the first result.
FORMULAS: dict[str, Callable[[list[Any], Sizes], Any]] = {
    "inner": _inner,
    "elements": _elements,
    "linear": _linear,
    "addmm": _addmm,
    "addmv": _addmv,
    "outer": _outer,
    "bilinear": _bilinear,
    "tensordot": _tensordot,
    "einsum": _einsum,
    "chain": _chain,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "attention": _attention,
}

__all__ = ["FORMULAS", "flops"]
