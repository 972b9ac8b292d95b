"""The report as one HTML page: no network, no build, everything in the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader

from mpcompile.text import print_graph

if TYPE_CHECKING:
    from mpcompile.report.model import NodeRow, Report


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page to `path`."""
    Path(path).write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The whole page."""
    return _render("page.html.jinja", report)


def fragment(report: Report) -> str:
    """The counts and the table, for a notebook."""
    return _render("fragment.html.jinja", report)


def _render(template: str, report: Report) -> str:
    loader = PackageLoader("mpcompile.report", ".")
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    facts = {
        "report": report,
        "tree": _tree(report.nodes),
        "longest": max((step.seconds for step in report.steps), default=0.0) or 1.0,
        "seconds": sum(step.seconds for step in report.steps),
        "text": print_graph(report.graph, detail="short"),
    }
    return str(pages.get_template(template).render(facts))


def _tree(rows: tuple[NodeRow, ...]) -> dict[str, Any]:
    """Modules as nested dicts: {"count": {precision: nodes}, "children": {name: …}, "path": …}."""
    root: dict[str, Any] = {"count": {}, "children": {}, "path": ""}
    for row in rows:
        at = root
        _count(at, row)
        for name in row.module.split(".") if row.module else ():
            path = f"{at['path']}.{name}" if at["path"] else name
            at = at["children"].setdefault(name, {"count": {}, "children": {}, "path": path})
            _count(at, row)
    return root


def _count(branch: dict[str, Any], row: NodeRow) -> None:
    branch["count"][row.precision] = branch["count"].get(row.precision, 0) + 1
