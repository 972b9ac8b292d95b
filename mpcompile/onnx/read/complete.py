"""Types and shapes of an ONNX model: ONNX's own inference, then type variables for operators that it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpcompile.graph import Node
from mpcompile.onnx.read.facts import NUMEL_HINT
from mpcompile.onnx.read.message import bodies, inferred
from mpcompile.onnx.schema import data_type, find_schema, op_of, signature

if TYPE_CHECKING:
    from mpcompile.onnx.capture import OnnxCapture

# Values that are no tensor, or of which nothing is known.
NO_TENSOR = frozenset({"unknown", "sequence", "optional"})


def complete(capture: OnnxCapture, lacking: Sequence[Node]) -> None:
    """Give results without a type that of an operand with the same type variable, or the one that their readers need."""
    _Completion(capture).all(lacking)


class _Completion:
    def __init__(self, capture: OnnxCapture) -> None:
        self.capture, self.values = capture, capture.graph.values

    def all(self, lacking: Sequence[Node]) -> None:
        for node in lacking:
            self.from_operands(node)
        if not any(self.lacks(name) for node in lacking for name in node.outputs):
            return
        uses = self.capture.graph.uses()
        for node in reversed(lacking):
            for name in node.outputs:
                self.from_readers(name, uses[name])
        for node in lacking:
            self.from_operands(node)

    def lacks(self, name: str) -> bool:
        return self.values[name].dtype == "unknown"

    def schema(self, node: Node) -> Any:
        """The type variables of `node`, whatever kernels there are; None when nobody knows the operator."""
        domain, op = op_of(node.op)
        version = self.capture.opset(domain)
        return signature(domain, op, version, "") if find_schema(domain, op, version) else None

    def from_operands(self, node: Node) -> None:
        types = self.schema(node)
        if types is None:
            return
        dtypes = ((types.input(slot), self.values[name].dtype)
                  for slot, name in zip(node.slots, node.inputs, strict=True))  # fmt: skip
        known = {variable: dtype for variable, dtype in dtypes if variable and dtype not in NO_TENSOR}
        for index, name in enumerate(node.outputs):
            if self.lacks(name) and types.output(index) in known:
                self.give(name, known[types.output(index)])

    def from_readers(self, name: str, uses: Sequence[tuple[str, int]]) -> None:
        """What a custom operator gives has the type of its readers' other operands and results."""
        for reader, operand in uses:
            dtype = self.needed(self.capture.graph.nodes[reader], operand) if self.lacks(name) else ""
            if dtype:
                self.give(name, dtype)

    def needed(self, reader: Node, operand: int) -> str:
        """The type of the operands and results of `reader` that share a type variable with `operand`."""
        types = self.schema(reader)
        variable = types.input(reader.slots[operand]) if types is not None else ""
        if types is None or not variable:
            return ""
        peers = [
            name for i, name in enumerate(reader.inputs) if i != operand and types.input(reader.slots[i]) == variable
        ]
        peers += [name for i, name in enumerate(reader.outputs) if types.output(i) == variable]
        return next((self.values[name].dtype for name in peers if self.values[name].dtype not in NO_TENSOR), "")

    def give(self, name: str, dtype: str) -> None:
        """Write the type down, in the model too."""
        value = self.values[name]
        value.dtype, value.numel = dtype, NUMEL_HINT
        maker = self.capture.graph.nodes[value.producer]
        if maker.op == "onnx::Cast":
            maker.out_dtype = dtype
        own, region = self.capture.own(name), self.capture.regions[value.scope]
        info = next((info for info in region.message.output if info.name == own), None)
        if info is None and own:
            info = region.message.value_info.add(name=own)
            region.results.append(name)
        if info is not None:
            info.type.tensor_type.elem_type = data_type(dtype)


__all__ = ["bodies", "complete", "inferred"]
