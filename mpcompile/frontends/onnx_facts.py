"""What the ONNX front end knows of values and nodes: sizes, ranges, work, module path and source line."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

# Stand-ins for dimensions and ranks that are known only when the model runs; they weigh costs, nothing else.
DIM_HINT = 64
NUMEL_HINT = 65536
# Elements read at once when the range of a large tensor is taken.
SLICE = 1 << 24
SMALL = 16
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def shape_of(value: ir.Value) -> tuple[tuple[int | str, ...], int]:
    """Shape, with names for symbolic dimensions, and number of elements (a hint where it is not known)."""
    if value.shape is None:
        return (), NUMEL_HINT if value.dtype is not None and value.const_value is None else 1
    shape = tuple(d if isinstance(d, int) else str(d.value or "?") for d in value.shape)
    return shape, math.prod(d if isinstance(d, int) else DIM_HINT for d in shape)


def range_of(tensor: Any) -> tuple[float, float] | None:
    """Smallest and largest element of a float tensor, infinities included; None when it is empty or all NaN."""
    if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return None
    found = _range(flat(tensor))
    release(tensor)
    return found


def flat(tensor: Any) -> Any:
    """The elements of a tensor in one dimension; of a message's FP32 bytes without `onnx_ir`'s detours."""
    message = tensor.raw if isinstance(tensor, ir.TensorProtoTensor) else None
    if message is not None and message.data_type == ir.DataType.FLOAT:
        held = message.raw_data
        if held:
            return np.frombuffer(held, "<f4")
    return tensor.numpy().reshape(-1)


def release(tensor: Any) -> None:
    """Give back the memory through which a tensor's file was read; it is opened again when needed."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


def _range(array: Any) -> tuple[float, float] | None:
    low, high = math.inf, -math.inf
    for start in range(0, array.size, SLICE):
        part = array[start : start + SLICE]
        if part.dtype != np.float32:
            part = part.astype(np.float32)
        least, most = float(part.min()), float(part.max())
        if least != least:  # a NaN among them: look past it, which takes longer
            least, most = float(np.fmin.reduce(part)), float(np.fmax.reduce(part))
        low, high = min(low, least), max(high, most)
    return (low, high) if low <= high else None  # not so when there is nothing but NaN


def attributes(node: ir.Node) -> dict[str, Any]:
    """Attributes as plain data: numbers, strings, lists of them; small tensors as lists; graphs left out."""
    plain: dict[str, Any] = {}
    for name, attr in node.attributes.items():
        if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attr.is_ref():
            continue
        if attr.type == ir.AttributeType.TENSOR:
            if attr.value.size <= SMALL and attr.value.dtype != ir.DataType.STRING:
                plain[name] = np.asarray(attr.value.numpy(), dtype=object).tolist()
        elif attr.type in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
            plain[name] = attr.value
        elif attr.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
            plain[name] = list(attr.value)
    return plain


def origin_of(node: ir.Node) -> tuple[str, str]:
    """Module path and source line of a node; "" where nothing is known."""
    props = node.metadata_props
    if props:
        return module_of(node), source_of(node)
    return (module_of(node) if (node.name or "").startswith("/") else ""), ""


def module_of(node: ir.Node) -> str:
    """Module path: from torch's exporters' metadata, else from a name such as "/encoder/layer.0/MatMul"."""
    props = node.metadata_props
    kept = props.get("mpcompile.module")
    if kept is not None:
        return kept
    scopes = props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        names = _literal(scopes)
        return str(names[-2]) if len(names) > 1 else ""
    name = node.name or ""
    return name.strip("/").rpartition("/")[0].replace("/", ".") if name.startswith("/") else ""


def source_of(node: ir.Node) -> str:
    """File and line ("model.py:41") from the exporter's stack trace; "" when there is none."""
    props = node.metadata_props
    if "mpcompile.source" in props:
        return props["mpcompile.source"]
    frames = _FRAME.findall(props.get("pkg.torch.onnx.stack_trace", ""))
    if not frames:
        return ""
    file, line = frames[-1]
    return f"{file.rpartition('/')[2]}:{line}"


def flops_of(node: ir.Node) -> int:
    """Floating-point operations of matmuls and convolutions, counted as multiply and add; 0 for everything else."""
    count = _FLOPS.get(node.op_type)
    if count is None or len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return 0
    left, right, out = (_sizes(v) for v in (node.inputs[0], node.inputs[1], node.outputs[0]))
    if not left or not right:
        return 0
    return int(count(node, left, right, out))


def _sizes(value: ir.Value) -> list[int]:
    if value.shape is None:
        return []
    return [d if isinstance(d, int) else DIM_HINT for d in value.shape]


def _matmul(node: ir.Node, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> int:
    return 2 * math.prod(out or left) * left[-1]


def _gemm(node: ir.Node, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> int:
    return 2 * math.prod(left) * (right[0] if _int(node, "transB") else right[-1])


def _conv(node: ir.Node, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> int:
    return 2 * math.prod(out or left) * math.prod(right[1:])


def _conv_transpose(node: ir.Node, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> int:
    return 2 * math.prod(left) * math.prod(right[1:])


_FLOPS = {
    "MatMul": _matmul, "FusedMatMul": _matmul, "TransposeMatMul": _matmul, "Gemm": _gemm, "FusedGemm": _gemm,
    "Conv": _conv, "FusedConv": _conv, "NhwcFusedConv": _conv, "ConvTranspose": _conv_transpose,
}  # fmt: skip


def _int(node: ir.Node, name: str) -> int:
    attr = node.attributes.get(name)
    return int(attr.value) if attr is not None else 0


def _literal(text: str) -> list[Any]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return list(value) if isinstance(value, Iterable) else []
