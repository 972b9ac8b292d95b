"""A comparison as a page, and as a notebook's cell: worst first, by module and by value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from mpcompile.report.comparison_table import headline, number
from mpcompile.report.html import PlainTable, cell, plain_page

if TYPE_CHECKING:
    from mpcompile.report.comparison import Comparison, ErrorRow

# Modules in the card beside the headline; rows in a notebook's cell.
_MODULES, _ROWS = 6, 20
_PARTS = {"parameters": "gradient of a parameter", "gradients": "gradient", "values": "value"}


def comparison_page(found: Comparison) -> str:
    """The whole page: the headline, the worst modules, and every value and gradient."""
    facts = [("policy", found.policy), ("device", found.device), ("batches", str(found.batches))]
    cards: list[dict[str, Any]] = [_said(found), _modules(found)]
    rows = list(_rows(found))
    columns = _columns(autocast=found.autocast is not None)
    return plain_page("comparison", facts, cards, PlainTable("values and gradients", columns, rows, "part"))


def comparison_cell(found: Comparison) -> str:
    """The headline, the worst modules and the worst rows."""
    head = ["", "what", "type", "own", "error", "headroom, bits"]
    rows = [[row["id"], row["part"], row["dtype"], _word(row["own"]), _word(row["error"]), _bits(row["headroom"])]
            for row in islice(_rows(found), _ROWS)]  # fmt: skip
    worst = {"caption": "Worst first", "head": head, "rows": rows}
    return cell(f"{found.policy} beside FP32 on {found.device}", [_said(found), _modules(found), worst])


def _said(found: Comparison) -> dict[str, Any]:
    big, *lines = [line for line, _ in headline(found)[1:]] or ["Nothing was compared"]
    return {"big": big, "lines": [*lines, *(f"note: {note}" for note in found.notes)]}


def _modules(found: Comparison) -> dict[str, Any]:
    rows = [[one.module or "(top)", number(one.own), number(one.error), one.worst]
            for one in found.by_module()[:_MODULES]]  # fmt: skip
    return {
        "caption": "Modules, the largest error of its own first",
        "head": ["", "own", "error", "worst"],
        "rows": rows,
    }


def _columns(autocast: bool) -> list[dict[str, Any]]:
    beside = [{"title": "autocast", "field": "autocast", "kind": "error", "width": 104}] if autocast else []
    return [
        {"title": "value", "field": "id", "kind": "code", "width": 250, "wide": True, "phone": True},
        {"title": "what", "field": "part", "kind": "word", "width": 160},
        {"title": "type", "field": "dtype", "kind": "chip", "width": 76, "phone": True},
        {"title": "own", "field": "own", "kind": "error", "width": 86, "phone": True},
        {"title": "error", "field": "error", "kind": "error", "width": 86},
        {"title": "inherited", "field": "inherited", "kind": "error", "width": 106},
        *beside,
        {"title": "overflow", "field": "overflow", "kind": "count", "width": 104},
        {"title": "to zero", "field": "underflow", "kind": "count", "width": 92},
        {"title": "headroom", "field": "headroom", "kind": "number", "width": 112},
        {"title": "op", "field": "op", "kind": "code", "width": 150},
        {"title": "module", "field": "module", "kind": "idle", "width": 150},
        {"title": "where", "field": "source", "kind": "idle", "width": 105},
    ]


def _rows(found: Comparison) -> Iterator[dict[str, Any]]:
    """All rows worst first, with what autocast is off by at the same value."""
    part = {id(row): name for attribute, name in _PARTS.items() for row in getattr(found, attribute)}
    beside = (
        {name: {row.id: row.error for row in getattr(found.autocast, name)} for name in _PARTS}
        if found.autocast
        else {}
    )
    where = {name: attribute for attribute, name in _PARTS.items()}
    for row in found.worst_first(*_PARTS):
        name = part[id(row)]
        autocast = beside.get(where[name], {}).get(row.id, math.nan)
        yield {**_plain(row), "part": f"{name}, noise" if row.noise else name, "autocast": _finite(autocast)}


def _plain(row: ErrorRow) -> dict[str, Any]:
    return {name: _finite(value) for name, value in row.to_dict().items()}


def _finite(value: Any) -> Any:
    """What JSON cannot hold as a word: "inf" and "-inf" as they are, "" for what is not there."""
    if isinstance(value, float) and not math.isfinite(value):
        return "" if math.isnan(value) else str(value)
    return value


def _word(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


def _bits(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else str(value)
