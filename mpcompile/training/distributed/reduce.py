"""Gradient collectives as nodes of a graph: a bucket is sent as soon as its last gradient is there, and awaited at the end.

The seed of the backward is divided by the number of ranks, so that the sum over them is the average: nothing is multiplied
for it, and FP16 does not overflow in the sum.  What is not finite on one rank is so in the sum, and so on all: the finite
check, the norm, the clip and the loss scale, which all read the sum, are one decision of all ranks without another word
between them (docs/decisions/0032-ranks-of-a-step.md).
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.aten.graphs import outputs_of
from mpcompile.torch_internals.groups import collectives as _C10D
from mpcompile.torch_internals.tensors import FakeTensor, foreach_copy, pytree
from mpcompile.training.distributed.ranks import Ranks

# Bytes that are sent at once; the first one early, as in DistributedDataParallel.
FIRST, BUCKET = 1 << 20, 25 << 20
# Gradients of fewer bytes travel in one tensor of their bucket.
SMALL = 1 << 18
_ATEN = torch.ops.aten


@dataclass
class Reducer:
    """How gradients are averaged over the ranks.

    Fields:
      ranks: whose.
      low: gradients that are low travel so; else all do in FP32.
      buckets: by (elements, dtype) of the gradients, whose numbers travel together, in the order in which they are sent.
        The first graph settles it: one of another batch size, which only some ranks may have, must send alike.
    """

    ranks: Ranks
    low: bool
    buckets: dict[tuple[Any, ...], list[list[int]]] = field(default_factory=dict)

    def reduce(self, module: fx.GraphModule, grads: Sequence[Sequence[int]], names: Sequence[str], first: int) -> None:
        """Let a graph give the average over the ranks of each gradient, one for each parameter.

        Args:
          grads: per parameter, the positions of its gradients among those that the graph gives; names: whose.
          first: how many outputs stand before the gradients.
        """
        outputs = outputs_of(module)
        given = [[outputs[first + i] for i in part] for part in grads]
        inserter = _Averages(module.graph, self)
        inserter.insert(lambda: inserter.averages(given), outputs[:first])
        module.recompile()

    def in_graph(self, graph: fx.Graph, sums: Sequence[fx.Node], names: Sequence[str]) -> list[fx.Node]:
        """At the end of a graph without an output: the averages of `sums`, in their own dtypes."""
        inserter = _Averages(graph, self)
        found = inserter.averages([[one] for one in sums])
        return [inserter.cast(new, _dtype(old)) for new, old in zip(found, sums, strict=True)]

    def of_sums(self, sums: Sequence[Tensor], names: Sequence[str]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        """What averages the sums of a window in place, one after the other's bytes as in a graph of them."""
        module = as_module(sums, lambda graph, nodes: self.in_graph(graph, nodes, names))

        @torch.no_grad()
        def run(held: Sequence[Tensor]) -> Sequence[Tensor]:
            foreach_copy(list(held), list(module(*held)))
            return held

        return run


def as_module(
    tensors: Sequence[Tensor], build: Callable[[fx.Graph, list[fx.Node]], Sequence[fx.Node]]
) -> fx.GraphModule:
    """A graph of inputs such as `tensors`, which gives what `build` makes of them."""
    graph, nodes = fx.Graph(), list[fx.Node]()
    for number, tensor in enumerate(tensors):
        nodes.append(graph.placeholder(f"sum_{number}"))
        nodes[-1].meta["val"] = torch.empty_like(tensor, device="meta")
    graph.output(tuple(build(graph, nodes)))
    return fx.GraphModule({}, graph)


