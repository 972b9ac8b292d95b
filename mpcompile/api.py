"""`mpcompile(model, policy, …)`: choose the policy, run the pipeline, return the module."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

import torch
from torch import nn

from mpcompile.admission import check_model, check_overrides
from mpcompile.aten.exported import without_dtype_checks
from mpcompile.compiler import settings_of
from mpcompile.errors import OnnxError, RuleError
from mpcompile.module import MixedPrecisionModule, rewrapped
from mpcompile.policy import Policy

if TYPE_CHECKING:
    from mpcompile.onnx.converted import OnnxMixedPrecision
    from mpcompile.onnx.options import ConvertOptions

BACKENDS = ("inductor", "eager", "onnxruntime")


@overload
def mpcompile(
    model: nn.Module | torch.export.ExportedProgram,
    policy: str | Policy = "auto",
    *,
    keep_fp32: Any = (),
    low: Any = (),
    fp8: Any = (),
    ranges: Any = None,
    backend: str = "inductor",
    dynamic: bool | None = None,
    strict: bool = False,
    example_inputs: Sequence[Any] | None = None,
) -> MixedPrecisionModule: ...
@overload
def mpcompile(
    model: str | os.PathLike[str],
    policy: str | Policy = "auto",
    **options: Unpack[ConvertOptions],
) -> OnnxMixedPrecision: ...
@overload
def mpcompile(model: Any, policy: str | Policy = "auto", **options: Any) -> Any: ...
def mpcompile(model: Any, policy: str | Policy = "auto", **options: Any) -> Any:
    """A model in mixed precision, called the same way as the one given.

    The model's FP32 parameters stay the masters: the same `Parameter` objects under the same names, so state dicts,
    optimizers, schedulers and checkpoints go on working. The model itself is not changed.

    Args:
      model: an `nn.Module`, a `torch.export.ExportedProgram`, an `onnx.ModelProto` or the path of an ``.onnx`` file
        (for ONNX the result is an `OnnxMixedPrecision`, and `onnx_options` are those of `mpcompile.onnx.convert.convert`).
      policy: "auto", "bf16", "fp16", "fp8", "fp32", fields such as "low=fp16,output=low", or a `Policy`.
      keep_fp32, low: globs on module path, op name or node name, or callables of a `Node`; one or several.
      fp8: the same, for linear layers that read their operands in FP8 whatever it costs (see `mpcompile.fp8`).
      ranges: what `calibrate` measured (a `Ranges`, of ONNX an `OnnxRanges`, or its file): what FP16 cannot hold stays FP32.
      backend: "inductor" (compiled), "eager" (the rewritten graph op by op), or "onnxruntime" (training step, inference).
      dynamic: as in `torch.compile`.
      strict: an op without a rule is an error instead of FP32.
      example_inputs: compile now, for these positional arguments, instead of at the first call.

    Returns:
      A `MixedPrecisionModule`, or an `OnnxMixedPrecision`.

    Raises:
      MPCompileError: a policy, override, model or ONNX file that will not do; the model is untouched.
    """
    return _converted(model, policy, **options) if _is_onnx(model) else _wrapped(model, policy, **options)


def _converted(model: Any, policy: str | Policy, *, fp8: Any = (), ranges: Any = None, **options: Any) -> Any:
    if fp8:
        raise OnnxError("MP612", "ONNX models take no fp8=", try_="policy='bf16' or 'fp16'")
    from mpcompile.onnx.convert import convert

    return convert(model, policy, **options, **({} if ranges is None else {"ranges": ranges}))


def _wrapped(
    model: Any,
    policy: str | Policy,
    *,
    keep_fp32: Any = (),
    low: Any = (),
    fp8: Any = (),
    ranges: Any = None,
    backend: str = "inductor",
    dynamic: bool | None = None,
    strict: bool = False,
    example_inputs: Sequence[Any] | None = None,
    **onnx_options: Any,
) -> MixedPrecisionModule:
    if onnx_options:
        raise TypeError(f"mpcompile() got arguments that only ONNX models take: {', '.join(onnx_options)}")
    if backend not in BACKENDS:
        raise RuleError("MP204", f"there is no backend {backend!r}", try_=" or ".join(map(repr, BACKENDS)))
    if isinstance(model, torch.export.ExportedProgram):
        model = without_dtype_checks(model.module())
    if isinstance(model, MixedPrecisionModule):
        model = model.model
    check_model(model)
    inner = "inductor" if backend == "onnxruntime" else backend
    settings = settings_of(policy, keep_fp32, low, strict, inner, fp8, ranges)
    check_overrides(model, settings)
    wrapped = rewrapped(model, settings, dynamic, backend)
    if example_inputs is not None:
        with torch.no_grad():
            wrapped(*example_inputs)
    return wrapped


def _is_onnx(model: Any) -> bool:
    return isinstance(model, (str, os.PathLike)) or type(model).__module__.startswith("onnx")


__all__ = ["BACKENDS", "MixedPrecisionModule", "mpcompile"]
