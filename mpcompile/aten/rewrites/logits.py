"""Where the product of a linear layer is read by a loss alone, row by row: its logits may be laid out, or cut, at will."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import argument
from mpcompile.aten.read import FxCapture

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_ROW_OPS = (*_VIEWS, aten.flatten.using_ints, aten.contiguous.default, aten.clone.default, aten.slice.Tensor)

ValueOf = Callable[[Any], Tensor]


@dataclass(frozen=True)
class LogitsRegion:
    """A cross-entropy loss of class indices, the linear that makes its logits, and what stands
    between them (in order): casts, and operations on whole rows.
    """

    loss: fx.Node
    linear: fx.Node
    between: tuple[fx.Node, ...]

    @property
    def casts(self) -> tuple[torch.dtype, ...]:
        return tuple(n.args[1] for n in self.between if n.target is aten.to.dtype)  # type: ignore[misc]

    @property
    def weights(self) -> fx.Node | None:
        """The classes' weights."""
        return argument(self.loss, 2, "weight")  # type: ignore[no-any-return]

    @property
    def ignore(self) -> int:
        """The target that counts nothing."""
        return argument(self.loss, 4, "ignore_index", -100)  # type: ignore[no-any-return]

    @property
    def smoothing(self) -> float:
        return argument(self.loss, 5, "label_smoothing", 0.0)  # type: ignore[no-any-return]


def region_of(loss: fx.Node, value_of: ValueOf, *, weighted: bool = False) -> LogitsRegion | None:
    """The region that ends in `loss`, where there is one.

    Args:
      value_of: the fake value of a node.
      weighted: the classes may have weights.
    """
    if (not weighted and argument(loss, 2, "weight") is not None) or value_of(loss.args[1]).is_floating_point():
        return None
    if value_of(loss.args[0]).dim() != 2:
        return None  # the classes would be another dimension than the linear's
    between, node = list[fx.Node](), loss.args[0]
    while isinstance(node, fx.Node) and len(node.users) == 1 and node.target in (*_ROW_OPS, aten.to.dtype):
        between.insert(0, node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or len(node.users) != 1:
        return None
    # A slice or a view of the classes themselves changes which classes there are.
    classes = value_of(node).shape[-1]
    bias = argument(node, 2, "bias")
    if bias is not None and value_of(bias).shape != (classes,):
        return None  # one that is broadcast cannot be cut or padded as the classes are
    whole = all(_keeps_classes(one, value_of(one), classes) for one in between)
    return LogitsRegion(loss, node, tuple(between)) if whole else None


def replay(graph: fx.Graph, node: fx.Node, rows: Any, width: Any) -> Any:
    """What `node`, of a region's, does to the rows of the logits, done to other rows, of `width` columns."""
    if node.target in _VIEWS:
        shape = node.args[1]
        assert isinstance(shape, (list, tuple))
        return graph.call_function(aten.reshape.default, (rows, [*shape[:-1], width]))
    return graph.call_function(node.target, (rows, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]


def values_of_written(capture: FxCapture) -> ValueOf:
    """Reads the traced fake value of a written node (its dtype is the original's).

    What was added in writing stands for something traced: a cast for its operand, a shadow for its master, an item of a
    tuple for what the tuple has there.
    """
    traced = {n.name: n for n in capture.module.graph.nodes}

    def value_of(node: fx.Node) -> Tensor:
        if node.op in ("placeholder", "get_attr"):
            mark = node.meta.get("mp_name", "")
            master = capture.origin.get(mark.removesuffix(".shadow")) if mark.endswith(".shadow") else None
            return traced[node.name].meta["val"] if master is None else master[0].meta["val"]  # type: ignore[no-any-return]
        if "mp_node" in node.meta:
            return traced[node.meta["mp_node"]].meta["val"]  # type: ignore[no-any-return]
        source: Any = node.args[0]
        if node.target is operator.getitem:
            return value_of(source)[node.args[1]]  # type: ignore[index]
        return value_of(source)

    return value_of


def _keeps_classes(node: fx.Node, value: Tensor, classes: Any) -> bool:
    if value.dim() < 2 or value.shape[-1] != classes:
        return False
    return node.target is not aten.slice.Tensor or int(argument(node, 1, "dim", 0)) % value.dim() != value.dim() - 1
