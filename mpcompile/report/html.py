"""The report as one HTML page: no network, no build, everything in the file."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from mpcompile.report import quantities
from mpcompile.report.columns import node_seconds, packed, page_data
from mpcompile.report.costs import Estimate
from mpcompile.report.headline import headline
from mpcompile.report.pass_texts import pass_texts
from mpcompile.report.table import sections

if TYPE_CHECKING:
    from mpcompile.report.model import Report

# In the order in which they are read; each of ours uses those before it alone.
_LIBRARIES = ("vendor/tabulator.min.js", "vendor/dagre.min.js")
_SCRIPTS = (
    "base",
    "grid",
    "theme",
    "data",
    "filter",
    "tree",
    "table",
    "neighbours",
    "detail",
    "casts",
    "passes",
    "main",
)
_PLAIN = ("base", "grid", "theme", "plain")
# A notebook's cell shows so many groups of modules, and so many rows of each.
_SECTIONS, _ROWS = 60, 100
_STYLES = ("vendor/tabulator_simple.min.css", "web/page.css")


@dataclass(frozen=True)
class PlainTable:
    """The table of a plain page.

    Fields:
      what: what its rows are ("nodes").
      columns: of each title, field, kind (a key of WORDS in `web/plain.js`), width in pixels, and perhaps wide (takes what is
        left) and phone (shown there, too).
      rows: a value for each field.
      facet: a field with a button for each of its words.
    """

    what: str
    columns: Sequence[dict[str, Any]]
    rows: Sequence[dict[str, Any]]
    facet: str = ""

    def packed(self) -> dict[str, Any]:
        """The rows as columns, words that repeat stored once."""
        fields = [*dict.fromkeys([column["field"] for column in self.columns] + ([self.facet] if self.facet else []))]
        lists = {name: [row[name] for row in self.rows] for name in fields}
        return {name: packed(one) if all(isinstance(v, str) for v in one) else one for name, one in lists.items()}


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page to `path`."""
    Path(path).write_text(render(report), encoding="utf-8", errors="backslashreplace")


def render(report: Report) -> str:
    """The whole page."""
    seconds = node_seconds(report)
    facts = {
        "report": report,
        "head": headline(report, seconds),
        "costs": Estimate.of(report).breakdown() if report.graph.nodes else {},
        "what": _what(report),
        "data": _script_data(page_data(report, seconds)),
        "texts": _packed(pass_texts(report)),
    }
    return assemble("web/page.html.jinja", facts)


def fragment(report: Report, notes: Sequence[str] = ()) -> str:
    """The headline, and the nodes folded by module, for a notebook: no script, at most `_SECTIONS` groups of modules."""
    found = sections(report.nodes)
    shown = [{"title": one.title, "modules": one.modules, "rows": one.rows[:_ROWS],
              "counts": Counter(row.precision for row in one.rows).most_common()} for one in found[:_SECTIONS]]  # fmt: skip
    facts = {"report": report, "head": headline(report, node_seconds(report)), "what": _what(report), "notes": notes,
             "sections": shown, "left": len(found) - len(shown), "style": Markup(_text("web/fragment.css"))}  # fmt: skip
    return str(_templates().get_template("fragment.html.jinja").render(facts))


def cell(title: str, cards: Sequence[dict[str, Any]]) -> str:
    """Cards, as `plain_page` takes them, for a notebook."""
    facts = {"title": title, "cards": cards, "style": Markup(_text("web/fragment.css"))}
    return str(_templates().get_template("web/cell.html.jinja").render(facts))


def plain_page(title: str, facts: Sequence[tuple[str, str]], cards: Sequence[dict[str, Any]], table: PlainTable) -> str:
    """A page with some cards and one table, for what is no report of one graph.

    Args:
      facts: (name, value) pairs for the top line.
      cards: each with some of "big", "lines", and "caption", "head" and "rows" of a small table.
    """
    data = {"columns": table.columns, "rows": table.packed(), "facet": table.facet, "what": table.what}
    inside = {"title": title, "facts": facts, "cards": cards, "what": table.what, "data": _script_data(data)}
    return assemble("web/plain.html.jinja", inside, _PLAIN, _LIBRARIES[:1])


def assemble(template: str, facts: dict[str, Any], scripts: Sequence[str] = _SCRIPTS,
             libraries: Sequence[str] = _LIBRARIES) -> str:  # fmt: skip
    """A page of `template` with the styles and scripts that it asks for, and a policy that lets nothing else in."""
    styles = [_text(name) for name in _STYLES]
    code = [*map(_text, libraries), "\n".join(_text(f"web/{name}.js") for name in scripts)]
    rules = [
        "default-src 'none'",
        f"style-src {' '.join(map(_hash, styles))}",
        f"script-src {' '.join(map(_hash, code))}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    inside = {"styles": list(map(Markup, styles)), "scripts": list(map(Markup, code)), "csp": "; ".join(rules)}
    return str(_templates().get_template(template).render(**facts, **inside))


def _what(report: Report) -> str:
    """What the estimates are of."""
    return "forward" if all(row.phase == "forward" for row in report.nodes) else "step"


def _templates() -> Environment:
    loader = PackageLoader("mpcompile.report", ".")
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters.update(seconds=quantities.seconds, size=quantities.size, times=quantities.times, percent=_percent)
    return pages


def _text(name: str) -> str:
    """A file of this room, as it stands in the page: without the address of a map that is not there."""
    text = resources.files("mpcompile.report").joinpath(*name.split("/")).read_text(encoding="utf-8")
    return re.sub(r"(//#|/\*#) sourceMappingURL=.*", "", text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _script_data(data: Any) -> Markup:
    """JSON that no parser of HTML mistakes for a tag, whatever the names in it."""
    text = json.dumps(data, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _packed(data: Any) -> str:
    """JSON of what is looked at later and is long, for `web/passes.js` to unpack; "" for nothing."""
    if data is None:
        return ""
    text = json.dumps(data, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def _percent(fraction: float) -> str:
    if 0 < fraction < 0.001:
        return "< 0.1 %"
    return f"{100 * fraction:.3g} %" if fraction < 0.9995 or fraction == 1 else "> 99.9 %"
