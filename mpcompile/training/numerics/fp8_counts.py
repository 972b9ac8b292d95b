"""What FP8 loses in a batch: of each copy that a product reads, the elements that became zero or reached the format's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import TORCH_DTYPES
from mpcompile.training.emitted.weave import Place
from mpcompile.training.gradients.joint import Joint


@dataclass(frozen=True)
class CopyCount:
    """One operand's FP8 copy in one batch.

    Fields:
      module, node: of the linear layer that reads it first: its path in the model, its node in the plan.
      operand: "input", "weight" or "gradient"; format: "float8_e4m3fn" or "float8_e5m2".
      elements: of the operand.
      underflowed: of these, not zero but zero in the copy; saturated: at the largest number of the format, of which a
        scale from the largest magnitude gives at least one; nonfinite: NaN or infinite in the copy.
    """

    module: str
    node: str
    operand: str
    format: str
    elements: int
    underflowed: int
    saturated: int
    nonfinite: int


class _Counting(fx.Interpreter):
    def __init__(self, joint: Joint, names: dict[str, Place]) -> None:
        super().__init__(joint.module)
        self.joint, self.names, self.found = joint, names, list[CopyCount]()
        inputs = list(joint.module.graph.find_nodes(op="placeholder"))
        kinds = [one.kind for one in joint.forward.inputs]
        self.weights = {node for node, kind in zip(inputs, kinds, strict=False) if kind in ("shadow", "param")}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is torch.ops.mpcompile.quantise.default:
            self.found.append(self._count(n, result))
        return result

    def _count(self, node: fx.Node, made: Sequence[Tensor]) -> CopyCount:
        source: Any = node.args[0]
        given, form = self.env[source], str(node.args[1])
        copy = (made[0] if made[0].numel() else made[2].t()).float()
        place = self.names.get(node.name, Place())
        zeroed = (copy == 0) & (given != 0)
        at_end = copy.abs() == torch.finfo(TORCH_DTYPES[form]).max
        counts = [int(one.sum()) for one in (zeroed, at_end, ~torch.isfinite(copy))]
        return CopyCount(place.module, place.node, self._operand(node, source), form, given.numel(), *counts)

    def _operand(self, node: fx.Node, source: Any) -> str:
        if node.meta.get("partitioner_tag") == "is_backward":
            return "gradient"
        while isinstance(source, fx.Node) and source.op == "call_function" and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        return "weight" if source in self.weights else "input"


def counted(joint: Joint, inputs: Sequence[Any], seed: Tensor, names: dict[str, Place]) -> list[CopyCount]:
    """The counts of a run of a joint graph, in its order.

    Args:
      inputs: what the joint graph reads, without the seed.
      names: the places of the nodes of the joint graph.
    """
    run = _Counting(joint, names)
    with torch.no_grad():
        run.run(*inputs, seed)
    return run.found
