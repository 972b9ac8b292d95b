"""`mpcompile inspect`: what was decided for each node, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpcompile.errors import printable
from mpcompile.tools import options, target


def inspect(
    model: options.Target,
    policy: options.Policy = "auto",
    keep_fp32: options.KeepFp32 = None,
    low: options.Low = None,
    fp8: options.Fp8 = None,
    ranges: options.Ranges = None,
    only: Annotated[
        str, typer.Option(help="Only nodes of this verdict, precision or decider: fp32, bf16, hazard…")
    ] = "",
    sort: Annotated[str, typer.Option(help="Order by a column, largest first: bytes, flops…")] = "",
    after: Annotated[str, typer.Option(metavar="PASS", help="Print the graph's text after this pass instead.")] = "",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report as one offline page.")
    ] = None,
    dot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the graph for Graphviz.")] = None,
    json: options.Json = False,
) -> None:
    """Show each node's precision, who decided it and why."""
    for path in (html, dot):
        options.place(path)
    study = target.study(model, policy, keep_fp32, low, ranges, fp8)
    if after:
        text = study.text_after(after)
        options.print_json({"pass": after, "text": text}) if json else typer.echo(printable(text), nl=False)
        return
    report = study.report
    if html:
        report.to_html(html)
    if dot:
        dot.write_text(report.to_dot(), encoding="utf-8", errors="backslashreplace")
    report = report.filter(only=only) if only else report
    report = report.sort(sort) if sort else report
    if json:
        options.print_json(report.to_dict())
        return
    _show(report)
    for path in (html, dot):
        if path:
            options.say(f"written: {path}")


def _show(report: object) -> None:
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    if console.is_terminal:
        console.print(report)
    else:
        typer.echo(str(report), nl=False)
