"""Keep every operand and result to the types that the operation's schema and the target's kernels allow.

A front end whose operations have typed schemas (ONNX) hands over one `Signature` per node: which operands and results
share a type variable, and which precisions that variable may be.  From it follow, once `classify` has given verdicts:

- a node whose main variable (that of its first result) may not be the low type stays FP32;
- operands and results of any other variable that may not be low are pinned to FP32, whatever the node's precision;
- a node that reads a constant which the low type cannot hold (a variance of 1e7) stays FP32;
- what the model has in half precision already is left as it is;
- arithmetic that ends in integers (a float size turned into a shape) stays FP32: a rounded index is another index;
- what stands between dequantize and quantize stays FP32, so that a runtime still finds its quantized patterns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

from mpcompile.formats import CASTABLE, LARGEST, LOW, SIGNIFICAND_BITS
from mpcompile.graph import CAST_OP, Node, PrecisionGraph, Value
from mpcompile.passes.base import PassResult
from mpcompile.rules.hazards import BOUNDS, NO_BOUND, base
from mpcompile.signature import UNKNOWN, Signature

FP32_ONLY = frozenset({"fp32"})
# How many operations back from an integer the FP32 arithmetic reaches.
INDEX_HOPS = 8


@dataclass(frozen=True)
class Legalize:
    """Fields:
    low: the low type of the policy.
    signatures: node id -> signature; a node without one takes and gives FP32 only.
    quantize, dequantize: the operations that bound a quantized pattern.
    """

    low: str
    signatures: Mapping[str, Signature] = field(default_factory=dict)
    quantize: tuple[str, ...] = ("onnx::QuantizeLinear", "com.microsoft::QuantizeLinear")
    dequantize: tuple[str, ...] = ("onnx::DequantizeLinear", "com.microsoft::DequantizeLinear")

    name: ClassVar[str] = "legalize"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        changed = False
        seen: dict[tuple[object, ...], bool] = {}
        large = {name for name, value in graph.values.items() if value.range is not None and self._is_large(value)}
        for node in graph.nodes.values():
            if not self._is_plain(graph, node, seen) or not large.isdisjoint(node.inputs):
                before = _state(node)
                self._types(graph, node)
                changed |= before != _state(node)
        for node, reason in (*self._quantized(graph), *_feeds_integers(graph)):
            changed |= node.raise_to_fp32(reason, "rule", must=True)
        return PassResult(changed)

    def _is_large(self, value: Value) -> bool:
        limit = _overflow(self.low)
        return value.range is not None and any(abs(end) >= limit for end in value.range)

    def _is_plain(self, graph: PrecisionGraph, node: Node, seen: dict[tuple[object, ...], bool]) -> bool:
        """True for a node that `_types` would leave alone but for what its constants are.

        Most nodes are alike: `seen` holds the answer for each sort.
        """
        if node.operands or node.results or node.out_dtype or node.kind == "cast" or node.op == CAST_OP:
            return False
        signature, values = self.signatures.get(node.id, UNKNOWN), graph.values
        # By identity: a signature has no hash, and the nodes of one operation share it.
        key = id(signature), *node.slots, *[values[name].dtype for name in (*node.inputs, *node.outputs)]
        plain = seen.get(key)
        if plain is None:
            given, made = [[values[name].dtype for name in names] for names in (node.inputs, node.outputs)]
            plain = seen[key] = self._has_one_type(signature, node.slots, given, made)
        return plain

    def _has_one_type(self, signature: Signature, slots: Sequence[int], given: list[str], made: list[str]) -> bool:
        """True when all floats of such a node are of one type variable, which may be low; or when it has none."""
        found = {*given, *made}
        if not LOW.isdisjoint(found) or "unknown" in found:
            return False
        reads, gives = dict(zip(slots, given, strict=True)), dict(enumerate(made))
        main = _main(signature, reads, gives)
        variables = {signature.input(slot) for slot, dtype in reads.items() if dtype in CASTABLE}
        one = len(gives) == 1 and variables <= {main} and self.low in signature.allowed.get(main, FP32_ONLY)
        return one or CASTABLE.isdisjoint(found)

    def _types(self, graph: PrecisionGraph, node: Node) -> None:
        """Hold `node` to its signature."""
        if node.is_cast or node.kind == "cast":
            return
        values = graph.values
        reads = {slot: values[name].dtype for slot, name in zip(node.slots, node.inputs, strict=True)}
        gives = {index: values[name].dtype for index, name in enumerate(node.outputs)}
        found = {*reads.values(), *gives.values()}
        if not node.out_dtype and not LOW.isdisjoint(found):
            _leave(node, reads, gives)
            return
        if CASTABLE.isdisjoint(found):
            return
        signature = self.signatures.get(node.id, UNKNOWN)
        main = _main(signature, reads, gives)
        if "unknown" in found and main in _unknown(signature, reads, gives):
            why = "the type of one of its operands is not known, and the others share it"
            node.raise_to_fp32(why, "rule", must=True)
        if node.verdict != "fp32" and self.low not in signature.allowed.get(main, FP32_ONLY):
            node.raise_to_fp32(signature.why or f"its type may not be {self.low}", "rule", must=True)
        elif node.decided_by != "override" and (size := self._too_large(graph, node)):
            why = f"a constant of {size:.4g} is beyond {self.low}'s largest number, {LARGEST[self.low]:.6g}"
            node.raise_to_fp32(why, must=True)
        self._pins(node, signature, main, reads, gives)

    def _too_large(self, graph: PrecisionGraph, node: Node) -> float:
        """The largest finite constant operand, when the low type cannot hold it; FLT_MAX as a bound means no bound."""
        limit = _overflow(self.low)
        for name in node.inputs:
            value = graph.values[name]
            if value.range is None or value.dtype != "fp32":
                continue
            for end in map(abs, value.range):
                if limit <= end < (NO_BOUND if base(node.op) in BOUNDS else math.inf):
                    return end
        return 0.0

    def _pins(self, node: Node, signature: Signature, main: str, reads: dict[int, str], gives: dict[int, str]) -> None:
        """Pin each operand and result whose type variable is not the main one and must be FP32."""
        variables = {signature.input(slot) for slot, dtype in reads.items() if dtype in CASTABLE}
        if variables <= {main} and not node.operands and len(gives) == 1:
            return  # nothing but the main variable
        pinned = {signature.input(slot) for slot, to in node.operands.items() if to == "fp32" and slot in reads}
        if main in pinned and node.verdict != "fp32":
            node.raise_to_fp32("one of its operands stays FP32, and the others share its type", "rule", must=True)
        for slot, dtype in reads.items():
            variable = signature.input(slot)
            if dtype not in CASTABLE or variable == main:
                continue
            if variable in pinned or self.low not in signature.allowed.get(variable, FP32_ONLY):
                node.operands = {**node.operands, slot: "fp32"}
            elif node.operands.get(slot) == "any":
                del node.operands[slot]
        for index, dtype in gives.items():
            variable = signature.output(index)
            free = variable not in variables and variable != main
            refused = variable in pinned or self.low not in signature.allowed.get(variable, FP32_ONLY)
            if dtype in CASTABLE and variable != main and (free or refused):
                node.results = {**node.results, index: "fp32"}

    def _quantized(self, graph: PrecisionGraph) -> Iterator[tuple[Node, str]]:
        if {*self.quantize, *self.dequantize}.isdisjoint([node.op for node in graph]):
            return
        readers = {name for node in graph if node.op in self.quantize for name in node.inputs}
        for node in graph:
            maker = (graph.producer(name) for name in node.inputs)
            if any(m is not None and m.op in self.dequantize for m in maker) or readers & set(node.outputs):
                yield node, "part of a quantized pattern"


@cache
def _overflow(low: str) -> float:
    """From half a step above the largest number on, rounding gives infinity."""
    return LARGEST[low] * (1 + 2.0 ** -(SIGNIFICAND_BITS[low] + 1))


def _main(signature: Signature, reads: dict[int, str], gives: dict[int, str]) -> str:
    """The type variable that the node's precision speaks of: that of its first float result, else operand."""
    for index, dtype in gives.items():
        if dtype in CASTABLE:
            return signature.output(index)
    return next((signature.input(slot) for slot, dtype in reads.items() if dtype in CASTABLE), "")


