"""Arguments and options that several verbs share, and how they print."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Target = Annotated[
    str, typer.Argument(help="FILE.py:FACTORY, PACKAGE.MODULE:FACTORY or MODEL.onnx", show_default=False)
]
Policy = Annotated[
    str, typer.Option("--policy", "--precision", "-p", help="auto, bf16, fp16, fp32, or fields: low=fp16,output=low")
]
KeepFp32 = Annotated[
    list[str] | None, typer.Option("--keep-fp32", help="Glob on module path, op or node to keep FP32.")
]
Low = Annotated[list[str] | None, typer.Option("--low", help="Glob on module path, op or node to run in the low type.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def print_json(data: Any) -> None:
    """Print `data` as indented JSON on standard output."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
