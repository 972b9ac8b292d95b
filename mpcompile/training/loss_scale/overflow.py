"""Which node overflowed: run the joint graph node by node, and name the first that makes a non-finite number.

"First" leaves out nodes that pass on what they read, and those that are told to make an infinity (masks).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import LOW_DTYPES, op_name
from mpcompile.aten.graphs import inputs_of, outputs_of
from mpcompile.training.emitted.weave import Place
from mpcompile.training.gradients.joint import Joint

_PASSES = ("aten._to_copy", "aten.to", "prims.convert_element_type", "aten.view", "aten.reshape", "aten._unsafe_view",
           "aten.transpose", "aten.permute", "aten.expand", "aten.clone")  # fmt: skip
_PRODUCTS = ("aten.mm.", "aten.bmm.", "aten.addmm.", "aten.baddbmm.", "aten.convolution")


@dataclass(frozen=True)
class Overflow:
    """The first node of a step that made a non-finite number.

    Fields:
      node, op, phase: "mm_3", "aten.mm.default", "forward" or "backward".
      module, source: the user's module path and line of the forward node that it is, or whose gradient it computes.
      made: "inf" or "nan"; dtype: of what it made.
      inputs: (what, dtype, smallest, largest) of each floating input.
      scale: the loss scale of the run.
      override: the argument of `mpcompile()` that would keep the node, and who reads it, FP32; "" where that would
        not help.
      rank: whose batch it was, where several ranks train together.
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
    rank: int | None = None

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.module and f"module {self.module}", self.source) if part)
        whose = "" if self.rank is None else f"rank {self.rank}: "
        lines = [
            f"{whose}{self.made} in the {self.phase}: {self.node} ({self.op}, {self.dtype}) {where and f'at {where}'}"
        ]
        lines += [f"  reads {what} ({dtype}) in [{low:.4g}, {high:.4g}]" for what, dtype, low, high in self.inputs]
        lines.append(f"  loss scale {self.scale:g}")
        if self.override:
            lines.append(f"  try {self.override}")
        return "\n".join(lines)


class FirstNonFinite(fx.Interpreter):
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


def explain(joint: Joint, inputs: Sequence[Any], seed: Tensor, names: dict[str, Place]) -> Overflow | None:
    """The first overflow of a run, or None when all is finite.

    Args:
      inputs: what the joint graph reads, without the seed.
      names: the places of the nodes of the joint graph.
    """
    seen = FirstNonFinite(joint.module)
    with torch.no_grad():
        results = seen.run(*inputs, seed)
    if seen.found is None:
        return _given(joint, [*inputs, seed], float(seed)) if any(map(_bad, results)) else None
    node, result, operands = seen.found
    node = _computed(node)
    value = next(t for t in _tensors(result) if not _finite(t))
    module, source, _ = names.get(node.name, Place())
    phase = _phase(node)
    ranges = tuple(
        (operand.name, _dtype(t), float(_wide(t).min()), float(_wide(t).max()))
        for operand, given in operands
        for t in _tensors(given)
        if t.numel()
    )
    keep = _keep(node, names) if value.dtype in LOW_DTYPES else []
    override = f"mpcompile(model, …, keep_fp32={json.dumps(keep)})" if keep else ""
    return Overflow(
        node.name,
        op_name(node.target),
        phase,
        module,
        source,
        _made(value),
        _dtype(value),
        ranges,
        float(seed),
        override,
    )


def _computed(node: fx.Node) -> fx.Node:
    """Where FP16 is emulated a product computes in FP32, and a cast rounds its result: then the product is meant."""
    before: Any = node
    while isinstance(before, fx.Node) and op_name(before.target).startswith(_PASSES):
        before = before.args[0]
    return before if isinstance(before, fx.Node) and op_name(before.target).startswith(_PRODUCTS) else node


def _keep(node: fx.Node, names: dict[str, Place]) -> list[str]:
    """What to keep FP32: the node, and in the forward who reads it in the low type, or the number would overflow there."""
    readers = [user for user in node.users if _phase(user) == _phase(node)]
    cast = op_name(node.target).startswith(("aten._to_copy", "aten.to", "prims.convert_element_type"))
    wanted = readers if cast else [node, *(readers if _phase(node) == "forward" else ())]
    # Through a cast of ours, and a view: to who computes with it.
    for reader in wanted:
        if op_name(reader.target).startswith(_PASSES):
            wanted += [user for user in reader.users if user not in wanted and _phase(user) == _phase(node)]
    # A cast whose readers have no place of their own is that of its module.
    places = [names.get(one.name, Place()) for one in wanted]
    if not any(place.module or place.node for place in places):
        places = [names.get(node.name, Place())]
    return list(dict.fromkeys(place.module or place.node for place in places if place.module or place.node))


def _given(joint: Joint, inputs: Sequence[Any], scale: float) -> Overflow | None:
    """No node made it: what the step was given is not finite."""
    known = [one.name if one.kind in ("param", "shadow", "buffer") else "" for one in joint.forward.inputs]
    for node, value, held in zip(inputs_of(joint.module), inputs, [*known, ""], strict=True):
        if _bad(value):
            name = held or str(node.meta.get("mp_name") or node.name)
            bad = next(t for t in _tensors(value) if not _finite(t))
            return Overflow(name, "input", "forward", "", "", _made(bad), _dtype(bad), (), scale, "")
    return None


def _made(value: Tensor) -> str:
    return "nan" if bool(_wide(value).isnan().any()) else "inf"


def _phase(node: fx.Node) -> str:
    return "backward" if node.meta.get("partitioner_tag") == "is_backward" else "forward"


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


def _wide(tensor: Tensor) -> Tensor:
    """Of FP8 torch compares and reduces nothing."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(_wide(tensor)).all())


def _bad(value: Any) -> bool:
    return any(not _finite(t) for t in _tensors(value))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
