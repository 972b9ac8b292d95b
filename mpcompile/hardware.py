"""What the device here can do: its row, which low type "auto" means, and where FP16 must be emulated."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from mpcompile import devices
from mpcompile.policy import Policy

MATRIX_KINDS = ("matmul", "convolution", "attention", "rnn")


@functools.cache
def has_native_bf16(device: str) -> bool:
    """BF16 in hardware: CUDA from sm_80 on; a CPU whose matrix library has BF16 kernels (AVX512-BF16, AMX, SVE)."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _cpu_has("avx512_bf16", "amx_bf16", "bf16")


def emulated_kinds(device: str, low: str, *, compiled: bool) -> tuple[str, ...]:
    """The kinds whose low nodes must compute in FP32 and round.

    * FP16 matrix work on a CPU without FP16 matrix kernels: measured 0.01 to 0.25 times the speed of FP32. Computing
      in FP32 and rounding is also what tensor cores do.
    * Normalizations op by op. On CUDA the layer_norm and group_norm kernels refuse FP32 weights beside low input (torch
      2.11: "expected scalar type BFloat16 but found Float"); on a CPU layer_norm's backward adds up the gradients of
      weight and bias in the low type (60 % off at 2,000 rows in BF16). Compiled, the FP32 arithmetic is fused away.
    """
    norms = () if compiled else ("normalization",)
    if device != "cpu" or low != "fp16" or _cpu_has("amx_fp16", "avx512_fp16"):
        return norms
    return (*MATRIX_KINDS, *norms)


def resolve_policy(policy: Policy, device: str) -> Policy:
    """Replace low="auto": what the pinned or the user's own row does faster; else BF16 where native, else FP16 on CUDA
    with tensor cores, else FP32 with a warning.

    Raises:
      RuleError: MP206, for a device file that cannot be read.
    """
    if policy.low != "auto":
        return policy
    row = devices.own_rows().get(device) if policy.device == "auto" else devices.pinned(policy.device)
    if row is not None:
        return policy.with_low(row.faster())
    if has_native_bf16(device):
        return policy.with_low("bf16")
    if device == "cuda" and torch.cuda.get_device_capability()[0] >= 7:
        return policy.with_low("fp16")
    warnings.warn(
        f"mpcompile: {device} has neither native BF16 nor FP16 tensor cores, so policy 'auto' stays FP32; "
        "write policy='bf16' or 'fp16' to force one",
        stacklevel=3,
    )
    return policy.with_low("fp32")


def auto_low(device: str) -> str:
    """What the policy "auto" is on a device here ("cuda" or "cpu"), without the warning: "bf16", "fp16" or "fp32"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve_policy(Policy(), device).low


def row_name(policy: Policy, device: str) -> str:
    """What a plan is priced for: the pinned row, else the row of the device ("cuda" or "cpu") that is here.

    A CUDA device is found by its product's name, then by its compute capability. Every CPU has the row "cpu", the user's
    own where the user has measured one.
    """
    if policy.device != "auto":
        return policy.device
    if device != "cuda" or "cuda" in devices.own_rows() or not torch.cuda.is_available():
        return device
    return cuda_row(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def cuda_row(product: str, capability: tuple[int, int]) -> str:
    """The row of a CUDA device: of its product, else of the newest architecture that is not newer than it.

    >>> cuda_row("NVIDIA H100 80GB HBM3", (9, 0)), cuda_row("NVIDIA L4", (8, 9)), cuda_row("Tesla V100", (7, 0))
    ('h100', 'a100', 't4')
    """
    named = [row for row in devices.rows().values() if row.family == "cuda" and row.capability]
    words = set(product.upper().replace("-", " ").split())
    for row in named:
        if words & set(row.products):
            return row.name
    older = [row for row in named if row.capability <= capability[0] + capability[1] / 10]
    found = max(older, key=lambda row: row.capability) if older else min(named, key=lambda row: row.capability)
    return found.name


def device_of(tensors: Iterable[Any]) -> str:
    """Where a graph of these arguments or parameters runs: "cuda" when any tensor is there, else "cpu"."""
    kinds = {t.device.type for t in tensors if isinstance(t, torch.Tensor)}
    return "cuda" if "cuda" in kinds else "cpu"


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return frozenset()
    return frozenset(lines[0].split()) if lines else frozenset()


def _cpu_has(*flags: str) -> bool:
    return any(flag in _cpu_flags() for flag in flags)
