"""Read an ONNX model into the precision graph.

The graph is flat: the nodes of an If, Loop or Scan body stand before their control node and carry the path of the
body in `scope`; what they capture from outside they read by name.  The control node reads its own operands and, in
further slots, what its bodies return; loop states and everything else that crosses its border stay FP32.

The front end decides nothing: it says what there is (types, shapes, ranges of constants, work, where a node comes
from) and hands over the type variables of every operator's schema.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from mpcompile.errors import MPCompileError, OnnxError
from mpcompile.formats import CASTABLE
from mpcompile.graph import NOTHING, Node, Role, Value
from mpcompile.onnx.capture import OURS, Names, OnnxCapture, Region, region_path
from mpcompile.onnx.read import facts
from mpcompile.onnx.read.complete import complete
from mpcompile.onnx.read.load import load, refusal, unreadable
from mpcompile.onnx.read.message import bodies
from mpcompile.onnx.read.prepare import prepare, sort, unmade
from mpcompile.onnx.schema import dtype_name, op_name, plain_domain, signature
from mpcompile.onnx.tensors import ranges_of
from mpcompile.signature import Signature


@dataclass
class _Told:
    """What a graph says of its results, which are asked for mostly in the order in which it says it.

    Fields:
      names, known: of the entries of its ``value_info``; no name where it is about what the graph returns.
      returned: of what the graph returns.
      next: the entry after the one that was asked for last.
      places: name -> entry, once the order is another.
    """

    names: list[str]
    known: list[facts.Known]
    returned: dict[str, facts.Known]
    next: int = 0
    places: dict[str, int] = field(default_factory=dict)

    def place(self, name: str) -> int:
        """The entry about `name`; -1 when there is none."""
        place = self.next
        if place < len(self.names) and self.names[place] == name:
            self.next = place + 1
            return place
        if name in self.returned:
            self.next += place < len(self.names) and not self.names[place]
            return -1
        if not self.places:
            self.places = {name: place for place, name in enumerate(self.names)}
        place = self.places.get(name, -1)
        self.next = place + 1
        return place


def read(model: Any, low: str = "fp32", *, provider: str = "") -> OnnxCapture:
    """Read `model` into a precision graph.

    Args:
      model: a path, a `ModelProto`, or an `onnx_ir.Model`; it is not changed.
      low: the low type, for which the opset may have to be raised.
      provider: whose kernels count ("cuda", "cpu"; see ``onnx_kernels.toml``); "" for the schemas alone.

    Raises:
      OnnxError: MP601, MP609.
    """
    try:
        return _read(model, low, provider)
    except MPCompileError:
        raise
    except Exception as error:  # `onnx`, `onnx_ir` and protobuf raise what they like of a model that is wrong
        why = "nested too deep" if isinstance(error, RecursionError) else refusal(model)
        if why:
            path = os.fspath(model) if isinstance(model, (str, os.PathLike)) else ""
            raise unreadable(error, path, why) from error
        raise


def _read(model: Any, low: str, provider: str) -> OnnxCapture:
    loaded = load(model)
    notes = prepare(loaded, low)

    def walk() -> OnnxCapture:
        capture = OnnxCapture(loaded, model, notes=notes)
        capture.graph.header = {"source": "onnx"}
        try:
            _Reader(capture, provider).main()
        except (ValueError, OSError) as error:  # a type that there is not, too few bytes, a data file that is gone
            raise unreadable(error, loaded.path) from error
        return capture

    try:
        return walk()
    except KeyError:  # a value that is read before it is made: other tools leave nodes in any order
        sort(loaded)
    try:
        return walk()
    except KeyError as error:
        raise unmade(error.args[0]) from error


class _Reader:
    """One walk over the model; `ids` and `repeated` count what is called the same."""

    def __init__(self, capture: OnnxCapture, provider: str) -> None:
        self.capture, self.graph, self.provider = capture, capture.graph, provider
        self.ids: dict[str, int] = {}
        self.repeated: dict[str, int] = {}
        self.rules: dict[tuple[str, str], tuple[str, Signature]] = {}
        # Equal types of one model are one object.
        self.types: dict[bytes, facts.Known] = {}
        self.lacking: list[Node] = []

    def main(self) -> None:
        graph = self.capture.loaded.proto.graph
        names = self.body(graph, "", None).names
        self.graph.inputs = [names[info.name] for info in graph.input]
        self.graph.outputs = [names[info.name] for info in graph.output]
        if self.lacking:
            complete(self.capture, self.lacking)

    def body(self, graph: onnx.GraphProto, scope: str, outer: Names | None) -> Region:
        """The inputs, initializers and nodes of `graph`."""
        region = self.capture.regions[scope] = Region(graph, Names(outer), frozenset(info.name for info in graph.input))
        told = self.told(graph)
        region.results = [""] * len(told.names)
        role: Role = "activation" if scope else "input"
        for info in graph.input:
            self.value(info.name, self.type(info.type.SerializeToString()), scope, region.names, role)
        self.initializers(graph, scope, region)
        for node in graph.node:
            self.node(node, scope, region, told)
        return region

    def told(self, graph: onnx.GraphProto) -> _Told:
        """What `graph` says of its results."""
        told = [(info.name, info.type.SerializeToString()) for info in graph.value_info]
        made = _Told([name for name, _ in told], [self.type(key) for _, key in told], {})
        for info in graph.output:
            place = -1 if info.HasField("type") else made.place(info.name)
            made.returned[info.name] = self.type(info.type.SerializeToString()) if place < 0 else made.known[place]
        names = ["" if name in made.returned else name for name in made.names]
        return _Told(names, made.known, made.returned)

    def type(self, key: bytes) -> facts.Known:
        """`facts.type_of`, asked once per type."""
        known = self.types.get(key)
        if known is None:
            known = self.types[key] = facts.type_of(onnx.TypeProto.FromString(key))
        return known

    def initializers(self, graph: onnx.GraphProto, scope: str, region: Region) -> None:
        floats: dict[str, Any] = {}
        for tensor in graph.initializer:
            own = tensor.name
            held = self.capture.loaded.held(tensor, main=not scope)
            name = region.names.get(own)
            if name is None:
                shape = tuple(tensor.dims)
                numel = math.prod(shape)
                dtype = dtype_name(tensor.data_type)
                role: Role = "constant" if numel <= 1 else "parameter"
                name = self.value(own, (dtype, shape, numel), scope, region.names, role)
                if dtype in CASTABLE:
                    floats[name] = held
            self.capture.tensors[name] = held
        for name, limits in zip(floats, ranges_of([*floats.values()]), strict=True):
            self.graph.values[name].range = limits

    def value(self, own: str, known: facts.Known, scope: str, names: Names, role: Role, producer: str = "") -> str:
        """Take up a value of the model under a name of its own."""
        name, values = own or f"{producer}_out", self.graph.values
        if name in values:
            name = self.another(name)
        dtype, shape, numel = known
        values[name] = Value(name, dtype, shape, numel, producer, role, None, "", scope)
        if name != own:
            self.capture.renamed[name] = own
        if own:
            names[own] = name
        return name

    def another(self, name: str) -> str:
        """`name` with a number, for one more value of that name."""
        count = self.repeated.get(name, 1)
        while f"{name}__{count}" in self.graph.values:
            count += 1
        self.repeated[name] = count + 1
        return f"{name}__{count}"

    def node(self, node: onnx.NodeProto, scope: str, region: Region, told: _Told) -> None:
        op_type, given, props, names = node.op_type, node.attribute, node.metadata_props, region.names
        own = node.name
        key = self.fresh(own, op_type)
        read = node.input[:]
        attrs = facts.attributes(given) if given else NOTHING
        inner = self.bodies(node, key, scope, names) if given else []
        inputs = [names[name] for name in read if name]
        slots: Sequence[int] = ()  # none left out
        if inner or len(inputs) < len(read):
            slots = [*(slot for slot, name in enumerate(read) if name), *range(len(read), len(read) + len(inner))]
            inputs += inner
        results = node.output[:]
        op, types = self.rule(node.domain, op_type, attrs, len(results))
        module = source = ""
        if props or own.startswith("/"):
            module, source = self.origin(key, own, props)
        made = Node(key, op, inputs, [], slots, attrs, module, source, scope=scope)
        self.results(made, results, region, told)
        if op_type in facts.FLOPS:
            made.flops = facts.flops_of(made, op_type, self.graph.values)
        region.ids.append(key)
        self.graph.nodes[key] = made
        self.capture.signatures[key] = types

    def results(self, node: Node, results: list[str], region: Region, told: _Told) -> None:
        """The values that `node` makes."""
        names, lacks, known = region.names, False, UNKNOWN
        for own in results:
            if own in names:
                raise OnnxError("MP601", f"the value {own!r} is redeclared: two nodes make it", where=node.id)
            place = told.place(own)
            known = told.known[place] if place >= 0 else told.returned.get(own, UNKNOWN)
            name = self.value(own, known, node.scope, names, "activation", node.id)
            node.outputs.append(name)
            if place >= 0:
                region.results[place] = name
            lacks = lacks or known[0] == "unknown"
        if lacks:
            self.lacking.append(node)
        if node.op == "onnx::Cast":
            node.out_dtype = known[0]

    def origin(self, key: str, own: str, props: Any) -> tuple[str, str]:
        """Module path and source line of a node."""
        told = {one.key: one.value for one in props}
        if any(name.startswith(OURS) for name in told):
            self.capture.earlier.add(key)
        return facts.module_of(own, told), facts.source_of(told)

    def bodies(self, node: onnx.NodeProto, key: str, scope: str, names: Names) -> list[str]:
        """Read the bodies of a control node; what they return."""
        self.ids.setdefault(key, 1)  # taken, though the node itself comes after its bodies
        inner: list[str] = []
        places: list[tuple[str, int]] = []
        for name, graph in bodies(node):
            path = region_path(scope, key, name)
            found = self.body(graph, path, names).names
            inner += [found[info.name] for info in graph.output]
            places += [(path, index) for index in range(len(graph.output))]
        if places:
            self.capture.returned[key], self.capture.operands[key] = places, len(node.input)
        return inner

    def rule(self, domain: str, op_type: str, attrs: dict[str, Any], results: int) -> tuple[str, Signature]:
        key = (domain, op_type)
        if key not in self.rules:
            domain = plain_domain(domain)
            types = signature(domain, op_type, self.capture.opset(domain), self.provider)
            self.rules[key] = (op_name(domain, op_type), types)
        op, types = self.rules[key]
        if not attrs:
            return op, types
        if op_type == "BatchNormalization" and results > 1:
            types = Signature(why="it updates running statistics, which are FP32")
        if op_type.startswith("Scatter") and attrs.get("reduction") in ("add", "mul"):
            types = Signature(why="it sums into one element, and runtimes refuse it in half precision")
        return op, types

    def fresh(self, own: str, op_type: str) -> str:
        """A unique id: the node's own name, or its operator and a number."""
        nodes, stem = self.graph.nodes, own or op_type
        count = self.ids.get(stem)
        if count is None and own and own not in nodes:
            return own
        count = count or (1 if own else 0)
        while f"{stem}_{count}" in nodes or f"{stem}_{count}" in self.ids:
            count += 1
        self.ids[stem] = count + 1
        return f"{stem}_{count}"


UNKNOWN: facts.Known = ("unknown", (), 1)

__all__ = ["OURS", "Names", "OnnxCapture", "Region", "read", "region_path"]
