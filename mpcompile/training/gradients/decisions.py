"""What Python decides by the batch: ``if labels.max() >= n``. The answer is part of what a graph is for, and asked at each call.

A trace runs Python once, so the way that it takes at a branch is in the graph for good.  A tensor that Python asks for
its truth is traced back: where it follows from the batch's tensors alone, a `Decision` holds the operations that give it
and the answer, and the graph is run for batches of the same answers only.  On a GPU the step waits for them, as plain
torch does.  What follows from weights is not known before the step runs: torch refuses it, and MP101 says so.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode

from mpcompile.aten.capture import outside_torch
from mpcompile.aten.graphs import shown_by
from mpcompile.errors import CaptureError
from mpcompile.torch_internals.operators import schema_of
from mpcompile.torch_internals.tensors import FakeTensor, outside_of_modes

_ATEN = torch.ops.aten
_COMPARISONS: dict[Any, Any] = {
    _ATEN.lt.Scalar: operator.lt,
    _ATEN.le.Scalar: operator.le,
    _ATEN.gt.Scalar: operator.gt,
    _ATEN.ge.Scalar: operator.ge,
}
# The least and the largest number that `torch.rand` draws.
_DRAWN = (0.0, 1.0 - 2.0**-24)


@dataclass(frozen=True)
class Decision:
    """One question that the program asked of the batch.

    Fields:
      asked: tensors of the batch -> bool [].
      numbers: which of the batch's tensors it reads.
      answer: what it was in the capture.
    """

    asked: fx.GraphModule
    numbers: tuple[int, ...]
    answer: bool

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """True when a batch gives the same answer."""
        return self.of(tensors) == self.answer

    def of(self, tensors: Sequence[Tensor]) -> bool:
        with torch.no_grad():
            return bool(self.asked(*(tensors[number] for number in self.numbers)))


@dataclass
class _Asking:
    """A capture at work: the batch, its stand-ins in the trace, and what was asked so far."""

    tensors: Sequence[Tensor]
    fakes: Sequence[Tensor]
    found: list[Decision]


class _Here(threading.local):
    asking: _Asking | None = None


_HERE = _Here()


@contextlib.contextmanager
def decided(tensors: Sequence[Tensor]) -> Iterator[list[Decision]]:
    """While active in this thread, what a capture for this batch asks of it is answered, and noted in the list."""
    before, _HERE.asking = _HERE.asking, _Asking(tensors, (), [])
    try:
        with _Questions():
            yield _HERE.asking.found
    finally:
        _HERE.asking = before


def traced_as(fakes: Sequence[Tensor]) -> None:
    """The trace begins: these stand for the batch's tensors."""
    if _HERE.asking is not None:
        _HERE.asking.fakes = fakes


class _Questions(TorchFunctionMode):
    """Answers `bool(tensor)`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asking, mode = _HERE.asking, proxy_tensor.get_proxy_mode()
        if func is not Tensor.__bool__ or asking is None or mode is None or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        answer = _answer(asking, mode.tracer, args[0])
        return func(*args) if answer is None else answer


def _answer(asking: _Asking, tracer: Any, tensor: Tensor) -> bool | None:
    node = _node_of(tracer, tensor)
    if node is None:
        return None
    settled = _settled(node)
    if settled is not None:
        return settled
    needed = _needed(node)
    if any(_is_drawn(one) for one in needed):
        raise _of_a_draw()
    places = {_node_of(tracer, fake): number for number, fake in enumerate(asking.fakes)}
    if not all(one in places or _is_pure(one) for one in needed) or not _roots(needed).isdisjoint(_written(node.graph)):
        return None
    decision = _decision(node, needed, places, asking.tensors)
    asking.found.append(decision)
    return decision.answer


def _node_of(tracer: Any, tensor: Tensor) -> fx.Node | None:
    node: fx.Node | None = getattr(tracer.unwrap_proxy(tensor), "node", None)
    return node


def _needed(node: fx.Node) -> set[fx.Node]:
    """The node and all that it follows from."""
    found, left = set[fx.Node](), [node]
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left += one.all_input_nodes
    return found


def _decision(node: fx.Node, needed: set[fx.Node], places: dict[Any, int], tensors: Sequence[Tensor]) -> Decision:
    graph, copies, numbers = fx.Graph(), dict[fx.Node, fx.Node](), list[int]()
    # The batch's tensors first: fx wants its placeholders in front.
    for one in (n for n in node.graph.nodes if n in needed and n in places):
        copies[one] = graph.placeholder(one.name)
        numbers.append(places[one])
    for one in (n for n in node.graph.nodes if n in needed and n not in places):
        copies[one] = graph.node_copy(one, copies.__getitem__)
    graph.output(copies[node])
    made = Decision(fx.GraphModule({}, graph), tuple(numbers), answer=True)
    with outside_of_modes():
        return replace(made, answer=made.of(tensors))


def _settled(node: fx.Node) -> bool | None:
    """The truth of ``torch.rand([]) < c`` where no draw would change it (a layer that is dropped with probability 0)."""
    compare = _COMPARISONS.get(node.target)
    if compare is None or len(node.args) < 2:
        return None
    drawn, limit = node.args[:2]
    if not isinstance(drawn, fx.Node) or drawn.target is not _ATEN.rand.default or not isinstance(limit, (int, float)):
        return None
    answers = {compare(end, limit) for end in _DRAWN}
    return bool(answers.pop()) if len(answers) == 1 else None


def _schema(node: fx.Node) -> Any:
    return schema_of(node.target)


def _is_drawn(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_pure(node: fx.Node) -> bool:
    """An operation of torch's that can be made again from its operands alone."""
    if node.op != "call_function":
        return False
    schema = _schema(node)
    if schema is None:
        return getattr(node.target, "__module__", "") in ("_operator", "math")
    return not schema.is_mutable and not schema.name.startswith("mpcompile::")


def _roots(nodes: set[fx.Node]) -> set[fx.Node]:
    return set(map(shown_by, nodes))


def _written(graph: fx.Graph) -> set[fx.Node]:
    """What the program wrote to so far: asked again, it would be read as it was before."""
    found = set[fx.Node]()
    for node in graph.nodes:
        schema = _schema(node)
        if schema is None or not schema.is_mutable:
            continue
        for place, one in enumerate(schema.arguments):
            if one.alias_info is not None and one.alias_info.is_write:
                given = node.args[place] if place < len(node.args) else node.kwargs.get(one.name)
                fx.node.map_arg(given, lambda n: found.add(shown_by(n)))
    return found


def _of_a_draw() -> CaptureError:
    return CaptureError(
        "MP101", "a random draw decides which way the forward goes", where=outside_torch(traceback.extract_stack()),
        why="a layer that is dropped at random is another graph in each call",
        try_="drop no layers (layerdrop = 0.0 in the model's configuration); or the drop-in way: loss = mp(...); "
        "loss.backward()",
    )  # fmt: skip


__all__ = ["Decision", "decided", "traced_as"]
