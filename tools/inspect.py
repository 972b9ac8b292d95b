"""`mpcompile inspect`: what was decided for each node, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcompile.errors import UsageError, printable, suggest
from mpcompile.tools import options, target

if TYPE_CHECKING:
    from mpcompile.report.model import Report

# Every pass there is; which of them run depends on the policy and on the kind of graph.
PASSES = ("normalize", "classify", "legalize", "measured-hazards", "hazards", "origins", "strict", "assign", "insert-casts",
          "simplify-casts", "all-fp32", "verify")  # fmt: skip
PHASES = ("forward", "backward", "optimizer")
SORTS = ("bytes", "flops", "cost", "name")
ONLY = ("low", "propagate", "fp16", "bf16", "fp32", "keep", "rule", "override", "hazard", "cost", "unknown", "user-cast",
        "autocast-region")  # fmt: skip


def inspect(
    model: options.Target,
    policy: options.Policy = "auto",
    keep_fp32: options.KeepFp32 = None,
    low: options.Low = None,
    fp8: options.Fp8 = None,
    ranges: options.Ranges = None,
    only: Annotated[
        str,
        typer.Option(
            help=f"Only nodes of this verdict, precision or decider: {', '.join(ONLY)}.",
            autocompletion=options.completed(ONLY),
        ),
    ] = "",
    phase: Annotated[
        str,
        typer.Option(
            help=f"Only nodes of this phase: {', '.join(PHASES)}; the last two run one step of AdamW.",
            autocompletion=options.completed(PHASES),
        ),
    ] = "",
    sort: Annotated[
        str,
        typer.Option(
            help="Order by bytes, flops, cost (estimated time) or another column, largest first; or by name.",
            autocompletion=options.completed(SORTS),
        ),
    ] = "",
    depth: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="One row per module down to N levels, repeated blocks once: `12 x`."),
    ] = None,
    ops: Annotated[bool, typer.Option("--ops", help="Counts and bytes per operation and precision.")] = False,
    casts: Annotated[bool, typer.Option("--casts", help="The casts, with bytes and origin.")] = False,
    hazards: Annotated[bool, typer.Option("--hazards", help="What a hazard keeps FP32, with the numbers.")] = False,
    after: Annotated[
        str,
        typer.Option(
            metavar="PASS",
            help=f"Print the graph's text after this pass instead: {', '.join(PASSES)}.",
            autocompletion=options.completed(PASSES),
        ),
    ] = "",
    print_changed: Annotated[
        bool,
        typer.Option("--print-changed", help="Print what each pass changes in the graph's text instead, as a diff."),
    ] = False,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Also the seconds that each pass took.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report as one offline page.")
    ] = None,
    dot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the graph for Graphviz.")] = None,
    json: options.Json = False,
) -> None:
    """Show each node's precision, who decided it and why; or modules, operations, casts, hazards."""
    for path in (html, dot):
        options.place(path)
    target.usable(model, policy, ranges)
    _check_words(only, sort, phase, after)
    from mpcompile.report.headline_text import headline_lines

    choices = (model, policy, keep_fp32, low, ranges, fp8)
    if after or print_changed:
        _texts(target.study(*choices), after, json)
        return
    whole = phase in ("backward", "optimizer")
    report = target.step_report(*choices) if whole else target.study(*choices).report
    if html:
        report.to_html(html)
    if dot:
        dot.write_text(report.to_dot(), encoding="utf-8", errors="backslashreplace")
    opening = [] if json else headline_lines(report)
    report = report.filter(only or (), lambda row: not phase or row.phase == phase)
    report = report.sort(sort) if sort else report
    views = _views(report, sort, depth, {"ops": ops, "casts": casts, "hazards": hazards})
    if json:
        options.print_json({name: rows for name, rows, _ in views} if views else report.to_dict())
        return
    _print(report, opening, " ".join(filter(None, (only, phase))), views)
    for one in report.steps if time_passes else ():
        options.say(f"{one.name}: {one.seconds * 1e3:.1f} ms{'' if one.modified else ', changed nothing'}")
    for path in (html, dot):
        if path:
            options.say(f"written: {path}")


# (name, rows, the rows as text).
View = tuple[str, list[dict[str, Any]], Callable[[Any], str]]


def _views(report: Report, sort: str, depth: int | None, asked: dict[str, bool]) -> list[View]:
    """What was asked for instead of the table of nodes."""
    from mpcompile.report import views

    found: list[View] = []
    if depth is not None:
        found.append(("modules", views.by_module(report, depth, sort), views.modules_text))
    if asked["ops"]:
        found.append(("ops", views.by_operation(report, sort), views.operations_text))
    if asked["casts"]:
        found.append(("casts", views.casts(report, sort), views.casts_text))
    if asked["hazards"]:
        found.append(("hazards", views.hazards(report, sort), views.hazards_text))
    return found


def _texts(study: target.Study, after: str, json: bool) -> None:
    """The graph's text after a pass, or what each pass changes in it."""
    if after:
        text = study.text_after(after)
        options.print_json({"pass": after, "text": text}) if json else typer.echo(printable(text), nl=False)
        return
    changes = study.changes()
    if json:
        options.print_json({"changed": [{"pass": name, "diff": text} for name, text in changes]})
        return
    for _, text in changes:
        options.say(text)
    quiet = [one.name for one in study.passes if one.name not in dict(changes)]
    options.say(f"changed nothing: {', '.join(quiet) or 'none'}")


def _print(report: Report, opening: list[str], asked: str, views: list[View]) -> None:
    for line in opening:
        options.say(line)
    if not report.nodes:
        options.say(f"none of the nodes is {asked!r}" if asked else "the graph has no nodes")
        return
    for name, rows, text in views:
        options.say(f"{name}:")
        typer.echo(text(rows), nl=False)
    if not views:
        _show(report)


def _check_words(only: str, sort: str, phase: str, after: str) -> None:
    """Refuse words that no report knows, before anything slow is imported.

    Raises:
      UsageError: MP801, MP805.
    """
    from mpcompile.report.model import Report

    nothing = Report("", "", "", (), (), {})
    if only:
        nothing.filter(only=only)
    if sort:
        nothing.sort(sort)
    for word, known, code, what in ((phase, PHASES, "MP801", "phase"), (after, PASSES, "MP805", "pass")):
        if word and word not in known:
            near = suggest(word, known) or ", ".join(known)
            raise UsageError(code, f"there is no {what} {word!r}", try_=near)


def _show(report: object) -> None:
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    if console.is_terminal:
        console.print(report)
    else:
        typer.echo(str(report), nl=False)
