"""Casts to the dtype that a tensor has anyway, kept apart from the tensor itself.

``x.float()`` of an FP32 tensor returns `x`, so a trace lets all who read `x` from there on read the cast: also the residual
sum outside the norm in which ``hidden_states.to(torch.float32)`` stands.  The cast is the wish of the module that it stands
in; who is outside of that module reads `x` again.  The numbers are the same.

The same goes for a cast under `torch.no_grad`: once `x` is low it is a tensor of its own, through which nothing flows back, so
who reads `x` after the region reads `x`.
"""

from __future__ import annotations

import torch
from torch import fx

from mpcompile.aten.facts import module_path
from mpcompile.torch_internals.operators import SET_GRAD_ENABLED

_CASTS = frozenset(
    {torch.ops.aten.to.dtype, torch.ops.aten.to.dtype_layout, torch.ops.prims.convert_element_type.default}
)


def keep_noop_casts_local(module: fx.GraphModule) -> None:
    """Rewrite the graph of `module` in place, as the header says."""
    detached = _without_gradients(module.graph)
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in _CASTS or not _is_noop(node):
            continue
        home = module_path(node)
        for user in list(node.users):
            outside = home and user.op == "call_function" and not _is_inside(module_path(user), home)
            if outside or (node in detached and user not in detached):
                user.replace_input_with(node, node.args[0])


def _without_gradients(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes of regions that stand under `torch.no_grad`."""
    found, switches = list[fx.Node](), graph.find_nodes(op="call_function", target=SET_GRAD_ENABLED)
    if not switches:
        return frozenset()
    enabled = True
    for node in graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            enabled = bool(node.args[0])
        elif not enabled and node.op != "output":
            found.append(node)
    return frozenset(found)


def _is_noop(node: fx.Node) -> bool:
    given = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    made = node.meta.get("val")
    if not isinstance(given, torch.Tensor) or not isinstance(made, torch.Tensor) or node.kwargs.get("copy"):
        return False
    return made.is_floating_point() and (given.dtype, given.device) == (made.dtype, made.device)


def _is_inside(path: str, home: str) -> bool:
    return path == home or path.startswith(f"{home}.")
