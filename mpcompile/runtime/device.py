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
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _cpu_has("avx512_bf16", "amx_bf16", "bf16")


@functools.cache
def emulated_kinds(device: str) -> tuple[str, ...]:
    """The kinds whose FP16 nodes compute in FP32 and round: all matrix work on a CPU without FP16 matrix kernels.

    Measured on an AVX512-BF16 CPU: FP16 matmul and convolution run at 0.01 to 0.25 times the speed of FP32.
    """
    return MATRIX_KINDS if device == "cpu" and not _cpu_has("amx_fp16", "avx512_fp16") else ()


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
