"""The update of a rank's share, with the gathering of what it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mpcompile.aten.graphs import inputs_of
from mpcompile.torch_internals.tensors import FakeTensorMode
from mpcompile.training.distributed.shares import Shares


@dataclass
class SharedUpdate:
    """An update of pieces, ready to run (the same interface as the one `inside`)."""

    inside: Any
    shares: Shares
    epoch: int = -1

    def __call__(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """(finite, norm, scale) after the update; everything else is written in place, on all ranks."""
        results: Sequence[Tensor] = self.inside(grads)
        self.shares.spread()
        return results

    @property
    def binding(self) -> Any:
        return self.inside.binding

    @property
    def scale(self) -> Any:
        return self.inside.scale

    @property
    def seed(self) -> Tensor:
        found: Tensor = self.inside.seed
        return found

    @property
    def numbers(self) -> Tensor:
        found: Tensor = self.inside.numbers
        return found

    def holds(self) -> bool:
        """Take in the groups' numbers; False when they need another update."""
        return bool(self.inside.holds())

    def emit(self) -> tuple[fx.GraphModule, list[Tensor | int]]:
        """The update's graph, and what each input is: a live tensor, or the number of a gradient."""
        module, needs = self.inside.emit()
        function, tensors = self.shares.spreading()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [mode.from_tensor(t.detach(), static_shapes=True) for t in tensors]
        with mode, torch.no_grad():
            second = make_fx(function, _allow_non_fake_inputs=True)(*fakes)
        return _then(module, list(needs), second, tensors)


def _then(
    module: fx.GraphModule, needs: list[Tensor | int], second: fx.GraphModule, tensors: Sequence[Tensor]
) -> tuple[fx.GraphModule, list[Tensor | int]]:
    """One graph that does `module`, then `second`; inputs that are one tensor are one."""
    graph, inputs = module.graph, inputs_of(module)
    known = {id(need): node for node, need in zip(inputs, needs, strict=True) if not isinstance(need, int)}
    last, env = inputs[-1], dict[fx.Node, fx.Node]()
    for node, tensor in zip(inputs_of(second), tensors, strict=True):
        if id(tensor) not in known:
            with graph.inserting_after(last):
                last = known[id(tensor)] = graph.placeholder(f"gathered_{len(needs)}")
            last.meta.update(node.meta)
            needs.append(tensor)
        env[node] = known[id(tensor)]
    with graph.inserting_before(graph.output_node()):
        for node in second.graph.nodes:
            if node.op not in ("placeholder", "output"):
                env[node] = graph.node_copy(node, env.__getitem__)
    module.recompile()
    return module, needs


__all__ = ["SharedUpdate"]
