"""A comparison for the terminal: the headline, modules, the worst values and gradients, the parameters."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mpcompile.errors import printable

if TYPE_CHECKING:
    from mpcompile.report.comparison import Comparison, ErrorRow

WIDTH = 160
# How many rows each table shows.
MODULES, ROWS, PARAMETERS = 12, 20, 10
_RIGHT = frozenset({"error", "own", "inherited", "autocast", "under", "over", "bits", "values"})


def comparison_table(found: Comparison, rows: int = ROWS) -> Group:
    """All of it; `rows` values and gradients at most."""
    parts: list[RenderableType] = [Text(printable(line), style) for line, style in headline(found)]
    parts += [Text(), Text("by module, the largest error of its own first", "bold"), _modules(found)]
    mixed = found.worst_first("values", "gradients")
    parts += [Text(), Text(_of("values and gradients (')", len(mixed), rows), "bold"), _rows(found, mixed[:rows])]
    if found.parameters:
        ordered = found.worst_first("parameters")
        title = _of("gradients of parameters", len(ordered), PARAMETERS)
        parts += [Text(), Text(title, "bold"), _rows(found, ordered[:PARAMETERS])]
    return Group(*parts, *(Text(printable(f"note: {note}"), "italic") for note in found.notes))


def headline(found: Comparison) -> list[tuple[str, str]]:
    """Lines and their styles: what was compared, the loss, the worst gradient, what overflowed."""
    batches = "one batch" if found.batches == 1 else f"{found.batches} batches"
    lines = [(f"{found.policy} beside FP32, {batches}, priced for {found.device}", "italic")]
    if found.loss_is and found.loss:
        lines.append((f"loss ({found.loss_is}): {found.loss[0]:.7g}, FP32 {found.loss[1]:.7g}", "bold"))
    if found.parameters:
        own = _worst(found)
        beside = f"; under plan=autocast {_worst(found.autocast)}" if found.autocast else ""
        lines.append((f"gradients of parameters: worst {own}{beside}", "bold"))
    over = sum(row.overflow for row in (*found.values, *found.gradients))
    under = sum(row.underflow for row in (*found.values, *found.gradients))
    said = f"{over:,} elements overflow, {under:,} round to zero"
    scale = f", gradients at a loss scale of {found.scale:g}" if found.scale != 1 else ""
    lines.append((f"{said}{scale}", "bold red" if over else ""))
    return lines


def _worst(found: Comparison) -> str:
    row = found.worst_first("parameters")[0]
    most = max(found.parameters, key=lambda one: (not one.noise, one.error))
    return f"{number((most if not row.overflow else row).error)} at {(most if not row.overflow else row).id}"


def _of(title: str, count: int, shown: int) -> str:
    return f"{title}, worst first" + (f": {shown} of {count:,}" if count > shown else f": {count}")


def _modules(found: Comparison) -> Table:
    table = _table("module", "values", "own", "error", "under", "over", "worst")
    for one in found.by_module()[:MODULES]:
        table.add_row(_text(one.module or "(top)"), str(one.rows), number(one.own), number(one.error),
                      count(one.underflow), count(one.overflow), _text(one.worst))  # fmt: skip
    return table


def _rows(found: Comparison, rows: Sequence[ErrorRow]) -> Table:
    beside = {row.id: row for row in found.autocast.rows} if found.autocast else {}
    names = ["value", "op", "module", "type", "error", "own", "inherited", *(["autocast"] if beside else []),
             "under", "over", "bits", "where"]  # fmt: skip
    table = _table(*names)
    for row in rows:
        other = [number(beside[row.id].error) if row.id in beside else "-"] if beside else []
        table.add_row(
            _text(row.id), _text(_short(row.op)), _text(row.module or "(top)"), row.dtype,
            f"{number(row.error)}{' noise' if row.noise else ''}", number(row.own), number(row.inherited), *other,
            count(row.underflow), count(row.overflow), bits(row.headroom), _text(row.source),
        )  # fmt: skip
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
    return table


def number(value: float) -> str:
    """ "0", "3.5e-04", "inf"."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else "inf"


def count(value: int) -> str:
    return f"{value:,}" if value else "-"


def bits(value: float) -> str:
    """Headroom: "14.4"; "-" for a value of zeros."""
    return f"{value:.1f}" if math.isfinite(value) else "-" if value > 0 else "none"


def _short(op: str) -> str:
    return op.removeprefix("aten.").removeprefix("onnx::").removesuffix(".default")


def _text(text: str) -> Text:
    return Text(printable(text).replace("\n", "\\n"))


def as_text(found: Comparison, width: int = WIDTH, rows: int = ROWS) -> str:
    """The tables as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, force_terminal=False, color_system=None, emoji=False,
                      markup=False)  # fmt: skip
    console.print(comparison_table(found, rows))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
