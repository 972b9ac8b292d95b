"""`torch.func` in a model: what runs inside `vmap`, `grad`, `jvp` and the like becomes one opaque call.

Dynamo writes a transform as calls that enter a level, compute on wrapped tensors, and leave it.  Wrapped tensors have no
storage and mean nothing in another trace, so the stretch of such a graph from entry to exit stays as Dynamo had it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from mpcompile.torch_internals.dynamo import copy_source
from mpcompile.torch_internals.operators import ENTER_TRANSFORM, LEAVE_TRANSFORM


def transformed(body: fx.GraphModule, *operands: Any) -> Any:
    """The stretch of a program that runs inside `torch.func` transforms."""
    return body(*operands)


def with_transforms_apart(module: fx.GraphModule) -> fx.GraphModule:
    """`module` with a call of `transformed` for every outermost transform; itself where it has none."""
    if not any(_step(node) for node in module.graph.nodes):
        return module
    made = fx.GraphModule(module, fx.Graph())
    env: dict[fx.Node, fx.Node] = {}
    for number, stretch in enumerate(_stretches(module.graph)):
        if len(stretch) > 1:
            _call(made, stretch, env, f"_transform_{number}")
        else:
            env[stretch[0]] = made.graph.node_copy(stretch[0], lambda n: env[n])
            copy_source(stretch[0], env[stretch[0]])
    made.graph.lint()
    made.recompile()
    made.meta.update(module.meta)
    return made


def _step(node: fx.Node) -> int:
    """1 where a node enters a level, -1 where it leaves one."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return int(name.endswith(ENTER_TRANSFORM)) - int(name.endswith(LEAVE_TRANSFORM))


def _stretches(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes in order: one by one outside of transforms, from entry to exit inside."""
    depth, stretch = 0, list[fx.Node]()
    for node in graph.nodes:
        depth += _step(node)
        stretch.append(node)
        if depth == 0:
            yield stretch
            stretch = []


def _call(made: fx.GraphModule, stretch: list[fx.Node], env: dict[fx.Node, fx.Node], name: str) -> None:
    inside = set(stretch)
    given = list(dict.fromkeys(n for node in stretch for n in node.all_input_nodes if n not in inside))
    results = [node for node in stretch if any(user not in inside for user in node.users)]
    body = fx.Graph()
    inner = {node: body.placeholder(node.name) for node in given}
    for node in stretch:
        inner[node] = body.node_copy(node, lambda n: inner[n])
    body.output(tuple(inner[node] for node in results))
    setattr(made, name, fx.GraphModule(made, body))
    call = made.graph.call_function(transformed, (made.graph.get_attr(name), *(env[node] for node in given)))
    last = next((node for node in reversed(stretch) if "stack_trace" in node.meta), stretch[-1])
    call.meta = {key: last.meta[key] for key in ("stack_trace", "nn_module_stack") if key in last.meta}
    for index, node in enumerate(results):
        env[node] = made.graph.call_function(operator.getitem, (call, index))
        env[node].meta = dict(node.meta)


__all__ = ["transformed", "with_transforms_apart"]
