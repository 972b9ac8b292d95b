"""What a conversion is asked for, and the device row that it is priced for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from mpcompile.devices import pinned
from mpcompile.errors import OnnxError
from mpcompile.graph import Node
from mpcompile.onnx.run.session import provider_name
from mpcompile.policy import Policy

# The row of `devices.toml` that a provider's plan is priced for.
ROWS = {"cpu": "cpu-onnx", "tensorrt": "tensorrt-onnx"}


@dataclass(frozen=True)
class Options:
    """What a conversion was asked for.

    Fields:
      keep_fp32, low: globs on module path, operator ("onnx::Exp") or node name, or callables of a `Node`.
      strict: an operator without a rule is an error instead of FP32.
      keep_io: inputs and outputs keep their types; False gives FP32 ones in the low type.
      provider: whose kernels the model is for: "cuda", "cpu", "tensorrt" or another provider of ONNX Runtime (the
        schemas alone, where no table of its kernels is known); "" for any.
      simulate: write FP32 operators whose results are rounded through the low type (see `OnnxMixedPrecision.simulated`).
      annotate: write each node's decision and its reason into the node's metadata.
      session_options: `onnxruntime.SessionOptions` for the check that the model loads (custom operator libraries).
    """

    keep_fp32: tuple[Any, ...] = ()
    low: tuple[Any, ...] = ()
    strict: bool = False
    keep_io: bool = True
    provider: str = "cuda"
    simulate: bool = False
    annotate: bool = True
    session_options: Any = None


class PlanOptions(TypedDict, total=False):
    """The fields of `Options` as they are given: one override or several, any name of a provider."""

    keep_fp32: Any
    low: Any
    strict: bool
    keep_io: bool
    provider: str
    simulate: bool
    annotate: bool
    session_options: Any


class ConvertOptions(PlanOptions, total=False):
    """All options of `mpcompile.onnx.convert.convert`."""

    calibrate: Any
    ranges: Any
    max_error: float | None
    auto: bool


def options_of(keep_fp32: Any = (), low: Any = (), provider: str = "cuda", **given: Any) -> Options:
    """The options as they are kept.

    Raises:
      OnnxError: MP611.
    """
    return Options(_several(keep_fp32), _several(low), provider=provider_name(provider), **given)


def _several(overrides: Any) -> tuple[Any, ...]:
    return (overrides,) if isinstance(overrides, str) or callable(overrides) else tuple(overrides)


@dataclass(frozen=True)
class Named:
    """An override that picks nodes by id, as `keep_fp32` takes it."""

    ids: frozenset[str]
    __name__ = "settled"

    def __call__(self, node: Node) -> bool:
        return node.id in self.ids


def row_of(policy: Policy, options: Options) -> str:
    """The row that a plan is priced for."""
    return ROWS.get(options.provider, "cuda-onnx") if policy.device == "auto" else policy.device


def onnx_policy(policy: str | Policy) -> Policy:
    """The policy with "auto" resolved: FP16, which every provider runs."""
    parsed = Policy.parse(policy)
    if parsed.products == "fp8":
        raise OnnxError("MP612", "ONNX models are converted without FP8 products", try_="policy='bf16' or 'fp16'")
    if parsed.device != "auto":
        pinned(parsed.device)
    return parsed.with_low("fp16") if parsed.low == "auto" else parsed
