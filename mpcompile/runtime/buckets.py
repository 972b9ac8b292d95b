"""A decided graph in pieces that end where DistributedDataParallel's buckets do, so that gradients are sent as they come.

The backward of one compiled graph is one node of autograd: all of its gradients would be ready at once, and nothing of
their reduction would run beside it.  Dynamo's own answer is to cut its graph *before* a backend sees it, which leaves a
backend with pieces to decide on one by one.  Here the whole graph is decided first, and what was written is cut
(docs/decisions/0031-ddp-buckets.md).  The cut is `torch._dynamo`'s: `split_module`, and its compiler of pieces.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mpcompile.aten.rewrites.align import closed, padded
from mpcompile.shadows.low_gradients import use_shadows
from mpcompile.shadows.table import use_shadow
from mpcompile.torch_internals.groups import active_ddp, compile_pieces
from mpcompile.torch_internals.tensors import FakeTensor

# What torch gives the first bucket to be sent, so that communication starts early: torch.distributed's own constant.
FIRST_BUCKET = 1 << 20
Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def bucket_bytes() -> int | None:
    """Bytes of a gradient bucket of the DistributedDataParallel whose forward runs now; None where none does."""
    if not torch.distributed.is_available():
        return None
    active = active_ddp()
    return None if active is None else int(active.bucket_bytes_cap)


def split_at_buckets(module: fx.GraphModule, fakes: Sequence[Any], cap: int, compile_piece: Compile) -> Any:
    """`module` with each bucket's piece compiled by `compile_piece`; None where one bucket holds all.

    Args:
      module: a written graph, with ``use_shadow(master, shadow)`` for each shadow; it is taken over.
      fakes: a fake tensor or SymInt for each placeholder.
      cap: bytes of a bucket.
    """
    if _has_bodies(module):
        return None
    pieces = _pieces(module, fakes, cap)
    if len(set(pieces.values())) < 2:
        return None
    _bring_weights(module, pieces)
    _keep_tuples_whole(module, pieces)
    module.recompile()
    _note_values(module, fakes)
    return compile_pieces(module, pieces, fakes, compile_piece)


class Piece:
    """A compiled piece, which reads its large shadows as functions of their masters: right before it runs, so that autograd
    gives those gradients out before it goes on to the piece before.

    Args:
      inner: the compiled piece.
      groups: (places of masters, places of their shadows) whose gradients are cast together.
    """

    def __init__(self, inner: Callable[..., Any], groups: Sequence[tuple[list[int], list[int]]]) -> None:
        self.inner, self.groups = inner, groups

    def __call__(self, *args: Any) -> Any:
        if not (self.groups and torch.is_grad_enabled()):
            return self.inner(*args)
        given = list(args)
        for masters, shadows in self.groups:
            used = use_shadows([args[i] for i in masters], [args[i] for i in shadows], low=False)
            for place, shadow in zip(shadows, used, strict=True):
                given[place] = shadow
        return self.inner(*given)


def _has_bodies(module: fx.GraphModule) -> bool:
    """Graphs inside of the graph (a selective checkpoint, `cond`): torch does not cut around those in all versions."""
    held = (getattr(module, str(n.target), None) for n in module.graph.find_nodes(op="get_attr"))
    return any(isinstance(one, fx.GraphModule) for one in held)


def _pieces(module: fx.GraphModule, fakes: Sequence[Any], cap: int) -> dict[fx.Node, int]:
    """Node -> number of its piece, in the order of the forward.

    Gradients come in the reverse order of the forward, a weight's when the first of its readers is done.
    """
    inputs = module.graph.find_nodes(op="placeholder")
    sizes = {node: _gradient_bytes(fake) for node, fake in zip(inputs, fakes, strict=True)}
    first = _first_readers(module, sizes)
    numbers, number, room = dict[fx.Node, int](), 0, min(FIRST_BUCKET, cap)
    for node in reversed(module.graph.nodes):
        if node.op != "call_function":
            continue
        if room <= 0:
            number, room = number - 1, cap
        numbers[node] = number
        room -= sum(sizes[weight] for weight in first.get(node, ()))
    used = sum(1 for node, weights in first.items() if numbers[node] == number for w in weights if sizes[w])
    # What stands before the first weight that is trained is no piece of its own.
    least = number if used else number + 1
    return {node: max(0, n - least) for node, n in numbers.items()}


def _gradient_bytes(fake: Any) -> int:
    if not isinstance(fake, torch.nn.Parameter) or not fake.requires_grad or not fake.is_leaf:
        return 0
    return int(fake.numel()) * fake.element_size()


def _first_readers(module: fx.GraphModule, sizes: dict[fx.Node, int]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the weights that it is the first to compute with."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    found: dict[fx.Node, list[fx.Node]] = {}
    for weight in sizes:
        readers = list[fx.Node]()
        for user in _users(weight):
            readers += _users(user) if _prepares(user) else [user]
        computing = [node for node in readers if node.op == "call_function"]
        if computing:
            found.setdefault(min(computing, key=order.__getitem__), []).append(weight)
    return found


def _users(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


def _prepares(node: fx.Node) -> bool:
    """True for what only makes a weight readable, so that each piece may do it for itself: a shadow, a cast, a padding."""
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    known = node.target is use_shadow or node.target in _PREPARING
    return known and all(one.op == "placeholder" or _prepares(one) for one in node.all_input_nodes)


_ATEN = torch.ops.aten
_PREPARING = {padded, closed, _ATEN.to.dtype, _ATEN.t.default, _ATEN.view.default, _ATEN.permute.default}


def _bring_weights(module: fx.GraphModule, pieces: dict[fx.Node, int]) -> None:
    """Each piece prepares the weights that it reads itself: none crosses a cut, and a tied weight's gradients meet in FP32."""
    graph, made = module.graph, dict[tuple[fx.Node, int], fx.Node]()

    def brought(node: fx.Node, piece: int, reader: fx.Node) -> fx.Node:
        if node.op == "placeholder" or not _prepares(node):
            return node
        if (node, piece) not in made:
            sources = {one: brought(one, piece, reader) for one in node.all_input_nodes}
            with graph.inserting_before(reader):
                new = made[node, piece] = graph.node_copy(node, sources.__getitem__)
            copies[new] = piece
        return made[node, piece]

    copies, prepared = dict[fx.Node, int](), {node for node in pieces if _prepares(node)}
    for reader in [node for node in graph.nodes if node in pieces and node not in prepared]:
        for one in [one for one in reader.all_input_nodes if one in prepared]:
            reader.replace_input_with(one, brought(one, pieces[reader], reader))
    for node in reversed([node for node in graph.nodes if node in prepared]):
        if not node.users:
            pieces.pop(node)
            graph.erase_node(node)
    pieces.update(copies)


def _keep_tuples_whole(module: fx.GraphModule, pieces: dict[fx.Node, int]) -> None:
    """What takes an item of a tuple stands in the piece that made it: a piece gives tensors."""
    for node in module.graph.find_nodes(op="call_function", target=operator.getitem):
        source = node.args[0]
        if pieces.get(source) != pieces.get(node):
            pieces[node] = pieces[source]
            source.append(node)


def _note_values(module: fx.GraphModule, fakes: Sequence[Any]) -> None:
    """Where sizes are symbols, a piece is given those that its inputs' sizes are made of: `split_module` reads them here."""
    for node, fake in zip(module.graph.find_nodes(op="placeholder"), fakes, strict=True):
        node.meta["example_value"] = fake
    if not any(isinstance(fake, torch.SymInt) for fake in fakes):
        return
    mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
    with mode, torch.no_grad():
        _Values(module).run(*fakes)


class _Values(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, (torch.Tensor, torch.SymInt)):
            n.meta["example_value"] = result
        return result


__all__ = ["Piece", "bucket_bytes", "split_at_buckets"]
