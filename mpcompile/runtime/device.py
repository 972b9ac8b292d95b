"""What a device can do: which low type "auto" means, and where FP16 must be emulated."""

from __future__ import annotations

import functools
import warnings

import torch

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
    * Normalizations on CUDA op by op: its layer_norm and group_norm kernels refuse FP32 weights beside low input
      (torch 2.11: "expected scalar type BFloat16 but found Float"). Compiled, the FP32 arithmetic is fused away.
    """
    if device == "cpu":
        return MATRIX_KINDS if low == "fp16" and not _cpu_has("amx_fp16", "avx512_fp16") else ()
    return () if compiled else ("normalization",)


def settle_policy(policy: Policy, device: str) -> Policy:
    """Replace low="auto": BF16 where native, else FP16 on CUDA with tensor cores, else FP32 with a warning."""
    if policy.low != "auto":
        return policy
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
