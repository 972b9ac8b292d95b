"""Nothing is written that does not load: the full checker, strict shape inference, and an ONNX Runtime session.

A model that failed a check before the conversion (custom operators, say) cannot be held to it afterwards: then the
check is left out, and a line says so.  Files appear whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime

from mpcompile.errors import OnnxError
from mpcompile.onnx.run.session import on_disk, session
from mpcompile.places import unwritable

# Protobuf holds 2 GB; above this many bytes of weights they go to a data file.
EXTERNAL_FROM = 1_800_000_000


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for g in (model.graph, *model.graph.subgraphs())
               for v in g.initializers.values() if v.const_value is not None)  # fmt: skip


def check(model: Any, original: Callable[[], Any], loads: Any = None, options: Any = None) -> list[str]:
    """Check `model`: a `ModelProto`, or for large weights a path, or an `onnx_ir.Model` that goes to a file first.

    Args:
      original: gives the model before the conversion; asked only when a check fails.
      loads: what is loaded in place of `model`, where no provider here has its kernels (a simulation of it).
      options: session options, for custom operators.

    Returns:
      Lines for the user: checks that the original fails too.

    Raises:
      OnnxError: MP602, MP603.
    """
    if isinstance(model, ir.Model):
        with on_disk(model) as path:
            return check(path, original, loads, options)
    if options is None and not isinstance(model, onnx.ModelProto):
        options = _frugal()
    notes = []
    if error := _fails(lambda: _full_check(model)):
        if not (before := _fails(lambda: _full_check(original()))):
            raise OnnxError(
                "MP602", "the converted model fails onnx.checker", why=_first_lines(error), try_="report it"
            )
        notes.append(f"not checked by onnx.checker, which refuses the original too: {_first_lines(before, 1)}")
    target = model if loads is None else loads
    if error := _fails(lambda: session(target, options=options)):
        if not (before := _fails(lambda: session(original(), options=options))):
            raise OnnxError("MP603", "ONNX Runtime does not load the converted model", why=_first_lines(error),
                            try_="keep_fp32=[…] with the node or operator named above")  # fmt: skip
        refusal = _first_lines(before, 1)
        notes.append(f"not loaded in ONNX Runtime, which does not load the original either: {refusal}")
    return notes


def check_types(model: onnx.ModelProto) -> None:
    """Hold the real model, not its simulation, to what every operator's schema takes.

    Raises:
      OnnxError: MP602.
    """
    if error := _fails(lambda: _full_check(model)):
        raise OnnxError("MP602", "the model fails onnx.checker", why=_first_lines(error), try_="report it")


def _frugal() -> Any:
    """Options for large weights: the optimizer would fold the CPU provider's casts, into an FP32 copy of them all."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _full_check(model: Any) -> None:
    if isinstance(model, ir.Model):
        with on_disk(model) as path:
            return _full_check(path)
    onnx.checker.check_model(model if isinstance(model, onnx.ModelProto) else os.fspath(model), full_check=True)


def _fails(act: Callable[[], Any]) -> str:
    """The message of what `act` raises; "" when all is well."""
    try:
        act()
    except Exception as error:  # checker and runtime raise classes of their own that share no base
        return f"{type(error).__name__}: {error}"
    return ""


def _first_lines(text: str, count: int = 3) -> str:
    return " ".join(line.strip() for line in text.splitlines()[:count] if line.strip())[:400]


def save_atomic(path: str | os.PathLike[str], fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a fresh folder beside `path`, then move what it made into place: the model file last.

    Args:
      fill: writes the model under the name of `path`, and data files beside it, into the folder that it is given.

    Raises:
      OnnxError: MP610.
    """
    target = Path(path)
    if why := unwritable(target):
        raise OnnxError("MP610", "the model cannot be written", where=str(target), why=why)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fill(folder)
        made = sorted(folder.iterdir(), key=lambda file: file.name == target.name)
        for file in made:
            os.replace(file, target.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