@dataclass
class Inserter:
    """Writes collectives of gradients into a graph: each as soon as what it sends is there.

    Args:
      owner: whose gradients travel low (`owner.low`).
    """

    graph: fx.Graph
    owner: Any
    order: dict[fx.Node, int] = field(default_factory=dict)
    _place: int = -1
    _point: fx.Node | None = None

    def insert(self, make: Callable[[], Sequence[fx.Node]], before: Sequence[Any]) -> None:
        """Let the graph give `before`, and what `make` makes."""
        output = self.graph.output_node()
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        with self.graph.inserting_before(output):
            made = make()
        output.args = ((*before, *made),)
        # The descriptions of the outputs were read before; they would be one per gradient.
        output.meta.pop("desc", None)

    def behind(self, nodes: Sequence[fx.Node]) -> contextlib.AbstractContextManager[Any]:
        """What is made inside stands behind these, and behind what was sent earlier; without an order, at the end."""
        if not self.order:
            return contextlib.nullcontext()
        last = max(nodes, key=lambda node: self.order.get(node, 0))
        if self.order[last] > self._place:
            self._place, self._point = self.order[last], last.next
        return self.graph.inserting_before(self._point)

    def travels(self, part: Sequence[fx.Node]) -> torch.dtype:
        """The dtype that a parameter's gradient travels in."""
        dtypes = {_dtype(node) for node in part}
        return dtypes.pop() if self.owner.low and len(dtypes) == 1 else torch.float32

    def whole(self, part: Sequence[fx.Node]) -> fx.Node:
        """A parameter's gradient: several (of a tied weight) are added in FP32, and rounded once where they travel low."""
        if len(part) == 1:
            return self.cast(part[0], self.travels(part))
        total, *rest = (self.cast(node, torch.float32) for node in part)
        for node in rest:
            total = self.call(_ATEN.add.Tensor, total, node)
        return self.cast(total, self.travels(part))

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if _dtype(node) == dtype:
            return node
        return self.call(torch.ops.prims.convert_element_type.default, node, dtype)

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A node of the backward, with its fake result."""
        node = self.graph.call_function(target, args)
        values: Any = fx.map_arg(args, _value)
        mode = next((t.fake_mode for t in pytree.tree_leaves(values) if isinstance(t, FakeTensor)), None)
        with mode or contextlib.nullcontext(), torch.no_grad():
            node.meta["val"] = target(*values)
        node.meta.update(partitioner_tag="is_backward", mp_phase="backward")
        return node


class _Averages(Inserter):
    """The collectives of a `Reducer`."""

    def averages(self, parts: Sequence[Sequence[fx.Node]]) -> list[fx.Node]:
        """The average of each parameter's gradients, in the dtype that it travels in."""
        sent = list[tuple[list[int], fx.Node]]()
        for members in self._agreed_buckets(parts):
            with self.behind([node for i in members for node in parts[i]]):
                sent += self._send({i: self.whole(parts[i]) for i in members})
        found = dict[int, fx.Node]()
        for members, node in sent:
            arrived = self.call(_C10D.wait_tensor.default, node)
            found.update(zip(members, self._apart(arrived, [parts[i][0] for i in members]), strict=True))
        return [found[i] for i in range(len(parts))]

    def _agreed_buckets(self, parts: Sequence[Sequence[fx.Node]]) -> list[list[int]]:
        key, known = tuple((_value(part[0]).numel(), _dtype(part[0])) for part in parts), self.owner.buckets
        if key not in known:
            when = [max(self.order.get(node, 0) for node in part) for part in parts]
            ready = sorted(range(len(parts)), key=when.__getitem__)
            known[key] = list(self._buckets(ready, parts))
        found: list[list[int]] = known[key]
        return found

    def _buckets(self, ready: Sequence[int], parts: Sequence[Sequence[fx.Node]]) -> Iterator[list[int]]:
        members, room = list[int](), FIRST
        for i in ready:
            members.append(i)
            room -= _value(parts[i][0]).numel() * self.travels(parts[i]).itemsize
            if room <= 0:
                yield members
                members, room = [], BUCKET
        if members:
            yield members

    def _send(self, grads: dict[int, fx.Node]) -> list[tuple[list[int], fx.Node]]:
        """Start the sum of a bucket over the ranks; gives, per tensor that travels, whose gradients are in it."""
        alike, sent = dict[torch.dtype, list[int]](), list[tuple[list[int], fx.Node]]()
        for i, node in grads.items():
            alike.setdefault(_dtype(node), []).append(i)
        for numbers in alike.values():
            small = [i for i in numbers if _value(grads[i]).numel() * _dtype(grads[i]).itemsize < SMALL]
            small = small if len(small) > 1 else []
            packed = [([i], grads[i]) for i in numbers if i not in small]
            if small:
                rows = [self.call(_ATEN.reshape.default, grads[i], [-1]) for i in small]
                packed.append((small, self.call(_ATEN.cat.default, rows)))
            summed = self.call(_C10D.all_reduce_coalesced.default, [n for _, n in packed], "sum", self.owner.ranks.name)
            sent += [(whose, self.call(operator.getitem, summed, k)) for k, (whose, _) in enumerate(packed)]
        return sent

    def _apart(self, arrived: fx.Node, like: Sequence[fx.Node]) -> list[fx.Node]:
        if len(like) == 1:
            return [arrived]
        found, start = list[fx.Node](), 0
        for node in like:
            shape = list(_value(node).shape)
            end = start + math.prod(shape)
            piece = self.call(_ATEN.slice.Tensor, arrived, 0, start, end)
            found.append(self.call(_ATEN.view.default, piece, shape))
            start = end
        return found


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _dtype(node: fx.Node) -> torch.dtype:
    found: torch.dtype = node.meta["val"].dtype
    return found


__all__ = ["Inserter", "Reducer", "as_module"]
