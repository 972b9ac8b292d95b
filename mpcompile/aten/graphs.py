"""Small readings of fx graphs that several files of this room share."""

from __future__ import annotations

from typing import Any

from torch import fx

from mpcompile.torch_internals.operators import schema_of


def inputs_of(module: fx.GraphModule) -> list[fx.Node]:
    """The placeholders, in order."""
    return module.graph.find_nodes(op="placeholder")


def outputs_of(module: fx.GraphModule) -> list[Any]:
    """The flat outputs (nodes, or None)."""
    found: Any = module.graph.output_node().args[0]
    return list(found)


def shown_by(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while (
        (schema := schema_of(node.target)) is not None and schema.returns and schema.returns[0].alias_info is not None
    ):
        if not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def values_of(nodes: list[fx.Node]) -> list[Any]:
    """The fake results of nodes."""
    return [node.meta["val"] for node in nodes]
