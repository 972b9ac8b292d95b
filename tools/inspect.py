"""`mpcompile inspect`: what was decided for each node, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpcompile.errors import printable
from mpcompile.tools import options, target

if TYPE_CHECKING:
    from mpcompile.report.model import Report


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
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Also the seconds that each pass took.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report as one offline page.")
    ] = None,
    dot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the graph for Graphviz.")] = None,
    json: options.Json = False,
) -> None:
    """Show each node's precision, who decided it and why."""
    for path in (html, dot):
        options.place(path)
    target.exists(model)
    _check_words(only, sort)
    from mpcompile.report.headline_text import headline_lines

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
    opening = [] if json else headline_lines(report)
    report = report.filter(only=only) if only else report
    report = report.sort(sort) if sort else report
    if json:
        options.print_json(report.to_dict())
        return
    _print(report, opening, only, time_passes)
    for path in (html, dot):
        if path:
            options.say(f"written: {path}")


def _print(report: Report, opening: list[str], only: str, time_passes: bool) -> None:
    for line in opening:
        options.say(line)
    if not report.nodes:
        options.say(f"none of the nodes is {only!r}" if only else "the graph has no nodes")
    else:
        _show(report)
    for one in report.steps if time_passes else ():
        options.say(f"{one.name}: {one.seconds * 1e3:.1f} ms{'' if one.modified else ', changed nothing'}")


def _check_words(only: str, sort: str) -> None:
    """Refuse words that no report knows, before anything slow is imported.

    Raises:
      UsageError: MP801.
    """
    from mpcompile.report.model import Report

    nothing = Report("", "", "", (), (), {})
    if only:
        nothing.filter(only=only)
    if sort:
        nothing.sort(sort)


def _show(report: object) -> None:
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    if console.is_terminal:
        console.print(report)
    else:
        typer.echo(str(report), nl=False)
