"""MkDocs hooks: the README is the first page, and links to files that are no pages are words."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")
TITLED = re.compile(r"^```(\w+) ([\w./-]+)$", re.MULTILINE)
OTHERS = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand beside the folder."""
    for name, page in OTHERS.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, its in OTHERS.items():
            text = text.replace(f"]({other})", f"]({its})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Take links to what is no page (sources, results, folders) off their words; a fence's second word is its title."""

    def keep(found: re.Match[str]) -> str:
        words, target, _ = found.groups()
        if "://" in target:
            return found[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), target))
        return found[0] if files.get_file_from_path(place) is not None else words

    return LINK.sub(keep, TITLED.sub(r'```\1 title="\2"', markdown))
