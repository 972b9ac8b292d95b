"""Which types ONNX operators take: from the schemas themselves, and from the kernels that a provider has.

What an operand may be is the intersection of the two: the schema of the operator at the model's opset
(`onnx.defs`; for com.microsoft, the schemas that ONNX Runtime carries), and ``rules/onnx_kernels.toml``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any

import onnx

from mpcompile.formats import CASTABLE, FORMATS, LOW
from mpcompile.signature import UNKNOWN, Signature

# Names of ONNX's element types in the precision graph.
DTYPES: Mapping[str, str] = {
    **{one.onnx: one.name for one in FORMATS if one.storable}, "DOUBLE": "fp64", "COMPLEX64": "complex64",
    "COMPLEX128": "complex128", "UNDEFINED": "unknown",
}  # fmt: skip
FLOATS: Mapping[str, str] = {one.onnx_type: one.name for one in FORMATS if one.storable}
# Their result depends on attributes, bodies or containers: FP32 on every side.
FP32_SIDES = {
    "If", "Loop", "Scan", "Optional", "OptionalGetElement", "SequenceConstruct", "SequenceInsert", "SequenceAt",
    "SequenceEmpty", "SequenceErase", "SplitToSequence", "ConcatFromSequence", "SequenceMap", "OptionalHasElement",
}  # fmt: skip
# Type variables that the schema tells apart, but shape inference (and every kernel) takes for the same.
TIED = {"LinearAttention": {"S": "T"}}
# Result type given by an attribute, or by none of the operands.
DTYPE_ATTRIBUTES = {
    "RandomNormal", "RandomUniform", "ConstantOfShape", "HannWindow", "HammingWindow", "BlackmanWindow",
    "MelWeightMatrix", "Multinomial", "Constant", "EyeLike", "RandomNormalLike", "RandomUniformLike", "Bernoulli",
}  # fmt: skip


@cache
def dtype_name(element: int) -> str:
    """The precision graph's name of an element type.

    Raises:
      ValueError: when there is no such type.
    """
    name = onnx.TensorProto.DataType.Name(element)
    return DTYPES.get(name, name.lower())


@cache
def data_type(dtype: str) -> int:
    """The element type that the precision graph calls `dtype`."""
    return int(next(number for number in onnx.TensorProto.DataType.values() if dtype_name(number) == dtype))


def plain_domain(domain: str) -> str:
    """ONNX's own domain has two names: "" for both."""
    return "" if domain == "ai.onnx" else domain


def op_name(domain: str, op: str) -> str:
    """How the rules name an operator: "onnx::MatMul", "com.microsoft::FusedMatMul"."""
    return f"{plain_domain(domain) or 'onnx'}::{op}"


def op_of(name: str) -> tuple[str, str]:
    """(domain, operator) of what the rules call `name`."""
    domain, _, op = name.partition("::")
    return "" if domain == "onnx" else domain, op


@cache
def kernels() -> dict[str, dict[str, frozenset[str]]]:
    """Provider -> list name -> operators: the rows of ``onnx_kernels.toml``."""
    text = resources.files("mpcompile.rules").joinpath("onnx_kernels.toml").read_text(encoding="utf-8")
    return {name: {key: frozenset(ops) for key, ops in row.items()} for name, row in tomllib.loads(text).items()}


@cache
def signature(domain: str, op: str, opset: int, provider: str) -> Signature:
    """The type variables of `op`, and which precisions the schema and the kernels of `provider` allow.

    Args:
      provider: a row of ``onnx_kernels.toml``; "" for the schema alone.
    """
    schema = find_schema(domain, op, opset)
    if schema is None or (op in FP32_SIDES and not domain) or op in DTYPE_ATTRIBUTES:
        return Signature(why="its elements keep their type" if schema is not None else UNKNOWN.why)
    held = _kernel_types(op if not plain_domain(domain) else f"{domain}::{op}", provider)
    constraints = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}
    allowed: dict[str, frozenset[str]] = {}

    def variable(formal: Any) -> str:
        text = str(getattr(formal, "type_str", "") or getattr(formal, "typeStr", ""))
        text = TIED.get(op, {}).get(text, text)
        types = constraints.get(text, frozenset({text}))
        allowed[text] = frozenset(FLOATS[t] for t in types if t in FLOATS) & held
        return text

    inputs = tuple(variable(formal) for formal in schema.inputs)
    outputs = tuple(variable(formal) for formal in schema.outputs)
    refused = " and ".join(
        one.name for one in FORMATS if one.low and not any(one.name in types for types in allowed.values())
    )
    why = f"{op} has no {refused} in opset {opset}" + (f" on {provider}" if provider else "") if refused else ""
    return Signature(inputs, outputs, allowed, _variadic(schema.inputs), _variadic(schema.outputs), why)


def find_schema(domain: str, op: str, opset: int) -> Any:
    """The schema of `op` at `opset`, or None when nobody knows it."""
    domain = plain_domain(domain)
    try:
        return onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return _runtime_schemas().get((domain, op))


@cache
def may_have_bodies(domain: str, op: str) -> bool:
    """True when nodes of `op` may have graphs as attributes: those of unknown operators, too."""
    try:
        attributes = onnx.defs.get_schema(op, plain_domain(domain)).attributes
    except onnx.defs.SchemaError:
        return True
    kinds = onnx.defs.OpSchema.AttrType
    return any(attr.type in (kinds.GRAPH, kinds.GRAPHS) for attr in attributes.values())


@cache
def _runtime_schemas() -> dict[tuple[str, str], Any]:
    """The com.microsoft schemas that the installed ONNX Runtime carries."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        return {(s.domain, s.name): s for s in state.get_all_operator_schema() if s.domain == "com.microsoft"}
    except (ImportError, AttributeError):  # a build of ONNX Runtime without its schemas
        return {}


def _variadic(formals: Iterable[Any]) -> bool:
    return any(str(formal.option).endswith("Variadic") for formal in formals)


def _kernel_types(op: str, provider: str) -> frozenset[str]:
    """The precisions for which `provider` has a kernel of `op`, or can do without one."""
    row = kernels().get(provider, {})
    if op in row.get("none", ()):
        return frozenset({"fp32"})
    held = set(CASTABLE)
    held -= {low for low in LOW if op in row.get(f"no_{low}", ())}
    if "bf16" in row and op not in row["bf16"]:
        held.discard("bf16")
    return frozenset(held)
