"""Load an ONNX model as messages, large weights left where they are.

The message serves three times: ONNX infers types on it, the precision graph is read from it, and its nodes are copied
when the model is written.  Its large weights are promises of a file that nobody opens, so it is small whatever the
model weighs.  Where a model needs one of `onnx_ir`'s passes, it goes through `onnx_ir` and comes back as a message.
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

from mpcompile.errors import OnnxError
from mpcompile.onnx.read.guard import guard, readable
from mpcompile.onnx.tensors import as_object

# Bytes from which an initializer is kept out of the message (shape inference reads shapes, all small).
WEIGHT = 4096
EXTERNAL = onnx.TensorProto.EXTERNAL


@dataclass
class Loaded:
    """A model as a message.

    Fields:
      proto: the model without its large weights; it may be the caller's own, so it is replaced and never changed.
      weights: the main graph's initializers that `proto` only promises, by name: messages, or tensors of `onnx_ir`.
      folder: where external data lies; "" for the working directory.
      path: the file that it came from, for errors.
    """

    proto: onnx.ModelProto
    weights: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    path: str = ""

    def held(self, tensor: onnx.TensorProto, *, main: bool) -> Any:
        """What has the elements of an initializer of `proto`, one of its main graph or not."""
        if tensor.data_location != EXTERNAL:
            return tensor
        kept = self.weights.get(tensor.name) if main else None
        return ir.serde.deserialize_tensor(tensor, self.folder) if kept is None else kept

    def objects(self) -> ir.Model:
        """The model as `onnx_ir` objects, with all weights.

        Raises:
          OnnxError: MP601.
        """
        try:
            with quiet():
                model = ir.from_proto(self.proto)
        except Exception as error:  # `onnx_ir` raises what it likes
            raise unreadable(error, self.path) from error
        if self.folder:
            ir.external_data.set_base_dir(model.graph, self.folder)
        for name, held in self.weights.items():
            model.graph.initializers[name].const_value = as_object(held)
        return model

    def take(self, model: ir.Model) -> None:
        """Hold `model` instead; its large weights stay objects."""
        self.weights = {}
        for value in model.graph.initializers.values():
            held = value.const_value
            if held is None or not _stays_out(held):
                continue
            name = str(value.name)
            self.weights[name] = held.raw if isinstance(held, ir.serde.TensorProtoTensor) else held
            shape = ir.Shape(held.shape.numpy())
            value.const_value = ir.ExternalTensor("promise", 0, held.nbytes, held.dtype, shape=shape, name=name)
        try:
            with quiet():
                self.proto = ir.to_proto(model)
        except Exception as error:  # `onnx_ir` raises what it likes
            raise unreadable(error, self.path) from error


def _stays_out(held: Any) -> bool:
    if isinstance(held, ir.ExternalTensor):
        return True
    return held.dtype != ir.DataType.STRING and bool(held.nbytes > WEIGHT)


def load(model: Any) -> Loaded:
    """A model of a path, a `ModelProto` or an `onnx_ir.Model`; weights on disk stay there.

    Raises:
      OnnxError: MP601, when it is none of these or cannot be read.
    """
    if isinstance(model, ir.Model):
        loaded = Loaded(onnx.ModelProto())
        loaded.take(model.clone())
        return loaded
    if isinstance(model, onnx.ModelProto):
        guard(model, "", "")
        return Loaded(*_without_weights(model))
    if not isinstance(model, (str, os.PathLike)):
        raise OnnxError("MP601", f"a {type(model).__name__} is no ONNX model", try_="a path or an onnx.ModelProto")
    path = os.fspath(model)
    readable(path)
    try:
        given = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own error classes vary by version
        why = f"{type(error).__name__}: {error}"
        raise OnnxError("MP601", "the file is not an ONNX model", where=path, why=why) from error
    folder = os.path.dirname(path) or "."
    guard(given, folder, path)
    return Loaded(*_without_weights(given), folder, path)


def unreadable(error: BaseException, path: str, refused: str = "") -> OnnxError:
    """What is said of a model that `error` says is wrong: the first reason, which libraries wrap many times over."""
    while error.__cause__ is not None:
        error = error.__cause__
    why = f"{type(error).__name__}: {error}"
    return OnnxError("MP601", "the model cannot be read", where=path, why=f"{refused} ({why})" if refused else why)


def refusal(model: Any) -> str:
    """What onnx.checker has against a model; "" when it has nothing, or cannot be asked."""
    try:
        given = ir.to_proto(model) if isinstance(model, ir.Model) else model
        onnx.checker.check_model(given if isinstance(given, onnx.ModelProto) else os.fspath(given))
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:
        return " ".join(str(error).split())[:400]
    except Exception:  # it raises what it likes of what it does not understand, too: that says nothing
        return ""
    return ""


def _without_weights(given: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """`given`, or a copy with promises in place of the main graph's large weights, and these weights by name."""
    sparse = given.graph.sparse_initializer
    if not sparse and all(tensor.ByteSize() <= WEIGHT for tensor in given.graph.initializer):
        return given, {}
    twin, weights = onnx.ModelProto(), {}
    copy_fields(given, twin, "graph")
    copy_fields(given.graph, twin.graph, "initializer", "sparse_initializer")
    for tensor in (*given.graph.initializer, *(_dense(tensor) for tensor in sparse)):
        made = twin.graph.initializer.add()
        if tensor.data_location == EXTERNAL or tensor.ByteSize() <= WEIGHT:
            made.CopyFrom(tensor)
            continue
        weights[tensor.name] = tensor
        made.name, made.data_type, made.data_location = tensor.name, tensor.data_type, EXTERNAL
        made.dims.extend(tensor.dims)
        made.external_data.add(key="location", value="promise")
    return twin, weights


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """A sparse initializer with its zeros: nothing here knows another."""
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


def copy_fields(source: Any, target: Any, *but: str) -> None:
    """Copy the fields of a message, some left out, into another of its kind."""
    for field_, content in source.ListFields():
        name = field_.name
        if name in but:
            continue
        if isinstance(content, (str, bytes, int, float)):
            setattr(target, name, content)
        elif hasattr(content, "MergeFrom"):
            getattr(target, name).MergeFrom(content)
        else:
            getattr(target, name).extend(content)


__all__ = ["Loaded", "copy_fields", "load", "quiet", "unreadable"]
