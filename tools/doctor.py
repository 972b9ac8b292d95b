"""`mpcompile doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import importlib
import platform
import shutil
from dataclasses import asdict, dataclass
from typing import Any

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


def doctor(json: options.Json = False) -> None:
    """Check the installation and the devices."""
    checks = [*_packages(), *_machine()]
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

    from mpcompile.runtime.device import emulated_kinds, has_native_bf16

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
    return [*checks, _cuda(torch, has_native_bf16), _providers()]


def _native(there: bool) -> str:
    return "native" if there else "computed in FP32 and rounded"


def _cuda(torch: Any, has_native_bf16: Any) -> Check:
    if not torch.cuda.is_available():
        return Check("cuda", False, "no device", needed=False)
    major, minor = torch.cuda.get_device_capability()
    return Check(
        "cuda", True, f"{torch.cuda.get_device_name()}, sm_{major}{minor}, BF16 {_native(has_native_bf16('cuda'))}"
    )


def _providers() -> Check:
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return Check("onnxruntime providers", False, "not installed", needed=False)
    return Check("onnxruntime providers", True, ", ".join(runtime.get_available_providers()))
