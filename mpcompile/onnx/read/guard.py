"""Look at a model of anyone's making before anything is computed from what it claims.

A file may name sizes that it does not hold, files that are not its own, functions that call each other without end.
Each is refused here, in time and memory that go with the size of the file itself.
"""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter

import numpy as np
import onnx
from onnx import numpy_helper

from mpcompile.errors import OnnxError
from mpcompile.onnx.schema import plain_domain

# Protobuf reads messages nested 100 deep, and a body is three deep.
DEPTH = 33
# Nodes of a model whose functions are written out in place of their calls.
NODES = 250_000
# Bytes of one message, protobuf's own limit.
MESSAGE = 2**31 - 1
RANK = 64
EXTERNAL = onnx.TensorProto.EXTERNAL
STRING = onnx.TensorProto.STRING
TYPES = {number: name for name, number in onnx.TensorProto.DataType.items() if number}
# Bits of an element where they are not those of its numpy type.
BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
# Field in which elements stand that are not raw bytes, and how many entries one takes.
FIELDS = {
    "FLOAT": ("float_data", 1), "COMPLEX64": ("float_data", 2), "DOUBLE": ("double_data", 1),
    "COMPLEX128": ("double_data", 2), "INT64": ("int64_data", 1), "UINT64": ("uint64_data", 1),
    "UINT32": ("uint64_data", 1), "STRING": ("string_data", 1),
}  # fmt: skip


def guard(proto: onnx.ModelProto, folder: str, path: str) -> None:
    """Refuse a model that is none, or that claims what it does not hold.

    Args:
      folder: where its data files lie; "" for the working directory.
      path: the file that it came from; "" for a message in memory.

    Raises:
      OnnxError: MP601, MP609.
    """
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise OnnxError("MP601", "there is no graph in it: it is not an ONNX model", where=path)
    files = _Files(folder, path)
    for graph in _graphs(proto, path):
        for tensor in _tensors(graph):
            _tensor(tensor, files)
        for sparse in graph.sparse_initializer:
            _sparse(sparse, files)
    if proto.functions:
        _calls(proto, path)


def readable(path: str) -> None:
    """Refuse what is no file, holds nothing, or cannot be a message.

    Raises:
      OnnxError: MP601.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise OnnxError("MP601", "there is no such file", where=path, why=str(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise OnnxError("MP601", "it is no file" if not stat.S_ISDIR(found.st_mode) else "it is a folder", where=path)
    if not found.st_size:
        raise OnnxError("MP601", "the file is empty: it is not an ONNX model", where=path)
    if found.st_size > MESSAGE:
        raise OnnxError("MP601", f"a message of {found.st_size:,} bytes: protobuf holds 2 GB", where=path,
                        try_="keep the weights in a data file: onnx.save(model, path, save_as_external_data=True)")  # fmt: skip


def _graphs(proto: onnx.ModelProto, path: str) -> Iterator[onnx.GraphProto]:
    """Every graph of the model, those of functions as well, which are read as graphs of nodes."""
    level = [proto.graph, *(_as_graph(function) for function in proto.functions)]
    for _ in range(DEPTH):
        yield from level
        level = [body for graph in level for node in graph.node for body in _bodies(node)]
        if not level:
            return
    raise OnnxError("MP609", f"bodies are nested more than {DEPTH} deep", where=path)


def _as_graph(function: onnx.FunctionProto) -> onnx.GraphProto:
    graph = onnx.GraphProto()
    graph.node.extend(function.node)
    return graph


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attr in node.attribute:
        if attr.type == onnx.AttributeProto.GRAPH:
            yield attr.g
        elif attr.type == onnx.AttributeProto.GRAPHS:
            yield from attr.graphs


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers, and tensors that are attributes."""
    yield from graph.initializer
    for node in graph.node:
        for attr in node.attribute:
            if attr.type == onnx.AttributeProto.TENSOR:
                yield attr.t
            elif attr.type == onnx.AttributeProto.TENSORS:
                yield from attr.tensors


def _tensor(tensor: onnx.TensorProto, files: _Files) -> None:
    """Hold a tensor's dimensions to its bytes."""
    dims, name = tensor.dims[:], tensor.name
    kind = TYPES.get(tensor.data_type)
    if kind is None:
        raise OnnxError("MP601", f"the tensor {name!r} has no element type that there is", where=files.path)
    count = _count(dims, name, files)
    if tensor.data_location == EXTERNAL:
        files.check(tensor, _bytes(count, kind))
        return
    if tensor.HasField("raw_data") and kind != "STRING":
        held, wanted, of = len(tensor.raw_data), _bytes(count, kind), "bytes"
    else:
        field, each = FIELDS.get(kind, ("int32_data", 1))
        held, of = len(getattr(tensor, field)), "elements"
        wanted = -(-count * BITS[kind] // 8) if kind in BITS else count * each
    if held != wanted and not (kind in BITS and held == count):
        raise OnnxError("MP609", f"the tensor {name!r} claims {wanted:,} {of} by its dimensions {dims}, and holds {held:,}",
                        where=files.path)  # fmt: skip


def _count(dims: Sequence[int], name: str, files: _Files) -> int:
    """Elements of a tensor of these dimensions."""
    if len(dims) > RANK or any(dim < 0 for dim in dims):
        raise OnnxError(
            "MP609", f"the tensor {name!r} has dimensions that no tensor has: {dims[:RANK]}", where=files.path
        )
    return math.prod(dims)


def _bytes(count: int, kind: str) -> int:
    if kind == "STRING":
        return 0
    if kind in BITS:
        return -(-count * BITS[kind] // 8)
    return count * int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(kind))).itemsize)


