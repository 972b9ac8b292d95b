"""Which node overflowed: run the joint graph node by node, and name the first that makes a non-finite number.

"First" leaves out nodes that pass on what they read, and those that are told to make an infinity (masks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.frontends.facts import op_name
from mpcompile.training.graphs import outputs_of
from mpcompile.training.joint import Joint


@dataclass(frozen=True)
class Overflow:
    """The first node of a step that made a non-finite number.

    Fields:
      node, op, phase: "mm_3", "aten.mm.default", "forward" or "backward".
      module, source: the user's module path and line of the forward node that it is, or whose gradient it computes.
      made: "inf" or "nan"; dtype: of what it made.
      inputs: (what, dtype, smallest, largest) of each floating input.
      scale: the loss scale of the run.
      override: the argument of `mpcompile()` that would keep the module FP32; "" where that would not help.
    """

    node: str
    op: str
    phase: str
    module: str
    source: str
    made: str
    dtype: str
    inputs: tuple[tuple[str, str, float, float], ...]
    scale: float
    override: str

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.module and f"module {self.module}", self.source) if part)
        lines = [f"{self.made} in the {self.phase}: {self.node} ({self.op}, {self.dtype}) {where and f'at {where}'}"]
        lines += [f"  reads {what} ({dtype}) in [{low:.4g}, {high:.4g}]" for what, dtype, low, high in self.inputs]
        lines.append(f"  loss scale {self.scale:g}")
        if self.override:
            lines.append(f"  try {self.override}")
        return "\n".join(lines)


class Watch(fx.Interpreter):
    """Runs a graph and keeps the first node that makes a non-finite number out of finite ones."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: tuple[fx.Node, Any, list[tuple[fx.Node, Tensor]]] | None = None
        self.needed = _ancestors(module)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.found is None and n.op == "call_function" and n in self.needed and _bad(result):
            operands = [(a, self.env[a]) for a in n.all_input_nodes if a in self.env]
            if not any(_bad(value) for _, value in operands) and not _meant(n):
                self.found = n, result, operands
        return result


def explain(joint: Joint, inputs: Sequence[Any], seed: Tensor, names: dict[str, tuple[str, str]]) -> Overflow | None:
    """The first overflow of a run, or None when all is finite.

    Args:
      inputs: what the joint graph reads, without the seed.
      names: node -> (module, source) for the nodes of the joint graph.
    """
    watch = Watch(joint.module)
    with torch.no_grad():
        watch.run(*inputs, seed)
    if watch.found is None:
        return None
    node, result, operands = watch.found
    value = next(t for t in _tensors(result) if not _finite(t))
    module, source = names.get(node.name, ("", ""))
    low = value.dtype in (torch.float16, torch.bfloat16)
    phase = "backward" if node.meta.get("partitioner_tag") == "is_backward" else "forward"
    ranges = tuple(
        (operand.name, _dtype(t), float(t.min()), float(t.max()))
        for operand, given in operands
        for t in _tensors(given)
        if t.numel()
    )
    made = "nan" if bool(value.isnan().any()) else "inf"
    override = f'mpcompile(model, …, keep_fp32=["{module}"])' if module and low else ""
    return Overflow(
        node.name, op_name(node.target), phase, module, source, made, _dtype(value), ranges, float(seed), override
    )


def _ancestors(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes that the loss and the gradients are made from."""
    found, stack = set[fx.Node](), [n for n in outputs_of(module) if isinstance(n, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _meant(node: fx.Node) -> bool:
    """True for a node that is told to make an infinity: a mask, a fill, a first maximum."""
    constants = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float)]
    return any(math.isinf(a) or math.isnan(a) for a in constants)


def _tensors(value: Any) -> list[Tensor]:
    several = value if isinstance(value, (list, tuple)) else [value]
    return [t for t in several if isinstance(t, Tensor) and t.is_floating_point()]


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _bad(value: Any) -> bool:
    return any(not _finite(t) for t in _tensors(value))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
