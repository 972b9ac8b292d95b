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
OPTIONAL = {"onnx": "onnx", "onnxscript": "onnx", "onnx-ir": "onnx", "onnxruntime": "onnxruntime", "matplotlib": "demo"}


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


def _named(extra: str) -> str:
    return "onnxruntime (or onnxruntime-gpu)" if extra == "onnxruntime" else f"'mpcompile[{extra}]'"


def _packages() -> list[Check]:
    checks = [Check("python", True, platform.python_version())]
    for name in CORE:
        version = _version(name)
        checks.append(Check(name, bool(version), version or f"missing: pip install {name}"))
    for name, extra in OPTIONAL.items():
        version = _version(name) or (name == "onnxruntime" and _version("onnxruntime-gpu")) or ""
        checks.append(
            Check(name, bool(version), version or f"not installed: pip install {_named(extra)}", needed=False)
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
        _auto("cpu"),
        Check("dynamo backend", "mpcompile" in torch.compiler.list_backends(), "torch.compile(backend='mpcompile')"),
    ]
    return [*checks, _private(), *_products(torch, "cpu"), *_cuda(torch, has_native_bf16), _providers()]


def _auto(kind: str) -> Check:
    """Which policy "auto" is on a device here, and why."""
    from mpcompile.devices import own_path, own_rows
    from mpcompile.hardware import auto_low

    low = auto_low(kind)
    if kind in own_rows():
        why = f"the row [{kind}] of {own_path()} says that it is faster"
    elif low == "fp32":
        why = "neither native BF16 nor FP16 tensor cores; mpcompile doctor --measure may find otherwise"
    else:
        why = f"native {low.upper()}, by the processor's own account"
    return Check(f"policy 'auto' on {kind}", low != "fp32", f"{low}: {why}", False)


def _private() -> Check:
    """The private names of torch that are used, and which of them this torch lacks."""
    from mpcompile.torch_internals.names import missing, names

    lacking = [one.path for one in missing()]
    found = f"all {len(names())} that are used are there" if not lacking else f"missing: {', '.join(lacking)}"
    return Check("private parts of torch", not lacking, found)


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


def _products(torch: Any, device: str) -> list[Check]:
    """How fast a matrix product is in each low type, measured, beside the row that plans are priced by."""
    from mpcompile import Policy
    from mpcompile.devices import device as row_of
    from mpcompile.hardware import row_name

    types = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    rate = {low: _rate_of_product(torch, device, dtype) for low, dtype in types.items()}
    row = row_of(row_name(Policy(), device))
    bf16, fp16 = (rate[low] / rate["fp32"] for low in ("bf16", "fp16"))
    pays = max(bf16, fp16) > 1.0
    found = f"BF16 {bf16:.2g} times as fast as FP32, FP16 {fp16:.2g} times (1024 x 1024, the slow smaller)"
    rates = "; ".join(
        f"{low.upper()} {one:.3g} here, {getattr(row, low):.3g} in the table" for low, one in rate.items()
    )
    checks = [
        Check(
            f"products on {device}", pays, found if pays else f"{found}: low types save memory here, not time", False
        ),
        Check(
            f"FLOP/s on {device}",
            True,
            f"{rates} (row {row.name!r}; doctor --measure writes one of this machine's)",
            False,
        ),
    ]
    if device == "cpu" and fp16 < 1.0:
        why = f"its products take {1 / fp16:.3g} times as long as FP32's: on this processor FP16 is for tests only"
        checks.append(Check("FP16 on cpu", False, why, False))
    return checks


# A product is measured at the size at which it takes at most so many seconds, by what a small one took.
SLOW, SMALL, LARGE = 0.05, 128, 1024


def _rate_of_product(torch: Any, device: str, dtype: str) -> float:
    """FLOP/s of square products, the best of five."""
    taken, size = _seconds_of_product(torch, device, dtype, SMALL), LARGE
    while size > SMALL and taken * (size / SMALL) ** 3 > SLOW:
        size //= 2
    return 2.0 * size**3 / _seconds_of_product(torch, device, dtype, size)


def _seconds_of_product(torch: Any, device: str, dtype: str, size: int) -> float:
    a = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(6):  # the first warms up
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
    return [Check("cuda", True, found), _auto("cuda"), *_products(torch, "cuda")]


def _providers() -> Check:
    """Which execution providers start, by a session of a model of one node: being listed is not enough."""
    try:
        runtime = importlib.import_module("onnxruntime")
        session = importlib.import_module("mpcompile.onnx.run.session")
        helper = importlib.import_module("onnx.helper")
    except ImportError:
        return Check("onnxruntime providers", False, "not installed", needed=False)
    ports = [helper.make_tensor_value_info(name, 1, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    starts, fails = list[str](), list[str]()
    for name in runtime.get_available_providers():
        try:
            held = session.session(model, [name])
            (starts if name in held.get_providers() else fails).append(name)
        except Exception as error:  # ONNX Runtime has a class for each of its codes, and no base of them
            fails.append(f"{name} ({' '.join(str(error).split())[:80]})")
    found = f"start: {', '.join(starts) or 'none'}" + (f"; do not start: {', '.join(fails)}" if fails else "")
    return Check("onnxruntime providers", bool(starts), found, needed=False)
