"""Write a planned precision graph back into ONNX: the casts exactly as planned, and nothing else changed.

Casts of initializers become second initializers, converted once; everything else becomes a Cast node right after the
value is made.  Inputs and outputs keep their names.  With ``simulate`` every low value is an FP32 value that went
through the low type and back: any runtime computes such a model, and its numbers are those of the low type.

This file decides what is different; `mpcompile.onnx.write.message` writes it down.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from mpcompile.formats import LOW
from mpcompile.graph import CAST_OP, Node, PrecisionGraph
from mpcompile.onnx.capture import OnnxCapture
from mpcompile.onnx.tensors import DATA_TYPES
from mpcompile.onnx.write.message import (
    Carrier,
    Edits,
    NewCast,
    Written,
    decision,
    emit,
    header,
)
from mpcompile.rules.table import load_kinds


def write(capture: OnnxCapture, graph: PrecisionGraph, *, simulate: bool = False, annotated: bool = True,
          low_inputs: str = "") -> Written:  # fmt: skip
    """A new ONNX model with the decisions of `graph`, which the passes made from ``capture.graph``.

    Args:
      simulate: FP32 operators, each low result rounded through the low type.
      low_inputs: the low type, when FP32 inputs are to be given in it.
      annotated: write each node's decisions into its ``metadata_props`` ("mpcompile.verdict" and so on).
    """
    planner = _Planner(capture, graph, simulate)
    if low_inputs:
        planner.lower_inputs(low_inputs)
    planner.all()
    return emit(capture, graph if annotated else None, planner.edits, header(graph) if annotated else {})


def annotate(model: ir.Model, graph: PrecisionGraph, nodes: Mapping[str, ir.Node]) -> None:
    """Write verdict, precision, reason, module and source line of every node into its metadata."""
    for key, made in nodes.items():
        made.metadata_props.update(decision(graph.nodes[key]))
    model.metadata_props.update(header(graph))


class _Planner:
    """One writing: `moved` maps a name of the plan to what carries it, where that is not its own value."""

    def __init__(self, capture: OnnxCapture, graph: PrecisionGraph, simulate: bool) -> None:
        self.capture, self.graph, self.simulate = capture, graph, simulate
        self.edits = Edits()
        self.moved: dict[str, Carrier] = {}
        self.own: dict[str, Carrier] = {}
        # Graph inputs that are given low: name -> the input itself; readers in FP32 read a cast of it.
        self.lowered: dict[str, Carrier] = {}
        self.views = {name for name, kind in load_kinds().items() if kind.fusion == "view"}
        self.converted: list[Carrier] = []
        # Inputs of all graphs, which callers and control nodes give.
        self.inputs = {region.names[name] for region in capture.regions.values() for name in region.given}
        # Initializers that are read as they are.
        self.kept = set(capture.graph.outputs)
        self.taken: set[str] = set()
        # Results that the plan gives another type.
        given, planned = capture.graph.values, graph.values
        dtypes = ((name, value.dtype, planned[name].dtype) for name, value in given.items() if value.producer)
        self.changed = {name: dtype for name, before, dtype in dtypes if before != dtype}

    def all(self) -> None:
        given = self.capture.graph.nodes
        in_order = iter(given.values())  # the order is mostly the same, which saves the look-up
        for node in self.graph.nodes.values():
            if node.op == CAST_OP:
                self.cast(node)
                continue
            before = next(in_order, None)
            if before is None or before.id is not node.id:
                before = given.get(node.id)
            if before is not None:
                self.node(node, before)
        if not self.simulate:
            self.edits.types.update(self.changed)
        self.outputs()
        self.follow_names()
        self.drop_initializers()
        self.drop_casts()

    def carrier(self, name: str) -> Carrier:
        """What carries the plan's value `name`."""
        held = self.moved.get(name)
        return held if held is not None else self.own_carrier(name)

    def own_carrier(self, name: str) -> Carrier:
        """The value itself; one object, so that a new name reaches all who read it."""
        held = self.own.get(name)
        if held is None:
            value = self.capture.graph.values[name]
            held = self.own[name] = Carrier(self.capture.own(name), value.dtype, value)
        return held

    def lower_inputs(self, low: str) -> None:
        """Let FP32 inputs be given in `low`."""
        for name in self.graph.inputs:
            value = self.capture.graph.values[name]
            if value.dtype == "fp32" and name not in self.capture.tensors:
                self.edits.types[name] = low
                self.lowered[name] = given = Carrier(self.capture.own(name), low, value)
                self.moved[name] = self.cast_of(given, "fp32", self.fresh(f"{name}_fp32_given"))

    # ------------------------------------------------------------------------------------------------------- nodes

    def node(self, node: Node, before: Node) -> None:
        """Redirect the operands of `node`; round its results, where nothing computes in the low type."""
        if node.inputs != before.inputs or not self.moved.keys().isdisjoint(node.inputs):
            self.redirect(node, before)
        else:
            self.kept.update([name for name in node.inputs if name in self.capture.tensors])
        if node.op == "onnx::Attention" and node.precision in LOW:
            self.fp32_core(node)
        if self.simulate and node.kind not in self.views:
            for name in node.outputs:
                dtype = self.changed.get(name, "")
                if dtype in LOW and self.capture.own(name):
                    source = self.carrier(name)
                    self.moved[name] = self.round(source, dtype, self.fresh(f"{source.name}_{dtype}_rounded"))

    def redirect(self, node: Node, before: Node) -> None:
        moved, reads = self.moved, list[tuple[int, Carrier]]()
        for slot, name, old in zip(node.slots, node.inputs, before.inputs, strict=True):
            carrier = moved.get(name)
            if carrier is not None:
                reads.append((slot, carrier))
                continue
            self.kept.add(name)
            if name != old:
                reads.append((slot, self.own_carrier(name)))
        if node.id in self.capture.returned:
            reads = self.redirect_returns(node, reads)
        if reads:
            self.edits.at(node.id).reads = tuple(reads)

    def redirect_returns(self, node: Node, reads: list[tuple[int, Carrier]]) -> list[tuple[int, Carrier]]:
        """Let the bodies of `node` return what it reads beyond its own operands; the rest."""
        own, places = self.capture.operands[node.id], self.capture.returned[node.id]
        for slot, carrier in reads:
            if slot >= own:
                body, index = places[slot - own]
                self.edits.returns.setdefault(body, {})[index] = carrier
        return [(slot, carrier) for slot, carrier in reads if slot < own]

    def fp32_core(self, node: Node) -> None:
        """Ask fused attention for its softmax in FP32, where its author said nothing."""
        if not self.simulate and "softmax_precision" not in node.attrs:
            attr = onnx.helper.make_attribute("softmax_precision", int(DATA_TYPES["fp32"]))
            self.edits.at(node.id).attributes = (attr,)

    def cast(self, cast: Node) -> None:
        """The value that carries a planned cast; its name is free, as all names of the plan are."""
        read, to, name = cast.inputs[0], str(cast.attrs["to"]), cast.outputs[0]
        if read in self.lowered:
            given = self.lowered[read]
            self.moved[name] = self.moved[read] if self.simulate or to != given.dtype else given
        elif self.is_fixed(read) and not (self.simulate and to == "fp32"):
            self.moved[name] = self.constant(read, name, to)
        else:
            self.moved[name] = self.cast_value(self.carrier(read), to, name, cast.origin or "inserted")

    def cast_value(self, source: Carrier, to: str, name: str, origin: str) -> Carrier:
        """A planned cast of what is no constant."""
        if self.simulate and source.dtype == "fp32":
            # The source is FP32 in any case: going up is free, going down is a round trip.
            return source if to == "fp32" else self.round(source, to, name)
        made = self.cast_of(source, to, name, origin)
        return self.cast_of(made, "fp32", self.fresh(f"{name}_up")) if self.simulate and to in LOW else made

    # ------------------------------------------------------------------------------------------------------- pieces

    def is_fixed(self, name: str) -> bool:
        """True for an initializer that may be converted now: not one that a caller can override."""
        return name in self.capture.tensors and name not in self.inputs

    def constant(self, origin: str, name: str, to: str) -> Carrier:
        """A second initializer beside `origin`, converted to `to`."""
        value = self.capture.graph.values[origin]
        made = Carrier(name, "fp32" if self.simulate else to, value)
        self.edits.tensors.setdefault(value.scope, []).append((made, to))
        self.converted.append(made)
        return made

    def round(self, source: Carrier, to: str, name: str) -> Carrier:
        """`source` through the low type and back to FP32."""
        return self.cast_of(self.cast_of(source, to, self.fresh(f"{name}_down")), "fp32", name)

    def cast_of(self, source: Carrier, to: str, name: str, origin: str = "") -> Carrier:
        """A Cast right behind the maker of `source`, or first in its graph; `name` is free."""
        value = source.value
        result = Carrier(name, to, value)
        cast = NewCast(source, result, origin)
        if value.producer:
            edit = self.edits.at(value.producer)
            edit.after = (*edit.after, cast)
        else:
            self.edits.first.setdefault(value.scope, []).append(cast)
        return result

    def fresh(self, name: str) -> str:
        """`name`, or one like it that is free."""
        while name in self.taken or name in self.graph.values or name in self.capture.graph.values:
            name += "_"
        self.taken.add(name)
        return name

    # --------------------------------------------------------------------------------------------------------- ends

    def outputs(self) -> None:
        """Point the graph's outputs at what the plan returns; the names stay with the outputs."""
        given = self.capture.graph.outputs
        names = [self.capture.own(name) for name in given]
        returns = self.edits.returns.setdefault("", {})
        for index, (name, before) in enumerate(zip(self.graph.outputs, given, strict=True)):
            carrier = self.carrier(name)
            if name not in self.moved and carrier.value.name == before:
                continue
            dtype = self.graph.values[name].dtype
            if self.simulate and dtype in LOW and carrier.dtype == "fp32":
                carrier = self.cast_of(carrier, dtype, self.fresh(f"{carrier.name}_given"))
            returns[index] = carrier
            if before not in self.edits.names and carrier.name not in names:
                new = self.fresh(f"{names[index]}_{self.graph.values[before].dtype}_before")
                self.own_carrier(before).name = self.edits.names[before] = new
                carrier.name = names[index]

    def follow_names(self) -> None:
        """Let all who read a renamed value read it by its new name."""
        names = self.edits.names
        for node in self.capture.graph if names else ():
            read = [(slot, self.own[name]) for slot, name in zip(node.slots, node.inputs, strict=True) if name in names]
            if read:
                edit = self.edits.at(node.id)
                moved = {slot for slot, _ in edit.reads}
                edit.reads = (*edit.reads, *(pair for pair in read if pair[0] not in moved))

    def drop_initializers(self) -> None:
        """Leave out initializers that nobody reads any more; a sole copy takes over the name."""
        for made in self.converted:
            origin = made.value.name
            if origin not in self.kept and origin not in self.edits.dropped:
                self.edits.dropped.add(origin)
                made.name = self.capture.own(origin)

    def drop_casts(self) -> None:
        """Leave out the casts of lowered inputs that nobody reads."""
        if not self.lowered:
            return
        edits, first = self.edits.nodes.values(), self.edits.first.get("", [])
        used = {id(carrier) for edit in edits for _, carrier in edit.reads}
        used |= {id(carrier) for returns in self.edits.returns.values() for carrier in returns.values()}
        used |= {id(cast.source) for casts in (first, *(edit.after for edit in edits)) for cast in casts}
        spare = {id(self.moved[name]) for name in self.lowered} - used
        first[:] = [cast for cast in first if id(cast.result) not in spare]
