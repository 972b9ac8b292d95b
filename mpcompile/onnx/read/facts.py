"""What the ONNX front end knows of values and nodes: sizes, ranges, work, module path and source line."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from mpcompile.graph import Node, Value
from mpcompile.onnx.schema import dtype_name

# Stand-ins for dimensions and ranks that are known only when the model runs; they weigh costs, nothing else.
DIM_HINT = 64
NUMEL_HINT = 65536
SMALL = 16
FLOAT = onnx.TensorProto.FLOAT
CONTAINERS = {"sequence_type": "sequence", "optional_type": "optional"}
# dtype, shape with names for symbolic dimensions, and number of elements (a hint where it is not known).
Known = tuple[str, tuple[int | str, ...], int]
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def type_of(message: onnx.TypeProto) -> Known:
    """What is known of a value from its type; a container has the shape of what it holds.

    Raises:
      ValueError: for an element type that there is not.
    """
    kind = outer = message.WhichOneof("value")
    while kind in CONTAINERS:
        message = getattr(message, kind).elem_type
        kind = message.WhichOneof("value")
    if kind not in ("tensor_type", "sparse_tensor_type"):
        return ("unknown", (), 1) if outer == kind else (CONTAINERS[outer], (), 1)
    tensor = getattr(message, kind)
    dtype = CONTAINERS.get(outer) or dtype_name(tensor.elem_type)
    if not tensor.HasField("shape"):
        return dtype, (), NUMEL_HINT if tensor.elem_type else 1
    shape = tuple([d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim])
    return dtype, shape, math.prod([d if isinstance(d, int) else DIM_HINT for d in shape])


def attributes(given: Iterable[onnx.AttributeProto]) -> dict[str, Any]:
    """Attributes as plain data: numbers, strings, lists of them; small tensors as lists; graphs left out."""
    plain: dict[str, Any] = {}
    for attr in given:
        read = _PLAIN.get(attr.type)
        if read is not None and not attr.ref_attr_name:
            plain[attr.name] = read(attr)
        elif attr.type == onnx.AttributeProto.TENSOR and not attr.ref_attr_name:
            tensor = ir.serde.deserialize_tensor(attr.t)
            if tensor.size <= SMALL and tensor.dtype != ir.DataType.STRING:
                plain[attr.name] = np.asarray(tensor.numpy(), dtype=object).tolist()
    return plain


def _text(given: bytes) -> str:
    return given.decode(errors="replace")


_PLAIN: dict[int, Callable[[onnx.AttributeProto], Any]] = {
    onnx.AttributeProto.INT: lambda attr: attr.i,
    onnx.AttributeProto.FLOAT: lambda attr: attr.f,
    onnx.AttributeProto.STRING: lambda attr: _text(attr.s),
    onnx.AttributeProto.INTS: lambda attr: attr.ints[:],
    onnx.AttributeProto.FLOATS: lambda attr: attr.floats[:],
    onnx.AttributeProto.STRINGS: lambda attr: [_text(text) for text in attr.strings],
}


def module_of(name: str, props: Mapping[str, str]) -> str:
    """Module path: from torch's exporters' metadata, else from a name such as "/encoder/layer.0/MatMul"."""
    kept = props.get("mpcompile.module")
    if kept is not None:
        return kept
    scopes = props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        names = _literal(scopes)
        return str(names[-2]) if len(names) > 1 else ""
    return name.strip("/").rpartition("/")[0].replace("/", ".") if name.startswith("/") else ""


def source_of(props: Mapping[str, str]) -> str:
    """File and line ("model.py:41") from the exporter's stack trace; "" when there is none."""
    if "mpcompile.source" in props:
        return props["mpcompile.source"]
    frames = _FRAME.findall(props.get("pkg.torch.onnx.stack_trace", ""))
    if not frames:
        return ""
    file, line = frames[-1]
    return f"{file.rpartition('/')[2]}:{line}"


def flops_of(node: Node, op: str, values: Mapping[str, Value]) -> int:
    """Floating-point operations of an `op` of `FLOPS`, counted as multiply and add; 0 where sizes are not known."""
    if node.slots[:2] != (0, 1):
        return 0
    left, right, out = (_sizes(values[name]) for name in (*node.inputs[:2], node.outputs[0]))
    return FLOPS[op](node, left, right, out) if left and right else 0


def _sizes(value: Value) -> list[int]:
    return [d if isinstance(d, int) else DIM_HINT for d in value.shape]


def _matmul(node: Node, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> int:
    return 2 * math.prod(out or left) * left[-1]


def _gemm(node: Node, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> int:
    return 2 * math.prod(left) * (right[0] if node.attrs.get("transB") else right[-1])


def _conv(node: Node, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> int:
    return 2 * math.prod(out or left) * math.prod(right[1:])


def _conv_transpose(node: Node, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> int:
    return 2 * math.prod(left) * math.prod(right[1:])


FLOPS = {
    "MatMul": _matmul, "FusedMatMul": _matmul, "TransposeMatMul": _matmul, "Gemm": _gemm, "FusedGemm": _gemm,
    "Conv": _conv, "FusedConv": _conv, "NhwcFusedConv": _conv, "ConvTranspose": _conv_transpose,
}  # fmt: skip


def _literal(text: str) -> list[Any]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return list(value) if isinstance(value, Iterable) else []
