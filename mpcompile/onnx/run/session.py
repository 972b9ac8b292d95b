"""Run ONNX models on ONNX Runtime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mpcompile.errors import RuntimeFailure, page

page(
    "MP703",
    "Inputs that the ONNX model does not take",
    "A name is missing or unknown, or an array has another element type than the model's input.",
    "Give a mapping from the model's input names to arrays; the message lists them.",
)


def session(model: Any, providers: Sequence[str] | None = None, options: Any = None) -> ort.InferenceSession:
    """An ONNX Runtime session that keeps its warnings to itself.

    Args:
      model: a `ModelProto`, its bytes, a path, or an `onnx_ir.Model` (by way of a file: its weights may be anywhere).
      providers: execution providers in order of preference; all that are installed when None.
      options: an `onnxruntime.SessionOptions`.
    """
    if options is None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
    if isinstance(model, ir.Model):
        with on_disk(model) as path:
            return session(path, providers, options)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    source = source if isinstance(source, bytes) else os.fspath(source)
    return ort.InferenceSession(source, options, providers=list(providers or ort.get_available_providers()))


@contextmanager
def on_disk(model: ir.Model) -> Iterator[str]:
    """The path of `model` in a folder that is gone afterwards; weights are written one at a time."""
    with tempfile.TemporaryDirectory(prefix="mpcompile.", ignore_cleanup_errors=True) as folder:
        path = os.path.join(folder, "model.onnx")
        ir.save(model, path, external_data="model.data")
        yield path


def has_provider(name: str) -> bool:
    """True when ONNX Runtime here can use the provider called "cpu", "cuda" and so on."""
    return f"{name}executionprovider" in {p.lower() for p in ort.get_available_providers()}


def run(held: ort.InferenceSession, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None, *,
        run_options: Any = None) -> dict[str, Any]:  # fmt: skip
    """Run `held` once; BF16 arrays (of ml_dtypes) go in and come out, which ONNX Runtime's own `run` refuses.

    Raises:
      RuntimeFailure: MP703, for inputs that the model does not take.
    """
    known = {i.name: i for i in held.get_inputs()}
    may = {*known, *(i.name for i in held.get_overridable_initializers())}
    wrong = [name for name in feeds if name not in may]
    lacking = [name for name in known if name not in feeds]
    if wrong or lacking:
        raise RuntimeFailure("MP703", f"inputs {wrong or lacking} are {'unknown' if wrong else 'missing'}",
                             try_=f"the model's inputs are {', '.join(known)}")  # fmt: skip
    names = list(outputs) if outputs is not None else [o.name for o in held.get_outputs()]
    if not any(_is_bf16(i) for i in (*held.get_inputs(), *held.get_outputs())):
        return dict(zip(names, held.run(names, dict(feeds), run_options), strict=True))
    binding = held.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, _ortvalue(array))
    for name in names:
        binding.bind_output(name)
    held.run_with_iobinding(binding, run_options)
    return {name: _array(value) for name, value in zip(names, binding.get_outputs(), strict=True)}


def _is_bf16(arg: Any) -> bool:
    return bool(arg.type == "tensor(bfloat16)")


def _ortvalue(array: Any) -> ort.OrtValue:
    if getattr(array, "dtype", None) == ml_dtypes.bfloat16:
        bits = np.ascontiguousarray(array).view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _array(value: ort.OrtValue) -> Any:
    if value.element_type() != onnx.TensorProto.BFLOAT16:
        return value.numpy()
    import torch.utils.dlpack  # DLPack is the only way out for BF16

    return torch.utils.dlpack.from_dlpack(value._ortvalue).view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


__all__ = ["has_provider", "on_disk", "run", "session"]
