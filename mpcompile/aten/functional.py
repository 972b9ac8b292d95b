"""Make an ATen graph explicit before it is read: no needless in-place ops, no dtype that follows another tensor.

An in-place op on a tensor that nothing else can see is the functional op with its readers renamed; AOTAutograd would
do the same a moment later, and without it a cast would have to stand between a tensor and its mutation.  What is left
(views, inputs, buffers mutated in place) is reported as alias groups, which the assignment keeps in one precision.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx

from mpcompile.aten import facts
from mpcompile.torch_internals.operators import OpOverload, overload_of, schema_of
from mpcompile.torch_internals.tensors import storage_key

aten = torch.ops.aten
_FOLLOWS_OTHER = {aten.to.other, aten.type_as.default}
# Their functional forms have no derivative.
_IN_PLACE_ONLY = frozenset({"copy_", "resize_as_", "set_"})
_LIKE = ("_like.", "new_")


def make_explicit(module: fx.GraphModule) -> None:
    """Rewrite `module`'s graph in place, as the header says. Computes the same values."""
    graph = module.graph
    members = _storages(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if node.target in _FOLLOWS_OTHER:
            _fix_dtype(node)
        elif node.target is aten.to.dtype_layout:
            _only_move(node)
        elif _is_factory_like(node.target):
            _name_dtype(node)
        elif schema_of(node.target).is_mutable:
            _try_functional(node, members)
    graph.lint()


def mutated_storages(graph: fx.Graph) -> dict[fx.Node, str]:
    """Node -> name of its storage, for every node that shares a storage which an op of the graph writes to."""
    members = _storages(graph)
    owner = {node: key for key, nodes in members.items() for node in nodes}
    written = {owner[arg] for node in graph.nodes for arg in _written(node) if arg in owner}
    return {node: f"storage{i}" for i, key in enumerate(sorted(written)) for node in members[key]}


def _storages(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """Storage -> nodes that are views of it, read from the fake tensors of the trace."""
    members: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            members[storage_key(value)].append(node)
    return members


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an op writes to."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or not schema_of(target).is_mutable:
        return []
    found = []
    for i, argument in enumerate(schema_of(target).arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = facts.argument(node, i, argument.name)
        found += [g for g in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(g, fx.Node)]
    return found


def _try_functional(node: fx.Node, members: dict[int, list[fx.Node]]) -> None:
    functional = _functional(node.target)
    target = node.args[0] if node.args else None
    if functional is None or not isinstance(target, fx.Node) or not isinstance(target.meta.get("val"), torch.Tensor):
        return
    sharing = members[storage_key(target.meta["val"])]
    # Safe when the storage began in this graph, and all that shared it until now is the chain of its in-place
    # results: an earlier view, or the caller of an input, would see the write.  Later views read the new tensor.
    if any(n.op != "call_function" for n in sharing):
        return
    chain = [n for n in sharing[1:] if n < node]
    if any(n.meta.get("mp_was") is None for n in chain) or (target is not sharing[0] and target not in chain):
        return
    node.target = functional
    node.meta["mp_was"] = "in-place"
    target.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node and node < user)


def _functional(op: object) -> OpOverload | None:
    """aten.relu_.default -> aten.relu.default, when it exists and takes the same arguments."""
    if not isinstance(op, OpOverload):
        return None
    packet = schema_of(op).name.split("::")[-1]
    if not packet.endswith("_") or packet.endswith("__") or op.namespace != "aten" or packet in _IN_PLACE_ONLY:
        return None
    twin = getattr(getattr(aten, packet[:-1], None), overload_of(op), None)
    if twin is None or [a.name for a in schema_of(twin).arguments] != [a.name for a in schema_of(op).arguments]:
        return None
    return twin  # type: ignore[no-any-return]


def _fix_dtype(node: fx.Node) -> None:
    """`x.to(y)` and `x.type_as(y)`: the dtype that the traced program had, written out."""
    node.target = aten.to.dtype
    node.args, node.kwargs = (node.args[0], node.meta["val"].dtype), {}


def _only_move(node: fx.Node) -> None:
    """`x.to(device)`: torch fills in the dtype that `x` had in the trace; it is no cast of the user's."""
    given = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    if isinstance(given, torch.Tensor) and node.kwargs.get("dtype") == given.dtype:
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "dtype"}


def _is_factory_like(op: OpOverload) -> bool:
    name = str(op)
    return any(part in name for part in _LIKE) and any(a.name == "dtype" for a in schema_of(op).arguments)


def _name_dtype(node: fx.Node) -> None:
    """`zeros_like(x)`: a new tensor's dtype must not follow what we make of `x`."""
    if node.kwargs.get("dtype") is None and isinstance(node.meta.get("val"), torch.Tensor):
        node.kwargs = {**node.kwargs, "dtype": node.meta["val"].dtype}
