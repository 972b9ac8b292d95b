"""The verbs put together. Nothing here imports torch: each verb imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mpcompile import __version__
from mpcompile.errors import MPCompileError
from mpcompile.tools import bench, convert, demo, diff, doctor, explain, export, inspect

# What was asked about is not so: the input is good, and an output is off by more than --max-error.
FAILED_CHECKS = ("MP605",)


class Verbs(TyperGroup):
    """Turns the project's errors into one message, and exit code 2; 1 where a check that was asked for failed."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MPCompileError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1 if error.code in FAILED_CHECKS else 2) from error


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: drawing it with rich takes longer than everything else together
    pretty_exceptions_enable=False,
    help="Mixed-precision training as a compiler pass. A model is FILE.py:FACTORY, PACKAGE.MODULE:FACTORY or "
    "MODEL.onnx; a factory returns (model, args) or (model, args, kwargs).",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mpcompile {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


for verb in (
    demo.demo,
    inspect.inspect,
    explain.explain,
    diff.diff,
    convert.convert,
    export.export,
    bench.bench,
    doctor.doctor,
):
    app.command(verb.__name__)(verb)


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 what was asked about is not so, 2 bad usage or bad input."""
    app()
