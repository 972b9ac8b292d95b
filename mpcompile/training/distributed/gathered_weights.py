"""Weights of which each rank holds a share, gathered in the graph where they are read (ZeRO 3).

The rank's share of each bucket is the graph's input in place of the bucket's weights.  What is gathered is freed after its
last reader in the forward and gathered again in the backward: the partitioner is told to make it anew, as torch's own
compiled FSDP tells it (torchtitan's `reshard_after_forward`), so that nothing whole is kept between the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from mpcompile.aten.graphs import inputs_of, values_of
from mpcompile.errors import TrainingError
from mpcompile.training.distributed.layout import Member
from mpcompile.training.distributed.scatter import Scatterer
from mpcompile.training.gradients.joint import Joint

_C10D, _ATEN = torch.ops._c10d_functional, torch.ops.aten
# Above every number that an activation checkpoint of the program has: those are made again on their own account.
_AGAIN = {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 1 << 20, "partitioner_tag": "is_forward"}
# Buckets whose gathering begins before the one that is waited for is read.
AHEAD = 2


def gather_weights(joint: Joint, scatterer: Scatterer) -> list[Tensor]:
    """Let a joint graph read the rank's shares instead of the weights; they are its inputs before the seed.

    Returns:
      Those inputs, in order: one of one dimension per bucket, of the low type, or FP32 where a master is read.

    Raises:
      TrainingError: MP549, where the forward writes to a weight.
    """
    graph, layout = joint.module.graph, scatterer.layout
    assert layout is not None
    weights: dict[str, list[fx.Node]] = {}
    gone = set[int]()
    whose = {one.name for bucket in layout.buckets for one in bucket.members}
    for place, (node, one) in enumerate(zip(inputs_of(joint.module), joint.forward.inputs, strict=False)):
        if one.kind in ("param", "shadow") and one.name in whose:
            _refuse_written(joint, place, one.name)
            weights.setdefault(one.name, []).append(node)
            gone.add(place)
    writer = _Writer(graph, scatterer)
    given = [number for number in range(len(layout.buckets)) if writer.gather(number, weights)]
    joint.places = [place for place in joint.places if place not in gone]
    joint.module.recompile()
    joint.fakes = values_of(inputs_of(joint.module))
    return [scatterer.chunks[number] for number in given]


def _refuse_written(joint: Joint, place: int, name: str) -> None:
    if place in joint.mutated:
        raise TrainingError("MP549", "shard='full' cannot divide a weight that the forward writes to", where=name,
                            why="each rank would write to what it gathered", try_="shard='update'")  # fmt: skip


class _Writer:
    """Writes gatherings into a graph: each in front of the first reader of what it gathers."""

    def __init__(self, graph: fx.Graph, scatterer: Scatterer) -> None:
        self.graph, self.scatterer, self.seed = graph, scatterer, graph.find_nodes(op="placeholder")[-1]
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def gather(self, number: int, weights: dict[str, list[fx.Node]]) -> bool:
        """Replace one bucket's weights (name -> inputs of the graph); False where none is read."""
        assert self.scatterer.layout is not None
        members = self.scatterer.layout.buckets[number].members
        pairs = [(one, node) for one in members for node in weights.get(one.name, ())]
        read = [(one, node) for one, node in pairs if node.users]
        if read:
            whole = self._whole(number, min((self._first(node) for _, node in read), key=self.order.__getitem__))
            for one, node in read:
                node.replace_all_uses_with(self._member(whole, one, node))
        for _, node in pairs:
            self.graph.erase_node(node)
        return bool(read)

    def _first(self, weight: fx.Node) -> fx.Node:
        return min(weight.users, key=self.order.__getitem__)

    def _whole(self, number: int, before: fx.Node) -> fx.Node:
        """(elements of all ranks' shares,)."""
        held, ranks = self.scatterer.chunks[number], self.scatterer.ranks
        with self.graph.inserting_before(self.seed):
            share = self.graph.placeholder(f"primals_share_{number}")
        with self.seed.meta["val"].fake_mode:
            share.meta["val"] = torch.empty_like(held)
        with self.graph.inserting_before(before):
            sent = self._call(_C10D.all_gather_into_tensor.default, share, ranks.size, ranks.name)
            return self._call(_C10D.wait_tensor.default, sent)

    def _member(self, whole: fx.Node, member: Member, weight: fx.Node) -> fx.Node:
        """A weight as `weight` was: cut out, in its shape, dtype and order in memory."""
        value, order = weight.meta["val"], self.scatterer.orders[member.name]
        with self.graph.inserting_before(self._first(weight)):
            found = self._call(_ATEN.slice.Tensor, whole, 0, member.start, member.start + member.count)
            found = self._call(_ATEN.view.default, found, [value.shape[d] for d in order or range(value.dim())])
            if order:
                found = self._call(_ATEN.permute.default, found, [order.index(d) for d in range(len(order))])
            if found.meta["val"].dtype != value.dtype:
                found = self._call(torch.ops.prims.convert_element_type.default, found, value.dtype)
        return found

    def _call(self, target: Any, *args: Any) -> fx.Node:
        """A node of the forward that is made again in the backward, with its fake result."""
        node = self.graph.call_function(target, args)
        with self.seed.meta["val"].fake_mode, torch.no_grad():
            node.meta["val"] = target(*fx.map_arg(args, lambda one: one.meta["val"]))
        node.meta.update(_AGAIN, mp_phase="forward")
        return node


def prefetch(module: fx.GraphModule) -> None:
    """Begin each gathering some buckets before it is waited for, and no earlier: what is gathered takes memory."""
    waits = [
        node
        for node in module.graph.find_nodes(op="call_function", target=_C10D.wait_tensor.default)
        if _is_gathering(node.args[0])
    ]
    for wait, early in zip(waits[1:], [*waits[:1] * (AHEAD - 1), *waits], strict=False):
        early.prepend(wait.args[0])
    module.recompile()


def _is_gathering(node: Any) -> bool:
    gathers = node.target is _C10D.all_gather_into_tensor.default
    return bool(gathers and node.args[0].op == "placeholder")


__all__ = ["gather_weights", "prefetch"]
