"""Everything ONNX: conversion, reading, writing, export, running."""

from importlib.util import find_spec

from mpcompile.errors import OnnxError

# ONNX Runtime comes as one of several distributions with one import name (onnxruntime, onnxruntime-gpu, ...): the extra
# names none, for pip would put the CPU's files over those of the GPU.
_MISSING = [name for name in ("onnx", "onnx_ir", "onnxruntime") if find_spec(name) is None]
if _MISSING:
    raise OnnxError(
        "MP613", f"{', '.join(_MISSING)} cannot be imported",
        try_="pip install 'mpcompile[onnx]' onnxruntime; on a GPU 'mpcompile[gpu]', which has onnxruntime-gpu",
    )  # fmt: skip
