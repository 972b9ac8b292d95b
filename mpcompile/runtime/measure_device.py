"""What the processor here does in a second, measured: the numbers of a row of devices.toml."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch

from mpcompile.devices import Device, built_in
from mpcompile.hardware import emulated_kinds

# Wide enough at the end that a product's rate has settled; one that is slow is judged by a smaller one.
WIDTHS = {"cpu": (256, 512, 1024), "cuda": (2048, 8192)}
PATIENCE = 0.05  # seconds of a product
BYTES = {"cpu": 1 << 27, "cuda": 1 << 31}
# (rows, columns, inner) of a product whose call costs more than its work.
SMALL = (32, 64, 64)
TIMES = 5


def measure_device(kind: str) -> Device:
    """The row of the device here: products by precision, copies, and what a call costs.

    Args:
      kind: "cpu" (all threads that torch has now) or "cuda"; it is the row's name.

    FP8 products are not measured: where there are any, their rate is the packaged row's, in proportion to BF16.
    A type that is emulated here (`emulated_kinds`) is planned as on the device that it stands in for: its rate is the
    packaged row's, in proportion to FP32.
    """
    rates = {name: _rate(kind, dtype) for name, dtype in _TYPES.items()}
    emulated = [low for low in ("bf16", "fp16") if emulated_kinds(kind, low, compiled=True)]
    packaged = built_in()[kind]
    for low in emulated:
        rates[low] = rates["fp32"] * packaged.rate(low) / packaged.fp32
    call = _product(kind, SMALL, torch.bfloat16) - _product(kind, SMALL, torch.float32)
    where = (
        torch.cuda.get_device_name() if kind == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    return Device(
        kind,
        fp32=rates["fp32"],
        bf16=rates["bf16"],
        fp16=rates["fp16"],
        bandwidth=2 * BYTES[kind] / _copy(kind),
        launch=_launch(kind),
        low_call_overhead={"bf16": call} if kind == "cpu" and call > 0 else {},
        fp8={recipe: rate * rates["bf16"] / packaged.bf16 for recipe, rate in packaged.fp8.items()}
        if _has_fp8(kind)
        else {},
        family=kind,
        emulated=emulated,
        source=f"measured by `mpcompile doctor --measure` with torch {torch.__version__}: {where}",
    )


def _has_fp8(kind: str) -> bool:
    return kind == "cuda" and torch.cuda.get_device_capability() >= (8, 9)


_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _rate(kind: str, dtype: torch.dtype) -> float:
    """FLOP/s of square products; of FP16 where it is emulated nothing is measured that would be used."""
    if dtype is torch.float16 and emulated_kinds(kind, "fp16", compiled=True):
        return 1.0
    rate = 1.0
    for width in WIDTHS[kind]:
        seconds = _product(kind, (width, width, width), dtype)
        rate = 2.0 * width**3 / seconds
        if seconds > PATIENCE:
            break
    return rate


def _product(kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """Seconds of one product of (rows, inner) and (inner, columns)."""
    rows, columns, inner = shape
    a = torch.randn(rows, inner, device=kind).to(dtype)
    b = torch.randn(inner, columns, device=kind).to(dtype)
    return _best(kind, lambda: a @ b)


def _copy(kind: str) -> float:
    source = torch.ones(BYTES[kind] // 4, device=kind)
    target = torch.empty_like(source)
    return _best(kind, lambda: target.copy_(source))


def _launch(kind: str) -> float:
    """Seconds of one more kernel: many small ones, one after the other."""
    x = torch.ones(16, device=kind)
    return _best(kind, lambda: [x.add_(1.0) for _ in range(100)]) / 100


def _best(kind: str, call: Callable[[], object]) -> float:
    """The least of several: what disturbs a measurement only ever adds to it."""
    wait: Callable[[], None] = torch.cuda.synchronize if kind == "cuda" else _nothing
    call()
    times = []
    for _ in range(TIMES):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def _nothing() -> None:
    """There is nothing to wait for."""


__all__ = ["measure_device"]
