"""An ONNX model that was read: the message, the precision graph, and which belongs to which."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx

from mpcompile.graph import PrecisionGraph
from mpcompile.onnx.read.load import Loaded
from mpcompile.onnx.read.message import opset
from mpcompile.signature import Signature


class Names(dict[str, str]):
    """Name in one graph of the model -> name in the precision graph; a body sees those of the graphs around it."""

    def __init__(self, outer: Names | None) -> None:
        self.outer = outer

    def __missing__(self, name: str) -> str:
        if self.outer is None:
            raise KeyError(name)
        return self.outer[name]


@dataclass
class Region:
    """One graph of the model: the main one, or a body.

    Fields:
      message: the graph itself, as it was prepared.
      names: its own names.
      given: names of its inputs.
      ids: ids of its nodes, in order.
      results: the value that each entry of ``message.value_info`` is about; "" where that is no result of a node, or one
        that the graph returns.
    """

    message: onnx.GraphProto
    names: Names
    given: frozenset[str] = frozenset()
    ids: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)


@dataclass
class OnnxCapture:
    """An ONNX model, and the precision graph that was read from it.

    Fields:
      loaded: the prepared model, which `mpcompile.onnx.write.edits.write` copies and rewrites.
      source: the model as it was given: a path, a `ModelProto`, or an `onnx_ir.Model`.
      graph: the precision graph.
      signatures: node id -> type variables of its operator.
      renamed: value name -> its name in the model, where that is another; "" for a result without one.
      earlier: ids of nodes with metadata of an earlier conversion.
      tensors: initializer -> what has its elements: a message, or a tensor of `onnx_ir`.
      regions: scope -> graph of the model.
      returned: control node id -> (scope of a body, index) of each slot beyond the node's own operands.
      operands: control node id -> how many slots are its own.
      notes: lines for the user.
    """

    loaded: Loaded
    source: Any = None
    graph: PrecisionGraph = field(default_factory=PrecisionGraph)
    signatures: dict[str, Signature] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    earlier: set[str] = field(default_factory=set)
    tensors: dict[str, Any] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    returned: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    operands: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def own(self, name: str) -> str:
        """The name in the model of a value; "" when it has none."""
        return self.renamed.get(name, name)

    def opset(self, domain: str) -> int:
        """The opset version that the model imports of `domain`."""
        return opset(self.loaded.proto, domain)


def region_path(scope: str, key: str, name: str) -> str:
    """The scope of body `name` of the control node `key`, which is in `scope` itself."""
    return f"{scope}/{key}.{name}".lstrip("/")


# How the names of our metadata begin.
OURS = "mpcompile."
