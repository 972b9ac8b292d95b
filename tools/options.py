"""Arguments and options that several verbs share, and how they print."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcompile.errors import UsageError, printable
from mpcompile.places import unwritable


def completed(words: Sequence[str], *, several: bool = False) -> Callable[[str], list[str]]:
    """What a shell offers for an option of these words; `several` with commas between them."""

    def offered(incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(",") if several else ("", "", incomplete)
        given = before.split(",")
        return [f"{before}{comma}{word}" for word in words if word.startswith(begun) and word not in given]

    return offered


POLICIES = ("auto", "bf16", "fp16", "fp8", "fp32")

Target = Annotated[
    str, typer.Argument(help="FILE.py:FACTORY, PACKAGE.MODULE:FACTORY or MODEL.onnx", show_default=False)
]
Policy = Annotated[
    str,
    typer.Option(
        "--policy",
        "--precision",
        "-p",
        help=f"{', '.join(POLICIES)}, or fields: low=fp16,output=low",
        autocompletion=completed(POLICIES),
    ),
]
KeepFp32 = Annotated[
    list[str] | None, typer.Option("--keep-fp32", help="Glob on module path, op or node to keep FP32.")
]
Low = Annotated[list[str] | None, typer.Option("--low", help="Glob on module path, op or node to run in the low type.")]
Ranges = Annotated[
    Path | None, typer.Option("--ranges", metavar="FILE", help="What `mpcompile calibrate` measured, for FP16.")
]
Fp8 = Annotated[
    list[str] | None, typer.Option("--fp8", help="Glob on module path, op or node: linear layers that read FP8.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


# What JSON writes as it is and a terminal obeys.
_OBEYED = re.compile(r"[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def print_json(data: Any) -> None:
    """Print `data` as indented JSON on standard output."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    typer.echo(_OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def say(text: str, *, err: bool = False) -> None:
    """Print text, in which names of the user's models may stand: no terminal obeys them."""
    typer.echo(printable(text), err=err)


def place(path: Path | None) -> Path | None:
    """`path`, where a file is to be written later.

    Raises:
      UsageError: MP808.
    """
    if path is not None and (why := unwritable(path)):
        raise UsageError("MP808", "nothing can be written there", where=str(path), why=why)
    return path
