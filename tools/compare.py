"""`mpcompile compare`: what the plan's numbers are off by, value by value and gradient by gradient."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcompile.errors import UsageError
from mpcompile.tools import options, target

if TYPE_CHECKING:
    from mpcompile.report.comparison import Comparison


def compare(
    model: options.Target,
    policy: options.Policy = "auto",
    keep_fp32: options.KeepFp32 = None,
    low: options.Low = None,
    fp8: options.Fp8 = None,
    ranges: options.Ranges = None,
    batches: Annotated[int, typer.Option(help="How many batches: the factory is called for each.")] = 1,
    autocast: Annotated[
        bool, typer.Option("--autocast/--no-autocast", help="Beside it, torch.autocast's decisions on the same batch.")
    ] = True,
    gradients: Annotated[bool, typer.Option("--gradients/--values", help="Gradients too, or values alone.")] = True,
    scale: Annotated[float | None, typer.Option(help="The loss scale; by default 65536 for FP16.")] = None,
    rows: Annotated[int, typer.Option(help="How many values and gradients to show.")] = 20,
    limit: Annotated[
        float | None, typer.Option("--max-error", help="Exit code 1 when the loss or a gradient is off by more.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="ONNX: sample inputs (.npz); by default generated ones.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the comparison as one offline page.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Compare a plan's values and gradients with FP32's on the same batch, worst first."""
    if batches < 1:
        raise UsageError("MP811", f"--batches {batches}", try_="--batches 1")
    options.place(html)
    target.usable(model, policy, ranges)
    overrides = {"keep_fp32": tuple(keep_fp32 or ()), "low": tuple(low or ())}
    if target.is_onnx(model):
        given = {"fp8": bool(fp8), "batches": batches > 1, "values": not gradients}
        target.refuse_options(model, {**given, "scale": scale is not None})
        found = _onnx(model, "fp16" if policy == "auto" else policy, {**overrides, "ranges": ranges}, samples, autocast)
    else:
        target.refuse_options(model, {"samples": samples is not None})
        chosen = {"gradients": gradients, "autocast": autocast, "scale": scale}
        found = _torch(model, policy, {**overrides, "fp8": tuple(fp8 or ()), "ranges": ranges}, batches, chosen)
    if html:
        found.to_html(html)
    options.print_json(found.to_dict()) if json else _show(found, rows)
    if html and not json:
        options.say(f"written: {html}")
    if limit is not None and not (found.finite and found.worst_output_error() <= limit):
        raise typer.Exit(1)


def _torch(model: str, policy: str, overrides: dict[str, Any], batches: int, chosen: dict[str, Any]) -> Comparison:
    from mpcompile import mpcompile

    made = target.load(model)
    wrapped = mpcompile(made.model, policy, **overrides)
    found: Comparison = wrapped.compare(*made.args, **made.kwargs, **chosen)
    for other in target.more_batches(model, made, batches):
        found = found.joined(wrapped.compare(*other.args, **other.kwargs, **chosen))
    return found


def _onnx(model: str, policy: str, overrides: dict[str, Any], samples: Path | None, autocast: bool) -> Comparison:
    from mpcompile import mpcompile

    made = mpcompile(target.existing(model), policy, **overrides)
    found: Comparison = made.compare_nodes(samples, autocast=autocast)
    return found


def _show(found: Comparison, rows: int) -> None:
    from rich.console import Console

    from mpcompile.report.comparison_table import as_text, comparison_table

    console = Console(highlight=False, emoji=False, markup=False)
    if console.is_terminal:
        console.print(comparison_table(found, rows))
    else:
        typer.echo(as_text(found, rows=rows), nl=False)
