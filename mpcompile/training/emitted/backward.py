"""Verdicts of the backward's own: what adds up gradients, and what a gradient's arithmetic is for."""

from __future__ import annotations

from mpcompile.formats import LOW
from mpcompile.graph import DecidedBy, Node, PrecisionGraph, Verdict
from mpcompile.rules.hazards import base

JOINS = "joins gradients, in the precision that they arrive in"
_UP = "FP32 adds up gradients"
# Operation that adds up gradients -> of what; by its bare name.
_SUMS = {
    "sum": "over broadcast dimensions",
    "embedding_dense_backward": "of rows that are looked up more than once",
    "index_put": "of elements that an index repeats",
    "unsafe_index_put": "of elements that an index repeats",
    "index_add": "of rows that an index repeats",
    "scatter_add": "of elements that an index repeats",
    "scatter_reduce": "of elements that an index repeats",
    "index_select_backward": "of rows that an index repeats",
    "add": "of several uses of one value",
}
# They add up in FP32 inside, in every kernel of torch's, and round the result once.
_INSIDE = frozenset({"sum"})


def of_sum(graph: PrecisionGraph, node: Node) -> tuple[Verdict, str] | None:
    """Verdict and reason of an operation of the backward that adds up gradients; None for any other one."""
    what = _SUMS.get(base(node.op))
    if what is None or not graph.has_float_results(node) or (base(node.op) == "add" and len(node.inputs) < 2):
        return None
    if node.precision not in LOW:
        return "fp32", f"{_UP} {what}"
    if base(node.op) in _INSIDE:
        return (
            "propagate",
            f"{_UP} {what} inside the kernel, and its readers, which are low, get one rounding of the sum",
        )
    if base(node.op).startswith("add"):
        return "propagate", f"adds up gradients {what}, in the type of that value, as autograd gives them"
    return "propagate", f"adds up gradients {what}, low because the value's own lookup was made low"


def of_gradient(node: Node, name: str, planned: Node) -> tuple[Verdict, str]:
    """Verdict and reason of what computes a gradient of the plan's node `name`: that node's, where the precision is."""
    if node.precision not in ("keep", planned.precision):
        way = "low" if node.precision in LOW else "FP32"
        return "propagate", f"gradient of {name}: {way}, as the gradients that it reads and gives are"
    return planned.verdict or "propagate", f"gradient of {name}: {planned.reason}"


def of_window(node: Node) -> tuple[Verdict, str, DecidedBy]:
    """Verdict, reason and decider of what adds a microbatch's gradient to its window's sum."""
    if node.precision in LOW:
        return (
            "low",
            f"grads=low: the sum of the microbatches' gradients rounds once per microbatch, in {node.precision}",
            "override",
        )
    return "fp32", f"{_UP} of the microbatches of a window", "rule"


__all__ = ["JOINS", "of_gradient", "of_sum", "of_window"]
