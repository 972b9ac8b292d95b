"""The verbs put together. Nothing here imports torch: each verb imports what it needs when it runs."""

from __future__ import annotations

import errno
import os
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mpcompile import __version__
from mpcompile.errors import MPCompileError, UsageError
from mpcompile.tools import (
    bench,
    bisect,
    calibrate,
    compare,
    convert,
    demo,
    diff,
    doctor,
    explain,
    export,
    inspect,
    options,
    watch,
)

# What was asked about is not so: the input is good, and an output is off by more than --max-error.
FAILED_CHECKS = ("MP605",)


# The class of the errors that the command line's own parser raises: typer has it, and gives it no name of its own.
BadUsage: Any = typer.BadParameter.__mro__[1]


class Verbs(TyperGroup):
    """Turns every error into one message (one JSON object under --json), and exit code 2; 1 where a check failed."""

    def invoke(self, ctx: Any) -> Any:
        found: MPCompileError
        cause: Exception
        as_json = "--json" in (*getattr(ctx, "_protected_args", ()), *ctx.args)
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except MPCompileError as error:
            found, cause = error, error
        except BadUsage as error:
            if not as_json:
                raise
            found, cause = UsageError("MP800", error.format_message(), try_="--help"), error
        except OSError as error:
            if error.errno == errno.EPIPE:  # who reads has had enough
                raise
            found, cause = UsageError("MP808", f"{type(error).__name__}: {error}"), error
        except Exception as error:
            if os.environ.get("MPCOMPILE_TRACEBACK"):
                raise
            found, cause = _fault(error), error
        code = 1 if found.code in FAILED_CHECKS else 2
        options.print_json({"error": found.to_dict(), "exit": code}) if as_json else options.say(str(found), err=True)
        raise typer.Exit(code) from cause


def _fault(error: Exception) -> UsageError:
    """What no check has foreseen, in one message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return UsageError("MP809", f"{type(error).__name__}: {error}", where=f"{frame.filename}:{frame.lineno}",
                      try_="set MPCOMPILE_TRACEBACK=1 for the whole traceback, and report it")  # fmt: skip


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
    compare.compare,
    bisect.bisect,
    calibrate.calibrate,
    watch.watch,
    diff.diff,
    convert.convert,
    export.export,
    bench.bench,
    doctor.doctor,
):
    app.command(verb.__name__)(verb)


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 what was asked about is not so, 2 bad usage or bad input."""
    os.environ.setdefault("MPCOMPILE_PROGRESS", "0")  # the verbs say themselves what they do
    app()
