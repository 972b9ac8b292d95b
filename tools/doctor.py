"""`mpcompile doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import importlib
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcompile.tools import options

CORE = ("torch", "networkx", "scipy", "numpy", "rich", "typer", "jinja2", "safetensors")
OPTIONAL = {"onnx": "onnx", "onnxscript": "onnx", "onnx-ir": "onnx", "onnxruntime": "onnx", "matplotlib": "demo"}


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, is it as it should be, what was found. Failures of `needed` checks exit with 1."""

    name: str
    good: bool
    found: str
    needed: bool = True


Measure = Annotated[
    bool,
    typer.Option("--measure", help="Measure this machine and write its rows, by which plans are priced from then on."),
]
To = Annotated[Path | None, typer.Option("--to", help="With --measure: the device file; your own by default.")]


def doctor(measure: Measure = False, to: To = None, json: options.Json = False) -> None:
    """Check the installation and the devices."""
    checks = [*_packages(), *_machine(), *(_measured(to) if measure else [])]
    healthy = all(check.good for check in checks if check.needed)
    if json:
        options.print_json({"healthy": healthy, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            mark = "ok  " if check.good else ("FAIL" if check.needed else "--  ")
            typer.echo(f"{mark} {check.name}: {check.found}")
    if not healthy:
        raise typer.Exit(1)


def _packages() -> list[Check]:
    checks = [Check("python", True, platform.python_version())]
    for name in CORE:
        version = _version(name)
        checks.append(Check(name, bool(version), version or f"missing: pip install {name}"))
    for name, extra in OPTIONAL.items():
        version = _version(name) or (name == "onnxruntime" and _version("onnxruntime-gpu")) or ""
        checks.append(
            Check(name, bool(version), version or f"not installed: pip install 'mpcompile[{extra}]'", needed=False)
        )
    return checks


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _machine() -> list[Check]:
    if not _version("torch"):
        return []
    import torch

    from mpcompile.hardware import emulated_kinds, has_native_bf16

    new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), "")
    bf16, fp16 = has_native_bf16("cpu"), not emulated_kinds("cpu", "fp16", compiled=True)
    checks = [
        Check("torch version", new, f"{torch.__version__} (2.11 or later is needed)"),
        Check(
            "C++ compiler",
            bool(compiler),
            compiler or "none found: torch.compile on a CPU needs one; use backend='eager'",
            False,
        ),
        Check("cpu", True, f"BF16 {_native(bf16)}; FP16 {_native(fp16)}; {torch.get_num_threads()} threads"),
        Check("policy 'auto' on cpu", bf16, "bf16" if bf16 else "fp32: no native low type", False),
        Check("dynamo backend", "mpcompile" in torch._dynamo.list_backends(), "torch.compile(backend='mpcompile')"),
    ]
    return [*checks, _products(torch, "cpu"), *_cuda(torch, has_native_bf16), _providers()]


def _measured(to: Path | None) -> list[Check]:
    """Measure each device here and write its row."""
    import torch

    from mpcompile.devices import own_path, write_row
    from mpcompile.errors import RuleError
    from mpcompile.runtime.measure_device import measure_device

    path = to or own_path()
    if path is None:
        raise RuleError(
            "MP206", "MPCOMPILE_DEVICES is empty, so there is no device file to write", try_="--to FILE.toml"
        )
    checks = []
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        row = measure_device(kind)
        write_row(path, row)
        found = f"FP32 {row.fp32:.3g}, BF16 {row.bf16:.3g}, FP16 {row.fp16:.3g} FLOP/s, {row.bandwidth:.3g} bytes/s"
        checks.append(Check(f"row [{kind}] of {path}", True, f"{found}: policy 'auto' is {row.faster()}"))
    return checks


def _native(there: bool) -> str:
    return "native" if there else "computed in FP32 and rounded"


def _products(torch: Any, device: str) -> Check:
    """How fast a matrix product is in each low type, measured: "native" alone says nothing of speed."""
    seconds = {dtype: _seconds_of_product(torch, device, dtype) for dtype in ("float32", "bfloat16", "float16")}
    bf16, fp16 = (seconds["float32"] / seconds[dtype] for dtype in ("bfloat16", "float16"))
    pays = max(bf16, fp16) > 1.0
    found = f"BF16 {bf16:.2f} times as fast as FP32, FP16 {fp16:.2f} times (1024 x 1024, best of 5)"
    return Check(
        f"products on {device}", pays, found if pays else f"{found}: low types save memory here, not time", False
    )


def _seconds_of_product(torch: Any, device: str, dtype: str) -> float:
    a = torch.ones(1024, 1024, device=device, dtype=getattr(torch, dtype))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(6):
        wait()
        start = time.perf_counter()
        a @ a
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _cuda(torch: Any, has_native_bf16: Any) -> list[Check]:
    if not torch.cuda.is_available():
        return [Check("cuda", False, "no device", needed=False)]
    major, minor = torch.cuda.get_device_capability()
    found = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, BF16 {_native(has_native_bf16('cuda'))}"
    return [Check("cuda", True, found), _products(torch, "cuda")]


def _providers() -> Check:
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return Check("onnxruntime providers", False, "not installed", needed=False)
    return Check("onnxruntime providers", True, ", ".join(runtime.get_available_providers()))
