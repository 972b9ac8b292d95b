"""Gradient collectives of a sharded update: each bucket's sum is scattered, and a rank is given its share alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mpcompile.aten.graphs import outputs_of
from mpcompile.errors import TrainingError
from mpcompile.torch_internals.groups import collectives as _C10D
from mpcompile.torch_internals.tensors import unset_fake_temporarily
from mpcompile.training.distributed import reduce
from mpcompile.training.distributed.layout import Member, ShareLayout, in_buckets, memory_order
from mpcompile.training.distributed.ranks import Ranks
from mpcompile.training.distributed.reduce import Inserter

_ATEN = torch.ops.aten


@dataclass
class Scatterer:
    """How gradients are averaged, and handed out in shares (the same interface as `Reducer`).

    Fields:
      low: gradients that are low travel so.
      named: the parameters, by the names that graphs use.
      whole: names of those whose FP32 master a graph reads.
      full: the low type, where ranks hold a share of the weights themselves too (``shard="full"``); else None.
      layout: what the first graph settled; None before.
      orders: of each parameter, the dimensions as its elements lie in memory.
      chunks: with `full`, the rank's share of each bucket, as graphs read it: low, or FP32 where they read masters.
    """

    ranks: Ranks
    low: bool
    named: Callable[[], dict[str, Tensor]] = dict
    whole: set[str] = field(default_factory=set)
    full: torch.dtype | None = None
    layout: ShareLayout | None = None
    orders: dict[str, tuple[int, ...]] = field(default_factory=dict)
    chunks: list[Tensor] = field(default_factory=list)

    def note(self, whole: set[str]) -> None:
        """A graph reads the masters of these.

        Raises:
          TrainingError: MP549, when the update was settled without one of them.
        """
        if self.layout is not None:
            members = {one.name for bucket in self.layout.buckets if not bucket.whole for one in bucket.members}
            missing = sorted(whole & members)
            if missing:
                raise TrainingError("MP549", "this batch's graph reads a weight in FP32, of which each rank has a share",
                                    where=missing[0], why="the graphs before read its low copy alone",
                                    try_=f"keep_fp32 for what reads {missing[0]}, from the start; or shard='none'")  # fmt: skip
        self.whole |= whole

    def reduce(self, module: fx.GraphModule, grads: Sequence[Sequence[int]], names: Sequence[str], first: int) -> None:
        """Let a graph give the rank's pieces of the average, in the order of `ShareLayout.pieces`.

        Args:
          grads: per parameter, the positions of its gradients among those that the graph gives; names: whose.
          first: how many outputs stand before the gradients.
        """
        outputs = outputs_of(module)
        given = [[outputs[first + i] for i in part] for part in grads]
        inserter = Inserter(module.graph, self)
        inserter.insert(lambda: self._scatter(inserter, given, names), outputs[:first])
        module.recompile()

    def in_graph(self, graph: fx.Graph, sums: Sequence[fx.Node], names: Sequence[str]) -> list[fx.Node]:
        """At the end of a graph without an output: the rank's pieces of the averages of `sums`."""
        return self._scatter(Inserter(graph, self), [[one] for one in sums], names)

    def of_sums(self, sums: Sequence[Tensor], names: Sequence[str]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """What gives the rank's pieces of the averages of a window's sums."""
        module = reduce.as_module(sums, lambda graph, nodes: self.in_graph(graph, nodes, names))

        @torch.no_grad()
        def run(held: Sequence[Tensor]) -> list[Tensor]:
            return list(module(*held))

        return run

    def agreed_layout(self, ready: Sequence[tuple[str, int, torch.dtype]]) -> ShareLayout:
        """The layout; made now of gradients in the order in which they are ready, if there is none yet.

        Raises:
          TrainingError: MP546, for other gradients than those that it was made of.
        """
        if self.layout is None:
            kinds = [(name, count, dtype, name in self.whole) for name, count, dtype in ready]
            found = in_buckets(kinds, self.ranks.size, reduce.FIRST, reduce.BUCKET)
            self.layout = ShareLayout(tuple(bucket for _, bucket in found), self.ranks.size, self.ranks.rank)
            self._settle()
        known, now = dict(self.layout.sent), {name: dtype for name, _, dtype in ready}
        if known != now:
            name = next(name for name in (*now, *known) if now.get(name) != known.get(name))
            raise TrainingError("MP546", "this batch has other gradients than the batches before it", where=name,
                                why="the shares of masters and moments are of those",
                                try_="let every batch reach the same parameters; or shard='none'")  # fmt: skip
        return self.layout

    def forget(self) -> None:
        """The graphs are void: the next one settles who holds what."""
        self.layout = None
        self.whole.clear()
        self.chunks = []

    def _settle(self) -> None:
        assert self.layout is not None
        named = self.named()
        self.orders = {name: memory_order(named[name]) for name, _ in self.layout.sent}
        if self.full is not None:
            # Fakes may be around: a graph is being made.
            with unset_fake_temporarily():
                self.chunks = [
                    torch.zeros(one.chunk, dtype=torch.float32 if one.whole else self.full,
                                device=named[one.members[0].name].device)
                    for one in self.layout.buckets
                ]  # fmt: skip

    def _scatter(self, inserter: Inserter, parts: Sequence[Sequence[fx.Node]], names: Sequence[str]) -> list[fx.Node]:
        number, order = {name: i for i, name in enumerate(names)}, inserter.order
        when = [max(order.get(node, 0) for node in part) for part in parts]
        ready = sorted(range(len(parts)), key=when.__getitem__)
        layout = self.agreed_layout([
            (names[i], parts[i][0].meta["val"].numel(), inserter.travels(parts[i])) for i in ready
        ])  # fmt: skip
        sent = list[fx.Node]()
        for bucket in layout.buckets:
            members = [number[one.name] for one in bucket.members]
            with inserter.behind([node for i in members for node in parts[i]]):
                ends = [one.start for one in bucket.members[1:]] + [bucket.chunk * layout.ranks]
                rows = [
                    self._flat(inserter, inserter.whole(parts[i]), one, end - one.start)
                    for i, one, end in zip(members, bucket.members, ends, strict=True)
                ]
                flat = inserter.call(_ATEN.cat.default, rows)
                scattered = (flat, "sum", self.ranks.size, self.ranks.name)
                sent.append(inserter.call(_C10D.reduce_scatter_tensor.default, *scattered))
        shares = [inserter.call(_C10D.wait_tensor.default, node) for node in sent]
        return [
            inserter.call(_ATEN.slice.Tensor, shares[piece.bucket], 0, piece.at, piece.at + piece.length)
            for piece in layout.pieces
        ]

    def _flat(self, inserter: Inserter, grad: fx.Node, member: Member, room: int) -> fx.Node:
        """A gradient's elements in the order in which its master's lie in memory, with zeros behind up to `room`."""
        order = self.orders[member.name]
        grad = inserter.call(_ATEN.permute.default, grad, list(order)) if order else grad
        row = inserter.call(_ATEN.reshape.default, grad, [-1])
        gap = room - member.count
        return inserter.call(_ATEN.constant_pad_nd.default, row, [0, gap], 0.0) if gap else row


__all__ = ["Scatterer"]
