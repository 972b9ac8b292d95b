"""The elements of initializers, which are messages or tensors of `onnx_ir`: read, rounded, written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from mpcompile.formats import FORMATS

_STORABLE = [one for one in FORMATS if one.storable]
# numpy's own type, or ml_dtypes' where numpy has none.
NUMPY_TYPES: Mapping[str, Any] = {o.name: getattr(np, o.numpy, None) or getattr(ml_dtypes, o.numpy) for o in _STORABLE}
DATA_TYPES: Mapping[str, ir.DataType] = {one.name: ir.DataType[one.onnx] for one in _STORABLE}
FLOAT, FP32 = onnx.TensorProto.FLOAT, np.dtype(np.float32)
# Elements read at once when the range of a large tensor is taken.
SLICE = 1 << 24
# Tensors of no more than so many bytes are looked through together, so many at a time.
FEW, TOGETHER = 1 << 10, 1 << 12


def range_of(tensor: Any) -> tuple[float, float] | None:
    """Smallest and largest element of a float tensor, infinities included; None when it is empty or all NaN."""
    found = _range(flat(tensor))
    release(tensor)
    return found


def ranges_of(tensors: Sequence[Any]) -> list[tuple[float, float] | None]:
    """`range_of` each; small ones are looked through together, since each call of numpy takes longer than they do."""
    found: list[tuple[float, float] | None] = []
    for start in range(0, len(tensors), TOGETHER):
        part = tensors[start : start + TOGETHER]
        small = [_small(tensor) for tensor in part]
        told = iter(_ranges([held for held in small if held]))
        for tensor, held in zip(part, small, strict=True):
            known = next(told) if held else None
            found.append(known or range_of(tensor))
    return found


def _small(tensor: Any) -> bytes:
    """The bytes of a message with a few FP32 elements; none for any other tensor."""
    if not isinstance(tensor, onnx.TensorProto) or tensor.data_type != FLOAT:
        return b""
    held = tensor.raw_data
    return held if len(held) <= FEW and not len(held) % 4 else b""


def _ranges(held: Sequence[bytes]) -> list[tuple[float, float] | None]:
    """Smallest and largest element of each; None where there is a NaN, which asks for a closer look."""
    if not held:
        return []
    sizes = np.array([len(one) for one in held]) // 4
    starts, elements = np.cumsum(sizes) - sizes, np.frombuffer(b"".join(held), "<f4")
    ends = (np.minimum.reduceat(elements, starts).tolist(), np.maximum.reduceat(elements, starts).tolist())
    return [(low, high) if low == low else None for low, high in zip(*ends, strict=True)]


def flat(tensor: Any) -> Any:
    """The elements of a tensor, a message or one of `onnx_ir`, in one dimension; FP32 bytes without detours."""
    if isinstance(tensor, onnx.TensorProto):
        held = tensor.raw_data if tensor.data_type == FLOAT else b""
        if held:
            return np.frombuffer(held, "<f4")
    return as_object(tensor).numpy().reshape(-1)


def as_object(held: Any) -> Any:
    """The tensor of `onnx_ir` for a message; one of `onnx_ir` as it is."""
    return ir.serde.deserialize_tensor(held) if isinstance(held, onnx.TensorProto) else held


def release(tensor: Any) -> None:
    """Give back the memory through which a tensor's file was read; it is opened again when needed."""
    if not isinstance(tensor, onnx.TensorProto) and isinstance(tensor, ir.ExternalTensor):
        tensor.release()


def _range(array: Any) -> tuple[float, float] | None:
    low, high = math.inf, -math.inf
    for start in range(0, array.size, SLICE):
        part = array[start : start + SLICE]
        if part.dtype != np.float32:
            part = part.astype(np.float32)
        least, most = float(np.minimum.reduce(part)), float(np.maximum.reduce(part))
        if least != least:  # a NaN among them: look past it, which takes longer
            least, most = float(np.fmin.reduce(part)), float(np.fmax.reduce(part))
        low, high = min(low, least), max(high, most)
    return (low, high) if low <= high else None  # not so when there is nothing but NaN


def rounded(held: Any, to: str, dtype: str) -> Any:
    """The elements of a tensor, rounded to `to` and given as `dtype`."""
    low = flat(held).astype(NUMPY_TYPES[to])
    release(held)
    return low if dtype == to else low.astype(NUMPY_TYPES[dtype])


def lazy(held: Any, to: str, dtype: str, shape: Sequence[Any], name: str) -> ir.LazyTensor:
    """A promise to round a tensor."""

    def now() -> ir.Tensor[Any]:
        with np.errstate(over="ignore"):
            return ir.Tensor(rounded(held, to, dtype).reshape(shape), dtype=DATA_TYPES[dtype])

    return ir.LazyTensor(now, dtype=DATA_TYPES[dtype], shape=ir.Shape(shape), name=name)


def fill(made: onnx.TensorProto, held: Any) -> None:
    """Serialise a tensor whole, wherever its bytes are."""
    if isinstance(held, onnx.TensorProto):
        made.CopyFrom(held)
        return
    if not isinstance(held, ir.ExternalTensor):
        ir.serde.serialize_tensor_into(made, held)
        return
    made.data_type, made.name = int(held.dtype), held.name or ""
    made.dims.extend(held.shape.numpy())
    made.raw_data = held.tobytes()
    release(held)


__all__ = [
    "DATA_TYPES",
    "NUMPY_TYPES",
    "as_object",
    "fill",
    "flat",
    "lazy",
    "range_of",
    "ranges_of",
    "release",
    "rounded",
]