def _sparse(sparse: onnx.SparseTensorProto, files: _Files) -> None:
    """A sparse initializer becomes a dense one: it must fit, and every index must be in it."""
    dims, name = sparse.dims[:], sparse.values.name
    _tensor(sparse.values, files)
    _tensor(sparse.indices, files)
    whole = _count(dims, name, files)
    if whole * 8 > MESSAGE:
        raise OnnxError("MP609", f"the sparse tensor {name!r} is of {dims}, which no message holds", where=files.path)
    places = numpy_helper.to_array(sparse.indices)
    ends = np.array(dims if places.ndim == 2 else [whole])
    fits = places.ndim == 1 or (places.ndim == 2 and places.shape[1] == len(dims))
    if not fits or len(places) != math.prod(sparse.values.dims) or (places < 0).any() or (places >= ends).any():
        raise OnnxError("MP609", f"the sparse tensor {name!r} has elements outside of its dimensions", where=files.path)


class _Files:
    """The data files of a model; each is looked at once."""

    def __init__(self, folder: str, path: str) -> None:
        self.folder, self.path = folder or ".", path
        self.root = os.path.realpath(self.folder)
        self.sizes: dict[str, int] = {}

    def check(self, tensor: onnx.TensorProto, wanted: int) -> None:
        told = {entry.key: entry.value for entry in tensor.external_data}
        location, name = told.get("location", ""), tensor.name
        if tensor.data_type == STRING:
            raise OnnxError("MP609", f"the tensor {name!r} has strings in a data file", where=self.path)
        if location not in self.sizes:
            self.sizes[location] = self._size(location, name)
        try:
            offset, length = int(told.get("offset") or 0), int(told.get("length") or wanted)
        except ValueError as error:
            raise OnnxError("MP609", f"the tensor {name!r} has an offset or a length that is no number",
                            where=self.path) from error  # fmt: skip
        if offset < 0 or length != wanted or offset + wanted > self.sizes[location]:
            raise OnnxError("MP609", f"the tensor {name!r} claims {wanted:,} bytes from {offset:,} on (length {length:,}), "
                            f"and {location!r} has {self.sizes[location]:,}", where=self.path)  # fmt: skip

    def _size(self, location: str, name: str) -> int:
        """Bytes of the data file `location`, which must be a file of its own beside the model."""
        if (
            not location
            or "\0" in location
            or os.path.isabs(location)
            or ".." in location.replace("\\", "/").split("/")
        ):
            raise OnnxError("MP609", f"the data of {name!r} lies at {location!r}, outside of the model's folder",
                            where=self.path)  # fmt: skip
        place = os.path.join(self.folder, location)
        try:
            found = os.stat(place)
        except OSError as error:
            raise OnnxError(
                "MP601", f"the data file {location!r} is not there", where=self.path, why=str(error)
            ) from error
        if os.path.commonpath([self.root, os.path.realpath(place)]) != self.root:
            raise OnnxError("MP609", f"the data file {location!r} is a link out of the model's folder", where=self.path)
        if not stat.S_ISREG(found.st_mode):
            raise OnnxError("MP609", f"the data file {location!r} is no file", where=self.path)
        if self.path and os.path.samefile(place, self.path):
            raise OnnxError("MP609", f"the data of {name!r} is said to be in the model's own file", where=self.path)
        return found.st_size


Key = tuple[str, str, str]


def _calls(proto: onnx.ModelProto, path: str) -> None:
    """Count the nodes that there are once functions are written out in place of their calls."""
    functions = {(plain_domain(f.domain), f.name, f.overload): f for f in proto.functions}
    own = {key: _operators(function.node, functions.keys()) for key, function in functions.items()}
    sizes: dict[Key, int] = {}

    def size(plain: int, calls: Counter[Key]) -> int:
        return min(plain + sum(times * sizes[callee] for callee, times in calls.items()), NODES + 1)

    try:
        for key in TopologicalSorter({key: calls.keys() for key, (_, calls) in own.items()}).static_order():
            sizes[key] = size(*own[key])
    except CycleError as error:
        raise OnnxError(
            "MP609", f"functions call each other in a circle: {error.args[1][0][1]!r}", where=path
        ) from error
    if size(*_operators(proto.graph.node, functions.keys())) > NODES:
        raise OnnxError("MP609", f"with its functions written out the model has more than {NODES:,} nodes", where=path)


def _operators(nodes: Iterable[onnx.NodeProto], known: Collection[Key]) -> tuple[int, Counter[Key]]:
    """How many nodes call no function, and how often each function is called; bodies count."""
    plain, calls = 0, Counter[Key]()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        key = (plain_domain(node.domain), node.op_type, node.overload)
        if key in known:
            calls[key] += 1
        else:
            plain += 1
        waiting += [inner for body in _bodies(node) for inner in body.node]
    return plain, calls


__all__ = ["guard", "readable"]
