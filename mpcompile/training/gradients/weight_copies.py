"""FP8 copies of weights as inputs of the joint graph: what makes them in the forward is taken out of it.

The graph that is *run* reads them; the emitted graph, its report and its exports have them made from the shadows.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.aten.graphs import inputs_of, values_of
from mpcompile.runtime.weight_copies import Wanted, WeightCopies
from mpcompile.training.gradients.joint import Joint

_ALIASES = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default})
_VIEWS = frozenset({torch.ops.aten.view.default, torch.ops.aten.reshape.default})


def lift(joint: Joint, fixed: list[Any], copies: WeightCopies) -> list[Tensor]:
    """Let a joint graph read the copies in `copies` of the shadows among `fixed`; they are its inputs before the seed.

    Args:
      fixed: the graph's inputs without the seed.

    Returns:
      Those inputs, in order.
    """
    module, given = joint.module, list[Tensor]()
    places = {node: place for place, node in enumerate(inputs_of(module)[: len(fixed)])}
    seed = inputs_of(module)[-1]
    for node in list(module.graph.find_nodes(op="call_function", target=torch.ops.mpcompile.quantise.default)):
        source, form, lies, transposed, rowwise = node.args[:5]
        place = places.get(_source(source))
        if place is None or rowwise or joint.forward.inputs[place].kind != "shadow":
            continue
        held = copies.get(fixed[place], Wanted(form, lies, transposed))
        for item in list(node.users):
            number = item.args[1] if item.target is operator.getitem else None
            assert isinstance(number, int), f"{item} reads copies whole"
            if item.users:
                given.append(held[number])
                item.replace_all_uses_with(_input(module.graph, seed, item, len(given)))
            module.graph.erase_node(item)
        module.graph.erase_node(node)
    if given:
        module.graph.eliminate_dead_code()
        module.recompile()
        joint.fakes = values_of(inputs_of(module))
    return given


def _input(graph: fx.Graph, seed: fx.Node, item: fx.Node, number: int) -> fx.Node:
    with graph.inserting_before(seed):
        made = graph.placeholder(f"primals_copy_{number}")
    made.meta["val"] = item.meta["val"]
    if "tensor_meta" in item.meta:
        made.meta["tensor_meta"] = item.meta["tensor_meta"]
    return made


def _source(node: Any) -> Any:
    """What `node` is another name of."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        same = node.target in _ALIASES or (node.target in _VIEWS and _shape(node) == _shape(node.args[0]))
        if not same:
            break
        node = node.args[0]
    return node


def _shape(node: Any) -> Any:
    return getattr(node.meta.get("val"), "shape", None)


__all__ = ["lift"]
