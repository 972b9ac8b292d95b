"""Write a planned precision graph back into ONNX: the casts exactly as planned, and nothing else changed.

Casts of initializers become second initializers, converted once; everything else becomes a Cast node right after the
value is made.  Inputs and outputs keep their names.  With ``simulate`` every low value is an FP32 value that went
through the low type and back: any runtime computes such a model, and its numbers are those of the low type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mpcompile.frontends.onnx import OnnxCapture
from mpcompile.graph import LOW, Node, PrecisionGraph
from mpcompile.rules.table import load_kinds

DATA_TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NUMPY_TYPES: Mapping[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
# Tensors with more elements are converted when they are saved, one at a time.
LAZY = 1 << 20


def write(capture: OnnxCapture, graph: PrecisionGraph, *, simulate: bool = False, casts: bool = True,
          annotated: bool = True, low_inputs: str = "") -> ir.Model:  # fmt: skip
    """A new ONNX model with the decisions of `graph`, which the passes made from ``capture.graph``.

    Args:
      simulate: FP32 operators, each low result rounded through the low type.
      casts: False writes the FP32 model with the annotations only.
      low_inputs: the low type, when FP32 inputs are to be given in it.
      annotated: write each node's decisions into its ``metadata_props`` ("mpcompile.verdict" and so on).
    """
    twin = capture.model.clone()
    writer = _Writer(capture, graph, _pairs(capture.model, twin), simulate)
    if low_inputs and casts:
        writer.lower_inputs(low_inputs)
    if annotated:
        annotate(twin, graph, {key: writer.nodes[node] for key, node in capture.nodes.items() if key in graph.nodes})
    if casts:
        writer.all()
    return twin


def annotate(model: ir.Model, graph: PrecisionGraph, nodes: Mapping[str, ir.Node]) -> None:
    """Write verdict, precision, reason, module and source line of every node into its metadata."""
    for key, made in nodes.items():
        node, props = graph.nodes[key], made.metadata_props
        props["mpcompile.verdict"], props["mpcompile.precision"] = str(node.verdict), str(node.precision)
        props["mpcompile.reason"] = node.reason
        if node.module:
            props["mpcompile.module"] = node.module
        if node.source:
            props["mpcompile.source"] = node.source
    model.metadata_props["mpcompile.schema"] = "mpcompile.report/1"
    for name in ("policy", "device"):
        if graph.header.get(name):
            model.metadata_props[f"mpcompile.{name}"] = graph.header[name]


class _Pairs(dict[Any, Any]):
    """Node or value or graph of the capture -> its copy."""


def _pairs(model: ir.Model, twin: ir.Model) -> _Pairs:
    pairs = _Pairs()
    _pair(model.graph, twin.graph, pairs)
    return pairs


def _pair(old: ir.Graph, new: ir.Graph, pairs: _Pairs) -> None:
    pairs[old] = new
    pairs.update(zip(old.inputs, new.inputs, strict=True))
    pairs.update((value, new.initializers[name]) for name, value in old.initializers.items())
    for node, copy in zip(old, new, strict=True):
        pairs[node] = copy
        pairs.update(zip(node.outputs, copy.outputs, strict=True))
        for name, attr in node.attributes.items():
            if attr.type == ir.AttributeType.GRAPH:
                _pair(attr.value, copy.attributes[name].value, pairs)
            elif attr.type == ir.AttributeType.GRAPHS:
                for one, other in zip(attr.value, copy.attributes[name].value, strict=True):
                    _pair(one, other, pairs)


class _Writer:
    """One writing: `values` maps each name of the plan to the ONNX value that carries it."""

    def __init__(self, capture: OnnxCapture, graph: PrecisionGraph, pairs: _Pairs, simulate: bool) -> None:
        self.capture, self.graph, self.nodes, self.simulate = capture, graph, pairs, simulate
        self.values: dict[str, ir.Value] = {name: pairs[value] for name, value in capture.values.items()}
        # Graph inputs that are given low: name -> the input itself; readers in FP32 read a cast of it.
        self.lowered: dict[str, ir.Value] = {}
        self.views = {name for name, kind in load_kinds().items() if kind.fusion == "view"}
        self.converted: list[tuple[ir.Value, ir.Value]] = []

    def all(self) -> None:
        for node in self.graph.nodes.values():
            if node.is_cast:
                self.cast(node)
            elif node.id in self.capture.nodes:
                self.node(node)
        self.outputs()
        self.drop_initializers()
        self.drop_casts()

    def lower_inputs(self, low: str) -> None:
        """Let FP32 inputs be given in `low`."""
        for name in self.graph.inputs:
            value = self.values[name]
            if value.dtype == ir.DataType.FLOAT and not value.is_initializer():
                value.type = ir.TensorType(DATA_TYPES[low])
                self.lowered[name] = value
                self.values[name] = self.after(value, _cast(value, "fp32", f"{name}_fp32_given"))

    # ------------------------------------------------------------------------------------------------------- nodes

    def node(self, node: Node) -> None:
        """Redirect the operands of `node`; give its results their planned types."""
        made = self.nodes[self.capture.nodes[node.id]]
        own = len(made.inputs)
        for slot, name in zip(node.slots, node.inputs, strict=True):
            value = self.values[name]
            if slot >= own:
                body, index = self.capture.returned[node.id][slot - own]
                if self.nodes[body].outputs[index] is not value:
                    self.nodes[body].outputs[index] = value
            elif made.inputs[slot] is not value:
                made.replace_input_with(slot, value)
        if node.precision in LOW:
            _fp32_core(made, self.simulate)
        for name in node.outputs:
            dtype, before = self.graph.values[name].dtype, self.capture.graph.values[name].dtype
            if dtype == before:
                continue
            if not self.simulate:
                self.values[name].type = ir.TensorType(DATA_TYPES[dtype])
            elif dtype in LOW and node.kind not in self.views and self.values[name].name:
                self.values[name] = self.round(self.values[name], dtype)

    def cast(self, cast: Node) -> None:
        """The value that carries a planned cast."""
        source, to = self.values[cast.inputs[0]], str(cast.attrs["to"])
        name, real = cast.outputs[0], self.real(cast.inputs[0])
        origin = self.origin(cast.inputs[0])
        if cast.inputs[0] in self.lowered:
            given = self.lowered[cast.inputs[0]]
            self.values[name] = source if self.simulate or DATA_TYPES[to] != given.dtype else given
            return
        if self.simulate and real == "fp32":
            # The source is FP32 in any case: going up is free, going down is a round trip.
            if to == "fp32":
                self.values[name] = source
            else:
                self.values[name] = self.constant(origin, source, name, to) if origin else self.round(source, to, name)
            return
        if origin is not None:
            self.values[name] = self.constant(origin, source, name, to)
        else:
            self.values[name] = self.after(source, _cast(source, to, name))
            if self.simulate and to in LOW:
                self.values[name] = self.after(self.values[name], _cast(self.values[name], "fp32", f"{name}_up"))
        self.annotate(self.values[name], cast)

    def real(self, name: str) -> str:
        """The element type of the ONNX value that carries `name` in a simulation."""
        dtype = self.values[name].dtype
        return next((key for key, known in DATA_TYPES.items() if known == dtype), "")

    def annotate(self, value: ir.Value, cast: Node) -> None:
        maker = value.producer()
        if maker is not None:
            maker.metadata_props["mpcompile.origin"] = cast.origin or "inserted"

    # ------------------------------------------------------------------------------------------------------- pieces

    def origin(self, name: str) -> ir.Value | None:
        """The initializer behind `name` that may be converted now: not one that a caller can override."""
        value = self.values[name]
        fixed = value.is_initializer() and not value.is_graph_input() and value.const_value is not None
        return value if fixed else None

    def constant(self, origin: ir.Value, source: ir.Value, name: str, to: str) -> ir.Value:
        """A second initializer beside `origin`, converted to `to`."""
        tensor = convert(origin.const_value, to, name, self.simulate)
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=origin.shape, const_value=tensor)
        graph = origin.graph
        assert graph is not None
        graph.register_initializer(made)
        self.converted.append((origin, made))
        return made

    def round(self, value: ir.Value, to: str, name: str = "") -> ir.Value:
        """`value` through the low type and back to FP32."""
        name = name or f"{value.name}_{to}_rounded"
        down = self.after(value, _cast(value, to, f"{name}_down"))
        return self.after(down, _cast(down, "fp32", name))

    def after(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """Put `node` right behind the maker of `value`, or first in its graph."""
        maker = value.producer()
        if maker is not None and maker.graph is not None:
            maker.graph.insert_after(maker, node)
            return node.outputs[0]
        graph = value.graph
        assert graph is not None
        first = next(iter(graph), None)
        if first is None:
            graph.append(node)
        else:
            graph.insert_before(first, node)
        return node.outputs[0]

    # --------------------------------------------------------------------------------------------------------- ends

    def outputs(self) -> None:
        """Point the graph's outputs at what the plan returns; the names stay with the outputs."""
        outputs = self.nodes[self.capture.model.graph].outputs
        names = [value.name for value in outputs]
        for index, name in enumerate(self.graph.outputs):
            value, before = self.values[name], outputs[index]
            if value is before:
                continue
            if self.simulate and self.graph.values[name].dtype in LOW and value.dtype == ir.DataType.FLOAT:
                value = self.after(value, _cast(value, self.graph.values[name].dtype, f"{value.name}_given"))
            outputs[index] = value
            if before.name == names[index] and value.name not in names:
                before.name = f"{names[index]}_{self.graph.values[self.capture.graph.outputs[index]].dtype}_before"
                value.name = names[index]

    def drop_initializers(self) -> None:
        """Remove initializers that nobody reads any more; a sole copy takes over the name."""
        for origin, made in self.converted:
            if origin.uses() or origin.is_graph_output() or origin.graph is None:
                continue
            graph, name = origin.graph, origin.name
            assert name is not None
            del graph.initializers[name]
            del graph.initializers[made.name]  # type: ignore[arg-type]
            made.name = name
            graph.initializers[name] = made

    def drop_casts(self) -> None:
        """Remove the casts of lowered inputs that nobody reads."""
        for name in self.lowered:
            value = self.values[name]
            maker = value.producer()
            if maker is not None and maker.graph is not None and not value.uses() and not value.is_graph_output():
                maker.graph.remove(maker, safe=True)


def convert(tensor: Any, to: str, name: str, simulate: bool = False) -> Any:
    """`tensor` rounded to `to`, to nearest even; a large one when it is saved."""

    def now() -> Any:
        with np.errstate(over="ignore"):  # FLT_MAX as a bound becomes infinity: no bound, as it was meant
            low = tensor.numpy().astype(NUMPY_TYPES[to])
        return ir.tensor(low.astype(np.float32) if simulate else low, name=name)

    if tensor.size <= LAZY:
        return now()
    return ir.LazyTensor(now, dtype=DATA_TYPES["fp32" if simulate else to], shape=tensor.shape, name=name)


def _cast(value: ir.Value, to: str, name: str) -> ir.Node:
    out = ir.Value(name=name, type=ir.TensorType(DATA_TYPES[to]), shape=value.shape)
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", DATA_TYPES[to])], outputs=[out], name=f"{name}/Cast")


def _fp32_core(node: ir.Node, simulate: bool) -> None:
    """Ask fused attention for its softmax in FP32, where its author said nothing."""
    if node.op_type == "Attention" and not node.domain and not simulate and "softmax_precision" not in node.attributes:
        node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", ir.DataType.FLOAT)
