"""Helpers on protobuf messages that every room of ONNX shares."""

from __future__ import annotations

import onnx


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `proto` with all types and shapes that ONNX infers."""
    try:
        return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except (RuntimeError, ValueError):  # an operator's inference function that does not like its input
        twin = onnx.ModelProto()
        twin.CopyFrom(proto)
        return twin


GRAPH, GRAPHS = onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS


def bodies(node: onnx.NodeProto) -> list[tuple[str, onnx.GraphProto]]:
    """(attribute name, body) of a control-flow node."""
    found: list[tuple[str, onnx.GraphProto]] = []
    for attr in node.attribute:
        if attr.type == GRAPH:
            found.append((attr.name, attr.g))
        elif attr.type == GRAPHS:
            found += [(f"{attr.name}.{i}", body) for i, body in enumerate(attr.graphs)]
    return found


def opset(proto: onnx.ModelProto, domain: str) -> int:
    """The opset version that the model imports of `domain` (1 when it imports none)."""
    imports: dict[str, int] = {one.domain: one.version for one in proto.opset_import}
    return imports.get(domain, imports.get("ai.onnx", 1) if not domain else 1)
