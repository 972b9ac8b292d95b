"""What two reports decide differently, as data and as a page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What makes two decisions different; names, bytes and lines may move without one.
_DECIDED = ("op", "verdict", "precision", "decided_by", "reason")
_NOTHING = dict.fromkeys((*_DECIDED, "module", "source"), "")


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Nodes that only one report has, nodes decided differently, and both counts of casts.

    Args:
      a, b: reports as `Report.to_dict` gives them.
    """
    left, right = ({node["id"]: node for node in report["nodes"]} for report in (a, b))
    changed = [
        {"id": name, "a": _decision(left[name]), "b": _decision(right[name])}
        for name in left
        if name in right and _decision(left[name]) != _decision(right[name])
    ]
    return {
        "changed": changed,
        "only_a": [name for name in left if name not in right],
        "only_b": [name for name in right if name not in left],
        "casts": [a["summary"]["casts"], b["summary"]["casts"]],
        "policy": [a["policy"], b["policy"]],
    }


def _decision(node: dict[str, Any]) -> dict[str, str]:
    return {key: node[key] for key in _DECIDED}


def write_difference(a: dict[str, Any], b: dict[str, Any], path: str | os.PathLike[str],
                     names: tuple[str, str] = ("a", "b")) -> None:  # fmt: skip
    """Write the difference of two reports as one page that needs no network; `names` are what they are called."""
    Path(path).write_text(difference_page(a, b, names), encoding="utf-8", errors="backslashreplace")


def difference_page(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str] = ("a", "b")) -> str:
    """The page: both policies, counts and estimates side by side, and the nodes that differ."""
    from mpcompile.report.html import PlainTable, plain_page

    found = difference(a, b)
    rows = list(_rows(a, b, found))
    count = len(rows)
    whole = max(len(a["nodes"]), len(b["nodes"]))
    big = f"{count:,} node{'s' if count != 1 else ''} of {whole:,} differ" if count else "The plans are the same"
    numbers = f"{len(found['changed'])} decided differently, {len(found['only_a'])} only in a, {len(found['only_b'])} only in b"
    head, sides = _sides(a, b)
    cards: list[dict[str, Any]] = [
        {"big": big, "lines": [numbers] if count else []},
        {"caption": "Side by side", "head": head, "rows": sides},
    ]
    facts = [(f"{side}", f"{name} · {report['policy']} · {report['device']}")
             for side, name, report in (("a", names[0], a), ("b", names[1], b))]  # fmt: skip
    return plain_page("difference", facts, cards, PlainTable("nodes that differ", _columns(), rows, "how"))


def _columns() -> list[dict[str, Any]]:
    return [
        {"title": "node", "field": "id", "kind": "code", "width": 170, "phone": True},
        {"title": "op", "field": "op", "kind": "code", "width": 140},
        {"title": "a", "field": "precision_a", "kind": "chip", "width": 78, "phone": True},
        {"title": "b", "field": "precision_b", "kind": "chip", "width": 78, "phone": True},
        {"title": "why in a", "field": "why_a", "kind": "word", "width": 220, "wide": True},
        {"title": "why in b", "field": "why_b", "kind": "word", "width": 220, "wide": True},
        {"title": "module", "field": "module", "kind": "idle", "width": 150},
        {"title": "where", "field": "source", "kind": "idle", "width": 105},
    ]


def _rows(a: dict[str, Any], b: dict[str, Any], found: dict[str, Any]) -> Iterator[dict[str, str]]:
    left, right = ({node["id"]: node for node in report["nodes"]} for report in (a, b))
    names = [*(one["id"] for one in found["changed"]), *found["only_a"], *found["only_b"]]
    for name in names:
        old, new = left.get(name, _NOTHING), right.get(name, _NOTHING)
        known = new if new is not _NOTHING else old
        yield {"id": name, "op": known["op"], "how": _how(old, new), "module": known["module"], "source": known["source"],
               "precision_a": old["precision"], "precision_b": new["precision"],
               "why_a": _why(old), "why_b": _why(new)}  # fmt: skip


def _how(old: dict[str, Any], new: dict[str, Any]) -> str:
    if old is _NOTHING or new is _NOTHING:
        return "only in b" if old is _NOTHING else "only in a"
    return "other precision" if old["precision"] != new["precision"] else "other reason"


def _why(node: dict[str, Any]) -> str:
    return f"{node['verdict']} by {node['decided_by']}: {node['reason']}" if node is not _NOTHING else ""


def _sides(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the small table."""
    precisions = list(dict.fromkeys([*a["summary"]["precision"], *b["summary"]["precision"]]))
    rows = [
        [name, *(f"{side['summary']['precision'].get(one, 0):,}" for one in precisions), f"{side['summary']['casts']:,}",
         _milliseconds(side["summary"]["cost"]["plan"])]
        for name, side in (("a", a), ("b", b))
    ]  # fmt: skip
    return ["", *precisions, "casts", "estimated"], rows


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
