"""`mpcompile convert`: an ONNX model in, the same in mixed precision out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpcompile.errors import UsageError
from mpcompile.tools import options, target

if TYPE_CHECKING:
    from mpcompile.onnx.converted import OnnxMixedPrecision

# Outputs whose errors are printed.
WORST = 5


def convert(
    model: Annotated[str, typer.Argument(metavar="IN", help="The model to read.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    policy: options.Policy = "fp16",
    keep_fp32: options.KeepFp32 = None,
    low: options.Low = None,
    provider: Annotated[
        str, typer.Option(help="Whose kernels it is for: cuda, cpu, tensorrt…, or '' for any.")
    ] = "cuda",
    keep_io: Annotated[
        bool, typer.Option("--keep-io/--low-io", help="Inputs and outputs keep their types, or FP32 ones become low.")
    ] = True,
    simulate: Annotated[
        bool, typer.Option(help="FP32 operators, results rounded: the numbers, on any provider.")
    ] = False,
    annotate: Annotated[bool, typer.Option(help="Write each node's decision into its metadata.")] = True,
    calibrate: Annotated[
        Path | None, typer.Option(help="Sample inputs (.npz): measure ranges, compare the outputs.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Fail when an output is off by more, of its largest element.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Run the result beside the original, on the samples or generated inputs; NaN fails.")
    ] = True,
    ranges: options.Ranges = None,
    no_ranges: Annotated[
        bool, typer.Option("--no-ranges", help="Without samples: no ranges of generated inputs either, for FP16.")
    ] = False,
    auto: Annotated[bool, typer.Option("--auto", help="Find a small set of nodes to keep FP32.")] = False,
    strict: Annotated[bool, typer.Option(help="An operator without a rule is an error.")] = False,
    json: options.Json = False,
) -> None:
    """Convert an ONNX model. Nothing is written unless the result loads."""
    options.place(out)
    if ranges and (no_ranges or calibrate):
        other = "--no-ranges" if no_ranges else "--calibrate"
        raise UsageError("MP800", f"--ranges and {other} exclude each other", try_="leave one out")
    target.existing(model)
    target.readable(model, policy, ranges)
    from mpcompile import mpcompile

    made = mpcompile(
        model,
        policy,
        keep_fp32=tuple(keep_fp32 or ()),
        low=tuple(low or ()),
        strict=strict,
        keep_io=keep_io,
        provider=provider,
        simulate=simulate,
        annotate=annotate,
        calibrate=calibrate,
        ranges=ranges or not no_ranges,
        max_error=max_error,
        auto=auto,
    )
    if check and not made.errors:
        made.verify()
    made.save(out)
    _tell(made, model, out, json)


def _tell(made: OnnxMixedPrecision, model: str, out: Path, json: bool) -> None:
    """Print what was written, and what was found of it."""
    report = made.report()
    if json:
        sizes = {"bytes_in": Path(model).stat().st_size, "bytes_out": out.stat().st_size}
        errors = [asdict(error) for error in made.errors]
        found = {"errors": errors, "kept": made.kept, "notes": made.notes, "summary": report.summary}
        options.print_json({"written": str(out), **sizes, **found})
        return
    from mpcompile.report.table import foot

    options.say(f"written: {out} ({out.stat().st_size:,} bytes; {Path(model).stat().st_size:,} before)")
    options.say(foot(report).splitlines()[0])
    for note in made.notes:
        options.say(f"note: {note}")
    for error in made.errors[:WORST]:
        options.say(f"output {error}")
    if made.kept:
        options.say(f"kept FP32: {', '.join(made.kept)}")
