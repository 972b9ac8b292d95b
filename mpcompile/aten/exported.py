"""Flatten what `torch.export` wraps: autocast and no-grad regions become marks on their nodes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mpcompile.aten.facts import DTYPES
from mpcompile.torch_internals.operators import EXPORT_GUARDS, SET_GRAD_ENABLED, HigherOrderOperator, name_of


def inline_regions(module: fx.GraphModule) -> None:
    """Inline ``wrap_with_autocast`` (its nodes are marked ``mp_region``) and ``wrap_with_set_grad_enabled``."""
    for node in list(module.graph.nodes):
        if _is_check(node):
            module.graph.erase_node(node)
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            continue
        if name_of(node.target) == "wrap_with_autocast":
            _, dtype, enabled, _, body, *operands = node.args
            region = DTYPES.get(dtype, "off") if enabled else "off"
            _inline(module, node, body, operands, region)
        elif name_of(node.target) == "wrap_with_set_grad_enabled":
            enabled, body, *operands = node.args
            _inline(module, node, body, operands, None, grad=bool(enabled))
    module.recompile()


def without_dtype_checks(module: fx.GraphModule) -> fx.GraphModule:
    """`module` and the bodies in it without export's assertions of dtypes, in place: the plan changes dtypes."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.find_nodes(
                op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
            ):
                part.graph.erase_node(node)
            part.recompile()
    return module


def _is_check(node: fx.Node) -> bool:
    """Export's own assertions: of input shapes, and of dtypes that the plan is about to change."""
    if node.op == "call_module":
        return EXPORT_GUARDS in str(node.target)
    return node.target is torch.ops.aten._assert_tensor_metadata.default


def _inline(
    module: fx.GraphModule, call: fx.Node, body: Any, operands: list[Any], region: str | None, grad: bool | None = None
) -> None:
    graph, inner = module.graph, getattr(module, body.target)
    inline_regions(inner)
    env = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), operands, strict=True))
    result: Any = None
    with graph.inserting_before(call):
        if grad is not None:
            graph.call_function(SET_GRAD_ENABLED, (grad,))
        for node in inner.graph.nodes:
            if node.op == "output":
                result = fx.map_arg(node.args[0], lambda n: env[n])
            elif node.op == "get_attr":
                raise NotImplementedError(f"a region that holds {node.target}")
            elif node.op != "placeholder":
                env[node] = graph.node_copy(node, lambda n: env[n])
                if region is not None:
                    env[node].meta.setdefault("mp_region", region)
        if grad is not None:
            graph.call_function(SET_GRAD_ENABLED, (not grad,))
    _replace(graph, call, result)


def _replace(graph: fx.Graph, call: fx.Node, result: Any) -> None:
    """The readers of the call's tuple read the inlined values."""
    if isinstance(result, fx.Node):
        call.replace_all_uses_with(result)
    for user in list(call.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(call)
