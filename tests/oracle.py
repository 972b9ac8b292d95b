"""torch.autocast on CUDA as an oracle, on any machine: fake tensors that claim to be on a CUDA device go through the
installed torch's own autocast kernels, which decide dtypes and compute nothing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

CUDA = torch.device("cuda:0")
FLOATS = (torch.float32, torch.bfloat16)
# On no list, asks cuDNN before it looks at dtypes, and gives the dtype of its first operand.
NEEDS_CUDA = (torch.ops.aten.batch_norm.default,)


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[FakeTensorMode]:
    """Fake tensors, CUDA autocast on: `torch.autocast("cuda")` itself refuses where there is no device."""
    was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with FakeTensorMode() as mode, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield mode
    finally:
        torch.set_autocast_enabled("cuda", was[0])
        torch.set_autocast_dtype("cuda", was[1])
        torch.clear_autocast_cache()


def on_cuda(tensor: torch.Tensor, floats: torch.dtype | None = None) -> torch.Tensor:
    """An empty tensor like `tensor` on the fake device; `floats` replaces its dtype when that is FP32 or BF16."""
    dtype = floats if floats is not None and tensor.dtype in FLOATS else tensor.dtype
    return torch.empty_strided(tuple(tensor.shape), tuple(tensor.stride()), dtype=dtype, device=CUDA)


def moved(item: Any) -> Any:
    return CUDA if isinstance(item, torch.device) else item


def output_dtypes(node: fx.Node, floats: torch.dtype) -> list[torch.dtype]:
    """What CUDA autocast makes the outputs of an ATen node when all its floating operands are `floats`."""
    with cuda_autocast():

        def fill(item: Any) -> Any:
            value = item.meta["val"] if isinstance(item, fx.Node) else item
            return pytree.tree_map(lambda v: on_cuda(v, floats) if isinstance(v, torch.Tensor) else v, value)

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), fill)
        result = node.target(*pytree.tree_map(moved, args), **pytree.tree_map(moved, kwargs))  # type: ignore[operator]
        return [leaf.dtype for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


class Recorder(fx.Interpreter):
    """Runs an ATen graph on the fake device under CUDA autocast, and keeps every node's dtypes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.dtypes: dict[str, list[torch.dtype]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr"):
            value = n.meta.get("val")
            value = self.fetch_attr(str(n.target)) if value is None and n.op == "get_attr" else value
            return on_cuda(value) if isinstance(value, torch.Tensor) else value
        result = super().run_node(n)
        if n.op == "call_function":
            self.dtypes[n.name] = [v.dtype for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]
        return pytree.tree_map(_compact, result)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in NEEDS_CUDA:
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=CUDA)
        return super().call_function(target, pytree.tree_map(moved, args), pytree.tree_map(moved, kwargs))


def _compact(item: Any) -> Any:
    """Strides need code of CUDA builds, and dtypes do not depend on them."""
    if not isinstance(item, torch.Tensor) or item.is_contiguous():
        return item
    return torch.empty(item.shape, dtype=item.dtype, device=item.device)


def recorded(module: fx.GraphModule) -> dict[str, list[torch.dtype]]:
    """Node name -> the dtypes of its outputs under CUDA autocast; the graph's inputs keep their own."""
    recorder = Recorder(module)
    with cuda_autocast():
        recorder.run(*[None for n in module.graph.nodes if n.op == "placeholder"])
    return recorder.dtypes
