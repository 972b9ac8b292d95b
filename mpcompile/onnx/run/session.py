"""Run ONNX models on ONNX Runtime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mpcompile.errors import OnnxError, RuntimeFailure, suggest

# What is used where nothing is asked for, in this order, of what is installed; TensorRT on request alone.
DEFAULT = ("CUDAExecutionProvider", "CPUExecutionProvider")
SUFFIX = "ExecutionProvider"


def provider_name(given: str) -> str:
    """The short name of a provider: "cuda" for "cuda", "CUDA" and "CUDAExecutionProvider"; "" stays.

    Raises:
      OnnxError: MP611, with near names.
    """
    known = sorted({name.removesuffix(SUFFIX).lower() for name in ort.get_all_providers()})
    name = given.removesuffix(SUFFIX).lower() if isinstance(given, str) else ""
    if isinstance(given, str) and (not name or name in known):
        return name
    near = suggest(name, known)
    raise OnnxError(
        "MP611", f"there is no provider {given!r}", try_=f"did you mean {near}?" if near else ", ".join(known)
    )


def default_providers() -> list[str]:
    """CUDA and the CPU, as far as they are installed."""
    installed = ort.get_available_providers()
    chosen = [name for name in DEFAULT if name in installed]
    if "CUDAExecutionProvider" in chosen:
        _preload()
    return chosen


@cache
def _preload() -> None:
    """Let ONNX Runtime find the CUDA libraries that torch's wheels carry."""
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()


def wanted(providers: Sequence[Any] | None) -> list[str]:
    """Long names of the providers that are asked for, in order."""
    given = _long(providers) if providers else default_providers()
    return [one if isinstance(one, str) else one[0] for one in given]


def placed(held: ort.InferenceSession, wanted: Sequence[str]) -> str:
    """One line: where a session runs, and which wished-for providers did not start."""
    runs = [name.removesuffix(SUFFIX) for name in held.get_providers()]
    lacking = [name.removesuffix(SUFFIX) for name in wanted if name not in held.get_providers()]
    failed = f"; {', '.join(lacking)} did not start" if lacking else ""
    return f"ONNX Runtime {ort.__version__} runs it on {' and '.join(runs)}{failed}"


def session(model: Any, providers: Sequence[str] | None = None, options: Any = None) -> ort.InferenceSession:
    """An ONNX Runtime session that keeps its warnings to itself.

    Args:
      model: a `ModelProto`, its bytes, a path, or an `onnx_ir.Model` (by way of a file: its weights may be anywhere).
      providers: execution providers in order of preference, by their long or short names; CUDA and the CPU when None,
        as far as they are installed (TensorRT runs on request alone).
      options: an `onnxruntime.SessionOptions`.

    Raises:
      OnnxError: MP611.
    """
    if options is None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
    if isinstance(model, ir.Model):
        with on_disk(model) as path:
            return session(path, providers, options)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    source = source if isinstance(source, bytes) else os.fspath(source)
    return ort.InferenceSession(source, options, providers=_long(providers) if providers else default_providers())


def _long(providers: Sequence[Any]) -> list[Any]:
    """Providers as ONNX Runtime names them; (name, options) pairs as they are."""
    long = {name.lower(): name for name in ort.get_all_providers()}
    named = [providers] if isinstance(providers, str) else providers
    return [long[f"{provider_name(one)}{SUFFIX}".lower()] if isinstance(one, str) else one for one in named]


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


__all__ = ["default_providers", "has_provider", "on_disk", "placed", "provider_name", "run", "session", "wanted"]
