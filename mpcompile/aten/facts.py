"""Facts about fx nodes: names, attributes, shapes, module paths, source lines, flops."""

from __future__ import annotations

import functools
import math
import os
import re
from typing import Any

import torch
from torch import fx

from mpcompile.formats import FORMATS
from mpcompile.graph import Value
from mpcompile.torch_internals.operators import HigherOrderOperator, OpOverload, name_of, schema_of

DTYPES: dict[torch.dtype, str] = {
    **{getattr(torch, one.torch): one.name for one in FORMATS}, torch.float64: "fp64",
    torch.complex64: "complex64", torch.complex128: "complex128", torch.complex32: "complex32",
}  # fmt: skip
TORCH_DTYPES: dict[str, torch.dtype] = {one.name: getattr(torch, one.torch) for one in FORMATS}
LOW_DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, one.torch) for one in FORMATS if one.low)
_TORCH_HOME = os.path.dirname(torch.__file__)
_OWN = tuple(
    os.path.join(os.path.dirname(os.path.dirname(__file__)), room) for room in ("training", "aten", "shadows", "onnx")
)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_CODE = re.compile(r'File "([^"]+)", line (\d+)[^\n]*\n +([^\n]+)')
_SMALL = 1 << 16
# Mark of a node that is the loss function's own, outside of the model.
LOSS_OWN = "mp_loss_own"


def dtype_name(dtype: torch.dtype) -> str:
    """fp32 | fp16 | bf16 | fp64 | complex64 | int64 | bool …"""
    return DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """What a node was given, at its place in the operation's schema or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def op_name(target: Any) -> str:
    """ "aten.linear.default", "mylib.op.default", "hop.cond", "builtin.getitem"."""
    if isinstance(target, OpOverload):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"hop.{name_of(target)}"
    # A call of the program's own Python that the graph keeps whole says itself what it is.
    return getattr(target, "mp_op", None) or f"builtin.{getattr(target, '__name__', str(target))}"


def value_of(name: str, sample: Any) -> Value:
    """A `Value` with the sample's dtype and shape; anything that is not a tensor is a "scalar" of no elements."""
    if not isinstance(sample, torch.Tensor):
        return Value(name, "scalar", (), 0)
    shape = tuple(s if isinstance(s, int) else str(s) for s in sample.shape)
    return Value(name, dtype_name(sample.dtype), shape, math.prod(hint(s) for s in sample.shape))


def hint(size: int | torch.SymInt) -> int:
    """The size that the trace was made with."""
    if isinstance(size, int):
        return size
    known = size.node.hint
    return int(known) if known is not None else 1


def range_of(tensor: Any) -> tuple[float, float] | None:
    """(min, max) of a small real constant."""
    if not isinstance(tensor, torch.Tensor) or type(tensor).__name__ == "FakeTensor":
        return None
    if not tensor.is_floating_point() or not 0 < tensor.numel() <= _SMALL or tensor.is_meta:
        return None
    return float(tensor.min()), float(tensor.max())


def attributes(node: fx.Node) -> dict[str, Any]:
    """Every non-tensor argument under its schema name, as plain data."""
    schema = schema_of(node.target)
    names = [a.name for a in schema.arguments] if schema is not None else []
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.args):
        _note(found, names[i] if i < len(names) else f"arg{i}", argument)
    for name, argument in node.kwargs.items():
        _note(found, name, argument)
    return found


def _note(found: dict[str, Any], name: str, argument: Any) -> None:
    if argument is None or isinstance(argument, fx.Node):
        return
    if isinstance(argument, (list, tuple)):
        if any(isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.Tensor) for a in argument):
            return
        found[name] = tuple(_plain(a) for a in argument)
        return
    found[name] = _plain(argument)


def _plain(item: Any) -> Any:
    if isinstance(item, (bool, int, float, str)) or item is None:
        return item
    if isinstance(item, torch.dtype):
        return dtype_name(item)
    return str(item)


def names_dtype(node: fx.Node) -> bool:
    """True when the op was told which dtype to give."""
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    if str(target) in ("prims.convert_element_type.default", "aten.to.dtype", "aten._to_copy.default"):
        return any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))
    schema = schema_of(target).arguments
    given = {schema[i].name: a for i, a in enumerate(node.args)} | dict(node.kwargs)
    return isinstance(given.get("dtype"), torch.dtype)


def module_path(node: fx.Node) -> str:
    """ "encoder.0.fc1": the innermost module that the node was called in; "" for the model itself."""
    if "mp_module" in node.meta:
        return str(node.meta["mp_module"])
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return _clean_path(str(list(stack.values())[-1][0]))


@functools.lru_cache(maxsize=4096)
def _clean_path(path: str) -> str:
    """ "L['self']._modules['h'][0].attn" -> "h.0.attn"; an exported path is clean already."""
    path = re.sub(r"getattr\((.*), ['\"](\w+)['\"]\)", r"\1.\2", path)
    path = re.sub(r"\.(_modules|_parameters|_buffers)\b", "", path)
    path = re.sub(r"\[['\"]?([\w.]+)['\"]?\]", r".\1", path)
    return re.sub(r"^L\.\w+\.?", "", path)


def source_line(node: fx.Node) -> str:
    """ "model.py:41": the innermost frame of the user's own code (frames inside torch, and our wrappers, are skipped)."""
    frames = _frames(node.meta.get("stack_trace") or "")
    return frames[-1] if frames else ""


@functools.lru_cache(maxsize=4096)
def _frames(trace: str) -> tuple[str, ...]:
    found = [(path, line) for path, line in _FRAME.findall(trace) if not path.startswith((_TORCH_HOME, *_OWN))]
    return tuple(f"{os.path.basename(path)}:{line}" for path, line in found)


def code_lines(graph: fx.Graph) -> dict[str, str]:
    """The user's own code by place, {"model.py:41": "x = self.head(x)"}; of two files of one name neither is told."""
    found: dict[str, set[str]] = {}
    for trace in {node.meta.get("stack_trace") or "" for node in graph.nodes}:
        for path, line, code in _CODE.findall(trace):
            if not path.startswith((_TORCH_HOME, *_OWN)):
                found.setdefault(f"{os.path.basename(path)}:{line}", set()).add(code.strip())
    return {place: next(iter(codes)) for place, codes in found.items() if len(codes) == 1}
