"""`mpcompile export`: a PyTorch model in, its mixed-precision forward out as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpcompile.errors import UsageError
from mpcompile.tools import options, target


def export(
    model: options.Target,
    out: Annotated[Path, typer.Argument(help="The .onnx file to write.", show_default=False)],
    policy: options.Policy = "auto",
    keep_fp32: options.KeepFp32 = None,
    low: options.Low = None,
    json: options.Json = False,
) -> None:
    """Write a PyTorch model's mixed-precision forward as ONNX."""
    if target.is_onnx(model):
        raise UsageError("MP802", f"{model} is ONNX already", try_=f"mpcompile convert {model} {out}")
    options.place(out)
    target.usable(model, policy)
    from mpcompile import mpcompile

    made = target.load(model)
    mp = mpcompile(made.model, policy, keep_fp32=tuple(keep_fp32 or ()), low=tuple(low or ()))
    mp.export_onnx(out, *made.args, **made.kwargs)
    size = out.stat().st_size
    options.print_json({"written": str(out), "bytes": size}) if json else options.say(
        f"written: {out} ({size:,} bytes)"
    )
