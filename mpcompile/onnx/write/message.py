"""Turn a read model and a list of edits into one protobuf message.

Nodes and types are copied from the message that was read as they are, which protobuf does in C++; only what an edit
names is touched.  Decisions are serialised once for each that there is.  Tensors above `HEAVY` bytes stay promises
until someone asks for the whole message: a file with external data takes them one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from mpcompile.graph import Node, PrecisionGraph, Value
from mpcompile.onnx.capture import OURS, OnnxCapture, Region, region_path
from mpcompile.onnx.read.facts import NUMEL_HINT
from mpcompile.onnx.read.load import copy_fields
from mpcompile.onnx.read.message import GRAPH
from mpcompile.onnx.tensors import DATA_TYPES, as_object, fill, lazy, rounded

# Models with more bytes of weights go to the runtime by way of a file, not by way of two more copies in memory.
IN_MEMORY = 1 << 28
# Tensors with more bytes are kept out of the message until it is asked for.
HEAVY = 1 << 20
# Tensors with more elements are converted when they are saved, one at a time.
LAZY = 1 << 18
PROMISE = "mpcompile.promise"
SCHEMA = "mpcompile.report/1"


@dataclass(slots=True, eq=False)
class Carrier:
    """What carries a value of the plan in the written model.

    Fields:
      name: its name there; it may still change when an output takes it over.
      dtype: its element type there.
      value: the value of the capture that it is, or was made from; it stands in the graph of that one.
    """

    name: str
    dtype: str
    value: Value


@dataclass(slots=True, eq=False)
class NewCast:
    """A Cast node to write."""

    source: Carrier
    result: Carrier
    origin: str = ""


@dataclass(slots=True)
class NodeEdit:
    """What is different at one node.

    Fields:
      reads: slots, and what it reads there.
      after: casts that follow it.
      attributes: attributes to add.
    """

    reads: tuple[tuple[int, Carrier], ...] = ()
    after: tuple[NewCast, ...] = ()
    attributes: tuple[onnx.AttributeProto, ...] = ()


@dataclass
class Edits:
    """What the written model has otherwise than the model that was read: by node id, value name and scope.

    Fields:
      nodes: node -> what is different there.
      returns: scope -> index -> what the graph returns there.
      types: value -> its element type.
      names: value -> its name.
      first: scope -> casts that stand first in the graph.
      tensors: scope -> initializers to add, each with the type that its elements are rounded to.
      dropped: initializers to leave out.
    """

    nodes: dict[str, NodeEdit] = field(default_factory=dict)
    returns: dict[str, dict[int, Carrier]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    first: dict[str, list[NewCast]] = field(default_factory=dict)
    tensors: dict[str, list[tuple[Carrier, str]]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def at(self, node: str) -> NodeEdit:
        """What is different at `node`, to be added to."""
        edit = self.nodes.get(node)
        if edit is None:
            edit = self.nodes[node] = NodeEdit()
        return edit


@dataclass
class Written:
    """A written model: the message without its heavy tensors, these, and the bytes of all tensors."""

    proto: onnx.ModelProto
    heavy: list[tuple[onnx.TensorProto, Any]] = field(default_factory=list)
    weight_bytes: int = 0

    def message(self) -> onnx.ModelProto:
        """The whole model as one message."""
        for tensor, held in self.heavy:
            name = tensor.name
            tensor.Clear()
            fill(tensor, held)
            tensor.name = name
        self.heavy = []
        return self.proto

    def loadable(self) -> onnx.ModelProto | ir.Model:
        """What to give a runtime: the message, or for large weights a model that is written to a file first."""
        return self.message() if self.weight_bytes <= IN_MEMORY else self.ir()

    def ir(self) -> ir.Model:
        """An `onnx_ir` model, whose heavy tensors are converted when they are read."""
        model = ir.from_proto(self.proto)
        for graph in (model.graph, *model.graph.subgraphs()) if self.heavy else ():
            for value in graph.initializers.values():
                held = value.const_value
                if isinstance(held, ir.ExternalTensor) and held.location == PROMISE:
                    value.const_value = as_object(self.heavy[held.offset or 0][1])
        return model


def emit(capture: OnnxCapture, graph: PrecisionGraph | None, edits: Edits, header: Mapping[str, str]) -> Written:
    """The message that was read, with `edits`.

    Args:
      graph: the plan, whose decisions are written into each node's metadata; None for none.
      header: model metadata to add.
    """
    return _Emitter(capture, graph, edits).model(header)


class _Emitter:
    def __init__(self, capture: OnnxCapture, plan: PrecisionGraph | None, edits: Edits) -> None:
        self.capture, self.plan, self.edits = capture, plan, edits
        self.decisions: dict[tuple[str, ...], bytes] = {}
        self.casts: dict[tuple[str, str], onnx.NodeProto] = {}
        self.types: dict[tuple[Any, ...], bytes] = {}
        self.returned = {id(carrier) for row in edits.returns.values() for carrier in row.values()}
        self.out = Written(onnx.ModelProto())

    def model(self, header: Mapping[str, str]) -> Written:
        given, made = self.capture.loaded.proto, self.out.proto
        copy_fields(given, made, "graph", "metadata_props")
        told = {**{one.key: one.value for one in given.metadata_props}, **header}
        for key, text in told.items():
            made.metadata_props.add(key=key, value=text)
        self.graph("", made.graph)
        return self.out

    def graph(self, scope: str, out: onnx.GraphProto) -> None:
        region = self.capture.regions[scope]
        copy_fields(region.message, out, "node", "initializer", "output", "value_info")
        self.initializers(scope, region, out)
        self.infos(scope, region, out)
        for cast in self.edits.first.get(scope, ()):
            self.cast(out, cast)
        for key, source in zip(region.ids, region.message.node, strict=True):
            made, edit = out.node.add(), self.edits.nodes.get(key)
            self.node(key, source, made)
            if edit is not None:
                self.edit(edit, made, out)

    # ------------------------------------------------------------------------------------------------------- values

    def initializers(self, scope: str, region: Region, out: onnx.GraphProto) -> None:
        for tensor in region.message.initializer:
            own = tensor.name
            name = region.names[own] if own else ""
            if name and name not in self.edits.dropped:
                self.tensor(out, self.edits.names.get(name, own), self.capture.tensors[name])
        with np.errstate(over="ignore"):  # FLT_MAX as a bound becomes infinity: no bound, as it was meant
            for carrier, to in self.edits.tensors.get(scope, ()):
                self.converted(out, carrier, to)

    def converted(self, out: onnx.GraphProto, carrier: Carrier, to: str) -> None:
        """An initializer of the capture rounded to `to`, to nearest even; a large one when it is saved."""
        value, held = carrier.value, self.capture.tensors[carrier.value.name]
        if value.numel > LAZY:
            self.tensor(out, carrier.name, lazy(held, to, carrier.dtype, value.shape, carrier.name))
            return
        elements = rounded(held, to, carrier.dtype).tobytes()
        out.initializer.add(name=carrier.name, data_type=DATA_TYPES[carrier.dtype], dims=value.shape, raw_data=elements)
        self.out.weight_bytes += len(elements)

    def tensor(self, out: onnx.GraphProto, name: str, held: Any) -> None:
        made = out.initializer.add()
        if isinstance(held, onnx.TensorProto):
            size, dtype, shape = held.ByteSize(), held.data_type, held.dims
        else:
            size = held.nbytes if held.dtype != ir.DataType.STRING else 0
            dtype, shape = held.dtype, held.shape.numpy()
        self.out.weight_bytes += size
        if size > HEAVY:
            promise = ir.ExternalTensor(PROMISE, len(self.out.heavy), size, ir.DataType(dtype),
                                        shape=ir.Shape(shape), name=name)  # fmt: skip
            ir.serde.serialize_tensor_into(made, promise)
            self.out.heavy.append((made, held))
        else:
            fill(made, held)
        if made.name != name:
            made.name = name

    def infos(self, scope: str, region: Region, out: onnx.GraphProto) -> None:
        """Types of inputs, outputs and results: those of the model, and what is different."""
        given, results, types, names = region.message.value_info, region.results, self.edits.types, self.edits.names
        if "" in results:
            out.value_info.extend([info for info, name in zip(given, results, strict=True) if name])
            results = [name for name in results if name]
        else:
            out.value_info.MergeFrom(given)
        for place, name in enumerate(results):
            dtype = types.get(name)
            if dtype is not None:
                out.value_info[place].type.tensor_type.elem_type = DATA_TYPES[dtype]
        ends = [(info, region.names[info.name]) for info in out.input]
        returns = self.edits.returns.get(scope, {})
        for index, source in enumerate(region.message.output):
            info, carrier = out.output.add(), returns.get(index)
            if carrier is None:
                info.CopyFrom(source)
                ends.append((info, region.names[info.name]))
            else:
                copy_fields(source, info, "type")
                self.describe(info, carrier)
        for info, name in ends:
            info.name = names.get(name, info.name)
            if name in types:
                info.type.tensor_type.elem_type = DATA_TYPES[types[name]]

    def describe(self, info: onnx.ValueInfoProto, carrier: Carrier) -> None:
        """The name and type of `carrier`, which has the shape of what it was made from."""
        value = carrier.value
        # Only sizes tell a scalar from a value of unknown rank.
        key = (value.shape, value.numel, carrier.dtype)
        held = self.types.get(key)
        if held is None:
            held = self.types[key] = _type(value, carrier.dtype)
        info.MergeFromString(held)
        info.name = carrier.name

    # -------------------------------------------------------------------------------------------------------- nodes

    def node(self, key: str, source: onnx.NodeProto, made: onnx.NodeProto) -> None:
        """A copy of the node, with its decision."""
        if key in self.capture.returned:
            self.control(key, source, made)
        else:
            made.CopyFrom(source)
        if self.edits.names:
            self.rename(key, made)
        if self.plan is None:
            return
        if key in self.capture.earlier:
            _forget(made)
        decided = self.plan.nodes[key]
        told = (decided.verdict, decided.precision, decided.reason, decided.module, decided.source)
        held = self.decisions.get(told)
        if held is None:
            held = self.decisions[told] = _metadata(decision(decided))
        made.MergeFromString(held)

    def edit(self, edit: NodeEdit, made: onnx.NodeProto, out: onnx.GraphProto) -> None:
        """Make `made` other than it was, and write what follows it."""
        if edit.reads:
            names = made.input
            for slot, carrier in edit.reads:
                names[slot] = carrier.name
        if edit.attributes:
            made.attribute.extend(edit.attributes)
        for cast in edit.after:
            self.cast(out, cast)

    def control(self, key: str, source: onnx.NodeProto, made: onnx.NodeProto) -> None:
        """A node with bodies, which are written anew."""
        copy_fields(source, made, "attribute")
        scope = self.capture.graph.nodes[key].scope
        for attr in source.attribute:
            item = made.attribute.add()
            copy_fields(attr, item, "g", "graphs")
            if attr.type == GRAPH:
                self.graph(region_path(scope, key, attr.name), item.g)
            for index in range(len(attr.graphs)):
                self.graph(region_path(scope, key, f"{attr.name}.{index}"), item.graphs.add())

    def rename(self, key: str, made: onnx.NodeProto) -> None:
        """Results that have another name now."""
        for index, name in enumerate(self.capture.graph.nodes[key].outputs):
            if name in self.edits.names:
                made.output[index] = self.edits.names[name]

    def cast(self, out: onnx.GraphProto, cast: NewCast) -> None:
        result = cast.result
        key = (result.dtype, cast.origin)
        if key not in self.casts:
            self.casts[key] = onnx.helper.make_node("Cast", [], [], to=int(DATA_TYPES[result.dtype]))
            if cast.origin:
                self.casts[key].metadata_props.add(key="mpcompile.origin", value=cast.origin)
        made = out.node.add()
        made.CopyFrom(self.casts[key])
        made.name = f"{result.name}/Cast"
        made.input.append(cast.source.name)
        made.output.append(result.name)
        if id(result) not in self.returned:
            self.describe(out.value_info.add(), result)


def decision(node: Node) -> Iterator[tuple[str, str]]:
    """What is written about the decision for `node`, and about where it comes from."""
    yield "mpcompile.precision", str(node.precision)
    yield "mpcompile.reason", node.reason
    yield "mpcompile.verdict", str(node.verdict)
    if node.module:
        yield "mpcompile.module", node.module
    if node.source:
        yield "mpcompile.source", node.source


def header(graph: PrecisionGraph) -> dict[str, str]:
    """What is written into the model's own metadata."""
    told = {f"{OURS}{name}": graph.header[name] for name in ("policy", "device") if graph.header.get(name)}
    return {"mpcompile.schema": SCHEMA, **told}


def _metadata(pairs: Iterator[tuple[str, str]]) -> bytes:
    made = onnx.NodeProto()
    for key, text in pairs:
        made.metadata_props.add(key=key, value=text)
    return bytes(made.SerializeToString())


def _forget(made: onnx.NodeProto) -> None:
    """Take the decisions of an earlier conversion out of the metadata."""
    kept = [(one.key, one.value) for one in made.metadata_props if not one.key.startswith(OURS)]
    del made.metadata_props[:]
    for key, text in kept:
        made.metadata_props.add(key=key, value=text)


def _type(value: Value, dtype: str) -> bytes:
    """What a `ValueInfoProto` says of the type of a tensor with the shape of `value`."""
    made = onnx.ValueInfoProto()
    tensor = made.type.tensor_type
    tensor.elem_type = DATA_TYPES[dtype]
    if value.shape or value.numel != NUMEL_HINT:
        tensor.shape.SetInParent()
    for size in value.shape:
        dim = tensor.shape.dim.add()
        if isinstance(size, int):
            dim.dim_value = size
        elif size != "?":
            dim.dim_param = size
    return bytes(made.SerializeToString())
