"""Small ONNX models for the tests, written as text."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper


def parse(body: str, opset: int = 20, ir: int = 10, domains: str = "", **weights: Any) -> onnx.ModelProto:
    """A model of ONNX's text form; `weights` become initializers."""
    imports = f'"" : {opset}' + (f", {domains}" if domains else "")
    model = onnx.parser.parse_model(f"<ir_version: {ir}, opset_import: [{imports}]>\n{body}")
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in weights.items())
    return model


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def mlp() -> onnx.ModelProto:
    return parse(
        """mlp (float[n, 16] x) => (float[n, 4] y) {
            h = MatMul(x, w1)
            a = Add(h, b1)
            r = Gelu(a)
            y = Gemm(r, w2, b2)
        }""",
        w1=noise(16, 32, scale=0.2), b1=noise(32, seed=1), w2=noise(32, 4, seed=2, scale=0.2), b2=noise(4, seed=3),
    )  # fmt: skip


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def types(model: onnx.ModelProto) -> dict[str, str]:
    """Name of each value of the main graph -> element type, by strict inference."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    infos = (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info)
    names = {i.name: onnx.TensorProto.DataType.Name(i.type.tensor_type.elem_type) for i in infos}
    return names | {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in inferred.graph.initializer}
