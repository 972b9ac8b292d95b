"""The pages of the error codes. They are registered where they are used, so finding one imports its module."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable

from mpcompile.errors import PAGES, Page, pages


def error_pages(code: str = "") -> dict[str, Page]:
    """Code -> page, sorted. With a `code`, only modules that mention it are imported, so most are found without torch.

    Modules of an extra that is not installed are left out.
    """
    if code and code in pages():
        return pages()
    for name, text in _sources(resources.files("mpcompile"), "mpcompile"):
        if "page(" in text and code in text:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    return dict(sorted({**pages(), **PAGES}.items()))


def _sources(folder: Traversable, package: str) -> Iterator[tuple[str, str]]:
    """Module name and text of every file of the package."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _sources(entry, f"{package}.{entry.name}")
        elif entry.name.endswith(".py") and not entry.name.startswith("__"):
            yield f"{package}.{entry.name.removesuffix('.py')}", entry.read_text(encoding="utf-8")
