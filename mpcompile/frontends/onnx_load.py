"""Load an ONNX model: as `onnx_ir`, beside the message that it was read from, large weights left where they are.

The message (a *skeleton*) serves twice: ONNX infers types on it, and its nodes are copied when the model is written.
Its large weights are promises of a file that nobody opens, so it is small whatever the model weighs.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from mpcompile.errors import OnnxError, page

page(
    "MP601",
    "An ONNX model that cannot be read",
    "The file is missing, is not an ONNX model, or its external data is not where it says.",
    "Check it with `python -c \"import onnx; onnx.checker.check_model('model.onnx')\"`; keep the data file beside it.",
)

# Bytes from which an initializer is kept out of the skeleton (shape inference reads shapes, all small).
WEIGHT = 4096
GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


@dataclass
class Loaded:
    """A model, and the message that it was read from.

    Fields:
      model: ours to change.
      skeleton: the message without large weights; None when the model was given as `onnx_ir`.
      protos: node of `model` -> its message in the skeleton; nodes with bodies have none.
      annotated: some value has a quantization annotation.
    """

    model: ir.Model
    skeleton: onnx.ModelProto | None = None
    protos: dict[ir.Node, onnx.NodeProto] = field(default_factory=dict)
    annotated: bool = True


def load(model: Any) -> Loaded:
    """A model of a path, a `ModelProto` or an `onnx_ir.Model` (copied); weights on disk stay there.

    Raises:
      OnnxError: MP601, when it is none of these or cannot be read.
    """
    if isinstance(model, ir.Model):
        return Loaded(model.clone())
    if isinstance(model, onnx.ModelProto):
        return _loaded(model, "")
    if not isinstance(model, (str, os.PathLike)):
        raise OnnxError("MP601", f"a {type(model).__name__} is no ONNX model", try_="a path or an onnx.ModelProto")
    path = os.fspath(model)
    if not os.path.isfile(path):
        raise OnnxError("MP601", "there is no such file", where=path)
    try:
        given = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own error classes vary by version
        why = f"{type(error).__name__}: {error}"
        raise OnnxError("MP601", "the file is not an ONNX model", where=path, why=why) from error
    loaded = _loaded(given, path)
    ir.external_data.set_base_dir(loaded.model.graph, os.path.dirname(path) or ".")
    return loaded


def _loaded(given: onnx.ModelProto, path: str) -> Loaded:
    skeleton, weights = _skeleton(given)
    try:
        with quiet():
            model = ir.from_proto(skeleton)
    except Exception as error:  # `onnx_ir` raises what it likes
        cause = error
        while cause.__cause__ is not None:  # it wraps the reason in where it was, many times over
            cause = cause.__cause__  # type: ignore[assignment]
        why = f"{type(cause).__name__}: {cause}"
        raise OnnxError("MP601", "the model cannot be read", where=path, why=why) from error
    for name, tensor in weights.items():
        model.graph.initializers[name].const_value = ir.serde.deserialize_tensor(tensor)
    shapes: dict[tuple[int, ...], ir.Shape] = {}
    for tensor, value in zip(skeleton.graph.initializer, model.graph.initializers.values(), strict=False):
        if value.name == tensor.name and value.shape is not None:
            value.shape = shapes.setdefault(tuple(tensor.dims), value.shape)  # one object for equal shapes
    protos = dict(_pairs(model.graph, skeleton.graph))
    return Loaded(model, skeleton, protos, _annotated(skeleton.graph))


def _skeleton(given: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """A copy of `given` with promises in place of the main graph's large weights, and these weights by name."""
    twin, weights = onnx.ModelProto(), {}
    for field_, content in given.ListFields():
        if field_.name != "graph":
            _copy(twin, field_, content)
    for field_, content in given.graph.ListFields():
        if field_.name not in ("initializer", "sparse_initializer"):
            _copy(twin.graph, field_, content)
    dense = [_dense(tensor) for tensor in given.graph.sparse_initializer]
    for tensor in (*given.graph.initializer, *dense):
        made = twin.graph.initializer.add()
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.ByteSize() <= WEIGHT:
            made.CopyFrom(tensor)
            continue
        weights[tensor.name] = tensor
        made.name, made.data_type, made.data_location = tensor.name, tensor.data_type, onnx.TensorProto.EXTERNAL
        made.dims.extend(tensor.dims)
        made.external_data.add(key="location", value="promise")
    return twin, weights


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """A sparse initializer with its zeros: `onnx_ir` knows no other."""
    values = numpy_helper.to_array(sparse.values)
    flat = np.zeros(math.prod(sparse.dims), values.dtype)
    places = numpy_helper.to_array(sparse.indices)
    flat[places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), tuple(sparse.dims))] = values
    return numpy_helper.from_array(flat.reshape(tuple(sparse.dims)), sparse.values.name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings about models that they cannot infer to themselves."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _copy(message: Any, field_: Any, content: Any) -> None:
    if isinstance(content, (str, bytes, int, float)):
        setattr(message, field_.name, content)
    elif hasattr(content, "MergeFrom"):
        getattr(message, field_.name).MergeFrom(content)
    else:
        getattr(message, field_.name).extend(content)


def _pairs(graph: ir.Graph, proto: onnx.GraphProto) -> Iterator[tuple[ir.Node, onnx.NodeProto]]:
    """Each node with its message, for nodes without bodies; those inside bodies too."""
    for node, message in zip(graph, proto.node, strict=True):
        bodies = [attr for attr in message.attribute if attr.type in GRAPHS]
        if not bodies:
            yield node, message
        for attr in bodies:
            held = node.attributes[attr.name].value
            single = attr.type == onnx.AttributeProto.GRAPH
            for body, inner in zip([held] if single else held, [attr.g] if single else attr.graphs, strict=True):
                yield from _pairs(body, inner)


def _annotated(proto: onnx.GraphProto) -> bool:
    if proto.quantization_annotation:
        return True
    attrs = (attr for node in proto.node for attr in node.attribute if attr.type in GRAPHS)
    return any(_annotated(body) for attr in attrs for body in (*attr.graphs, *([attr.g] if attr.HasField("g") else [])))


__all__ = ["Loaded", "load", "quiet"]