def _unknown(signature: Signature, reads: dict[int, str], gives: dict[int, str]) -> set[str]:
    """The type variables of values whose types nobody knows."""
    found = {signature.input(slot) for slot, dtype in reads.items() if dtype == "unknown"}
    return found | {signature.output(index) for index, dtype in gives.items() if dtype == "unknown"}


def _leave(node: Node, reads: dict[int, str], gives: dict[int, str]) -> None:
    """Half precision that the model has already: read and give what is there."""
    dtypes = {index: dtype for index, dtype in gives.items() if dtype in CASTABLE}
    node.operands = node.operands | {slot: "fp32" if dtype == "fp32" else "any" for slot, dtype in reads.items()}
    node.results = node.results | dtypes
    first = next(iter(dtypes.values()), "")
    if len(set(dtypes.values())) == 1:
        node.out_dtype = first
    kept = next((dtype for dtype in (*reads.values(), *gives.values()) if dtype in LOW), "half precision")
    node.raise_to_fp32(f"the model has it in {kept} already", "rule", must=True)


def _state(node: Node) -> tuple[object, ...]:
    return node.verdict, node.reason, node.operands.copy(), node.results.copy(), node.out_dtype


def _feeds_integers(graph: PrecisionGraph) -> Iterator[tuple[Node, str]]:
    """Arithmetic (no matmul, no reduction) within `INDEX_HOPS` operations above a float turned into integers."""
    for node in graph:
        if node.kind != "cast" or not node.out_dtype.startswith(("int", "uint")):
            continue
        level = list(node.inputs)
        for _ in range(INDEX_HOPS):
            found = [maker for name in level if (maker := graph.producer(name)) is not None]
            makers = [maker for maker in found if maker.verdict == "propagate" and maker.kind != "cast"]
            yield from ((maker, "becomes integers: a rounded index is another index") for maker in makers)
            level = [name for maker in makers for name in maker.inputs]
