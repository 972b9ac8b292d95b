"""`mpcompile watch`: a running training in the terminal, from the file that `step.log_to("run.jsonl")` writes."""

from __future__ import annotations

import json as jsonlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcompile.errors import UsageError
from mpcompile.tools import options, target

if TYPE_CHECKING:
    from rich.console import Group

BARS = "▁▂▃▄▅▆▇█"
# How many points a curve shows, and how many overflows are listed.
POINTS, OVERFLOWS = 60, 3


@dataclass
class Run:
    """What a log holds: name -> [(update, value)], and the overflows as (update, text)."""

    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    overflows: list[tuple[int, str]] = field(default_factory=list)

    def take(self, lines: Iterable[str], path: str) -> None:
        """Take in more lines.

        Raises:
          UsageError: MP814.
        """
        for line in lines:
            try:
                one = jsonlib.loads(line)
                tag, step = str(one["tag"]).removeprefix("mpcompile/"), int(one["step"])
                if "text" in one:
                    self.overflows.append((step, str(one["text"])))
                else:
                    self.curves.setdefault(tag, []).append((step, float(one["value"])))
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError("MP814", f"{path} is no log of a step", why=f"{type(error).__name__}: {error}",
                                 try_='step.log_to("run.jsonl") writes one') from error  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        now = {name: points[-1][1] for name, points in self.curves.items()}
        last = {name: value if math.isfinite(value) else str(value) for name, value in now.items()}
        return {
            "updates": self.updates(),
            "skipped": int(sum(value for _, value in self.curves.get("skipped", ()))),
            "last": last,
            "overflows": [{"step": step, "text": text} for step, text in self.overflows],
        }

    def updates(self) -> int:
        return max((points[-1][0] for points in self.curves.values()), default=0)


def watch(
    log: Annotated[str, typer.Argument(metavar="LOG", help="The file of step.log_to(FILE).", show_default=False)],
    follow: Annotated[bool, typer.Option("--follow/--once", help="Go on until Ctrl+C (on a terminal).")] = True,
    seconds: Annotated[float, typer.Option(help="How often to look again.")] = 1.0,
    json: options.Json = False,
) -> None:
    """Show a running training: loss, loss scale, gradient norm, skipped updates, what overflowed."""
    path = Path(target.existing(log))
    run = Run()
    with path.open(encoding="utf-8") as file:
        rest = _more(run, file, "", log)
        if json:
            options.print_json(run.to_dict())
            return
        from rich.console import Console

        console = Console(highlight=False, emoji=False, markup=False)
        if not (follow and console.is_terminal):
            console.print(view(run), end="")
            return
        _follow(run, file, rest, log, seconds)


def _follow(run: Run, file: Any, rest: str, log: str, seconds: float) -> None:
    from rich.live import Live

    with Live(view(run), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(seconds)
                rest = _more(run, file, rest, log)
                live.update(view(run), refresh=True)
        except KeyboardInterrupt:
            return


def _more(run: Run, file: Any, rest: str, log: str) -> str:
    """Take in the whole lines that there are now; what is left of one that is still written."""
    try:
        text = rest + file.read()
    except UnicodeDecodeError as error:
        raise UsageError("MP814", f"{log} is no log of a step", why=str(error),
                         try_='step.log_to("run.jsonl") writes one') from error  # fmt: skip
    whole, newline, rest = text.rpartition("\n")
    run.take(filter(None, whole.split("\n")) if newline else (), log)
    return rest


def view(run: Run) -> Group:
    """One row per curve, and the last overflows."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from mpcompile.errors import printable

    skipped = int(sum(value for _, value in run.curves.get("skipped", ())))
    title = Text(f"update {run.updates():,}, {skipped:,} skipped", "bold red" if skipped else "bold")
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, points in run.curves.items():
        values = [value for _, value in points[-POINTS:]]
        table.add_row(Text(printable(name)), Text(f"{values[-1]:.6g}"), Text(curve(values)))
    lines = [Text(printable(f"update {step}: {text}"), "red") for step, text in run.overflows[-OVERFLOWS:]]
    return Group(title, table, *lines)


def curve(values: list[float]) -> str:
    """Bars for the values, of their own range; a gap for what is not finite.

    >>> curve([0.0, 1.0, float("nan"), 2.0])
    '▁▄ █'
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    width = (high - low) or 1.0
    return "".join(
        BARS[int((value - low) / width * (len(BARS) - 1) + 0.5)] if math.isfinite(value) else " " for value in values
    )
