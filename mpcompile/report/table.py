"""The report as a table, folded by module: blocks that repeat (the layers of a stack) are shown once."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mpcompile.errors import printable
from mpcompile.formats import FORMATS

if TYPE_CHECKING:
    from mpcompile.report.model import NodeRow, Report

COLOURS = {**{one.name: one.colour for one in FORMATS}, "keep": "dim"}
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_DIGITS = re.compile(r"\d[\d,]*")
WIDTH = 160
COLUMNS = ("node", "op", "was → now", "verdict", "why", "where")
# The widest that each column gets; "why" takes what is left.
_MOST = (32, 28, 11, 23, 0, 30)
# So many rows of integers and bools in one module become one line.
_FOLDED = 4


@dataclass
class Section:
    """The nodes of one module, and the paths of all modules whose nodes were decided alike."""

    modules: list[str]
    rows: list[NodeRow]

    @property
    def title(self) -> str:
        """ "h.{0-11}.mlp" for the twelve modules h.0.mlp to h.11.mlp."""
        phase = "" if self.rows[0].phase == "forward" else f"{self.rows[0].phase}: "
        return phase + self._modules()

    def _modules(self) -> str:
        if len(self.modules) == 1:
            return self.modules[0] or "(top)"
        columns = zip(*(_NUMBER.findall(path) for path in self.modules), strict=True)
        ranges = iter([number_range(list(column)) for column in columns])
        return _NUMBER.sub(lambda _: next(ranges), self.modules[0])


def unnumbered(reason: str) -> str:
    """A reason without the numbers of names and sizes, which differ between blocks that are decided alike."""
    return _DIGITS.sub("#", reason)


def number_range(numbers: Sequence[str]) -> str:
    distinct = sorted({int(n) for n in numbers})
    if len(distinct) == 1:
        return str(distinct[0])
    whole = distinct == list(range(distinct[0], distinct[-1] + 1))
    return f"{{{distinct[0]}-{distinct[-1]}}}" if whole else "{" + ",".join(map(str, distinct)) + "}"


def sections(rows: Iterable[NodeRow]) -> list[Section]:
    """The rows by phase and module, in order of first appearance, with equal modules folded into one section."""
    by_module: dict[tuple[str, str], list[NodeRow]] = {}
    for row in rows:
        by_module.setdefault((row.phase, row.module), []).append(row)
    folded: dict[tuple[object, ...], Section] = {}
    for (phase, module), members in by_module.items():
        decided = tuple((r.op, r.was, r.precision, r.verdict, r.decided_by, unnumbered(r.reason)) for r in members)
        key = (phase, _NUMBER.sub("*", module), decided)
        if key in folded:
            folded[key].modules.append(module)
        else:
            folded[key] = Section([module], members)
    return list(folded.values())


def node_table(report: Report) -> Group:
    """Columns node, op, was -> now, verdict, why, where; one block per module."""
    fold = any(row.precision != "keep" for row in report.nodes)
    blocks = [(_heading(section), list(_lines(section, fold))) for section in sections(report.nodes)]
    cells = [line for _, lines in blocks for line in lines]
    widths = [max([len(name), *(len(line[i]) for line in cells)]) for i, name in enumerate(COLUMNS)]
    widths = [min(width, most) for width, most in zip(widths, _MOST, strict=True)]
    parts: list[RenderableType] = [Text(f"{report.source}, {report.device}: {report.policy}", style="italic")]
    parts.append(_grid([[Text(name, style="bold") for name in COLUMNS]], widths))
    for heading, lines in blocks:
        parts += [_text(heading, style="bold"), _grid(lines, widths)]
    return Group(*parts, Text(printable(foot(report)), style="dim italic"))


def _grid(lines: Sequence[Sequence[Text]], widths: Sequence[int]) -> Table:
    """Rows in columns of fixed widths, all but "why", which takes what is left."""
    table = Table(show_header=False, box=None, pad_edge=False, expand=True)
    for name, width in zip(COLUMNS, widths, strict=True):
        if name == "why":
            table.add_column(ratio=1, min_width=24)
        else:
            table.add_column(width=width, overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def _lines(section: Section, fold: bool) -> Iterator[list[Text]]:
    """The rows of a section; with `fold`, those of integers and bools, of which nothing is decided, in one line."""
    idle = [row for row in section.rows if row.precision == "keep" and not row.was and row.decided_by == "rule"]
    if len(idle) < _FOLDED or not fold:
        idle = []
    hidden = {row.id for row in idle}
    for row, count in _runs([row for row in section.rows if row.id not in hidden]):
        yield list(_cells(row, count))
    if idle:
        ops = list(dict.fromkeys(_short(row.op) for row in idle))
        shown = ", ".join(ops[:_FOLDED]) + (", …" if len(ops) > _FOLDED else "")
        why = f"integers and bools are never cast: {shown}"
        yield [_text(part) for part in (f"  {len(idle)} nodes", "", "keep", "propagate", why, "")]


def _runs(rows: Sequence[NodeRow]) -> Iterator[tuple[NodeRow, int]]:
    """Rows that follow each other and differ in name and line alone, as one row and their number."""
    for _, run in groupby(rows, lambda r: (r.op, r.was, r.precision, r.verdict, r.decided_by, r.reason)):
        members = list(run)
        yield members[0], len(members)


def _heading(section: Section) -> str:
    counts = Counter(row.precision for row in section.rows)
    parts = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    times = f" ×{len(section.modules)}" if len(section.modules) > 1 else ""
    return f"{section.title}{times}  ({parts})"


def _cells(row: NodeRow, count: int) -> Iterator[Text]:
    now = f"{row.was or '-'} → {row.precision}" if row.precision != "keep" else "keep"
    yield _text(f"  {row.id} ×{count}" if count > 1 else f"  {row.id}")
    yield _text(_short(row.op))
    yield Text(now, COLOURS.get(row.precision, ""))
    yield Text(f"{row.verdict} ({row.decided_by})" if row.decided_by != "rule" else row.verdict)
    yield _text(row.reason)
    yield _text(row.source)


def _text(text: str, style: str = "") -> Text:
    """One line of text of the user's, which no terminal obeys."""
    return Text(printable(text).replace("\n", "\\n"), style)


def _short(op: str) -> str:
    return op.removeprefix("aten.").removesuffix(".default")


def foot(report: Report) -> str:
    """Two lines: the counts, and the estimated cost."""
    summary = report.summary
    precisions = ", ".join(f"{count} {name}" for name, count in summary["precision"].items()) or "none"
    origins = Counter(cast.origin for cast in report.casts)
    casts = ", ".join(f"{count} {'yours' if name == 'existing' else name}" for name, count in origins.items())
    unknown = f"; no rule for {', '.join(summary['unknown_ops'])}" if summary["unknown_ops"] else ""
    cost = summary["cost"]
    line = f"{sum(summary['nodes'].values())} nodes: {precisions}; {summary['casts']} casts"
    line += f" ({casts})" if casts else ""
    what = "forward" if all(row.phase == "forward" for row in report.nodes) else "step"
    return f"{line}{unknown}\nestimated {what}: FP32 {_seconds(cost['fp32'])}, " \
           f"autocast {_seconds(cost['autocast'])}, this plan {_seconds(cost['plan'])}"  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def as_text(report: Report, width: int = WIDTH) -> str:
    """The table as plain text (no colours, no escape codes)."""
    out = io.StringIO()
    Console(
        file=out, width=width, highlight=False, force_terminal=False, color_system=None, emoji=False, markup=False
    ).print(node_table(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
