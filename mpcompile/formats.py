"""Number formats: one row each, and the tables that other rooms derive from the rows.

What a format is called in torch, ONNX and numpy, how many bytes it takes, what it can hold, and how reports draw it.
A new format is one row of `FORMATS`.  This room knows no framework: names stand for their types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """One floating-point format.

    Fields:
      name: in the precision graph, policies and reports.
      bytes: of one element.
      significand: bits of the significand, the hidden one included; eps is 2 ** (1 - significand).
      largest: the largest finite number; smallest_normal, smallest: the smallest positive normal and subnormal number.
      storable: values may be stored so between nodes; a format that is not is only a form in which a product reads.
      low: a low type of policies.
      torch, onnx, numpy: names of the type (``torch.<torch>``, ``TensorProto.<onnx>``, numpy's or ml_dtypes').
      onnx_type: in type constraints of ONNX's schemas.
      colour, fill: in terminals (rich) and in pictures (hex).
    """

    name: str
    bytes: int
    significand: int
    largest: float
    smallest_normal: float
    smallest: float
    storable: bool
    low: bool
    torch: str
    onnx: str
    numpy: str
    colour: str
    fill: str

    @property
    def onnx_type(self) -> str:
        return f"tensor({self.onnx.lower()})"


# IEEE 754 binary32 and binary16; bfloat16; FP8 as in the OCP's 8-bit formats (E4M3 has no infinity: "fn").
FORMATS: tuple[Format, ...] = (
    Format("fp32", 4, 24, 3.4028234663852886e38, 2.0**-126, 2.0**-149, True, False,
           "float32", "FLOAT", "float32", "yellow", "#fdd49e"),
    Format("fp16", 2, 11, 65504.0, 2.0**-14, 2.0**-24, True, True,
           "float16", "FLOAT16", "float16", "green", "#c7e9c0"),
    Format("bf16", 2, 8, 3.3895313892515355e38, 2.0**-126, 2.0**-133, True, True,
           "bfloat16", "BFLOAT16", "bfloat16", "green", "#c7e9c0"),
    Format("float8_e4m3fn", 1, 4, 448.0, 2.0**-6, 2.0**-9, False, False,
           "float8_e4m3fn", "FLOAT8E4M3FN", "float8_e4m3fn", "cyan", "#9ecae1"),
    Format("float8_e5m2", 1, 3, 57344.0, 2.0**-14, 2.0**-16, False, False,
           "float8_e5m2", "FLOAT8E5M2", "float8_e5m2", "cyan", "#9ecae1"),
)  # fmt: skip

FORMAT: Mapping[str, Format] = {one.name: one for one in FORMATS}
LOW: frozenset[str] = frozenset(one.name for one in FORMATS if one.low)
# What casts go between.
CASTABLE: frozenset[str] = frozenset(one.name for one in FORMATS if one.storable)
# Bytes of an element, of what is never cast too.
ITEMSIZE: Mapping[str, int] = {
    **{one.name: one.bytes for one in FORMATS},
    "fp64": 8, "complex128": 16, "complex64": 8, "complex32": 4,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
}  # fmt: skip
LARGEST: Mapping[str, float] = {one.name: one.largest for one in FORMATS}
SMALLEST_NORMAL: Mapping[str, float] = {one.name: one.smallest_normal for one in FORMATS}
SIGNIFICAND_BITS: Mapping[str, int] = {one.name: one.significand for one in FORMATS}
# What is smaller rounds to zero: half of the smallest subnormal number.
ROUNDS_TO_ZERO: Mapping[str, float] = {one.name: one.smallest / 2 for one in FORMATS}
