"""The pages of the verbs: their files are written, their commands run, and what these print is what the page shows.

A block ```` ```python name.py ```` is a file, a block ```` ```console ```` holds commands ("$ mpcompile …") and their
output. Numbers may differ between machines, words may not (and where rows are sorted by numbers, a few rows may); a line
of "…" stands for any lines.
``--update-goldens`` writes what was printed into the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpcompile.tools.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "verbs").glob("*.md"))
BLOCK = re.compile(r"^```(python [\w.]+|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(e[+-]?\d+)?|\b(inf|nan)\b|(?<= )-(?= |$)")
RULED = re.compile(r"[ ─━╭╮╰╯│▁-█]+")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_shows_what_is_printed(page: Path, tmp_path: Path, request: pytest.FixtureRequest,
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, value in {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    text = page.read_text(encoding="utf-8")
    made = BLOCK.sub(lambda found: _block(found[1], found[2], tmp_path), text)
    if request.config.getoption("--update-goldens"):
        page.write_text(made, encoding="utf-8")
    assert _prose(text) == _prose(made)
    for shown, printed in zip(BLOCK.findall(text), BLOCK.findall(made), strict=True):
        _assert_like(shown[1], printed[1])


def _block(kind: str, body: str, folder: Path) -> str:
    if kind != "console":
        (folder / kind.split()[1]).write_text(body, encoding="utf-8")
        return f"```{kind}\n{body}```"
    shown = ""
    for command, _ in _commands(body):
        shown += f"$ {command}\n{_run(command)}"
    return f"```console\n{shown}```"


def _commands(body: str) -> list[tuple[str, str]]:
    """(command, output) of a block."""
    parts = re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]
    return [(head, rest) for head, _, rest in (part.partition("\n") for part in parts)]


def _run(command: str) -> str:
    words = command.split()
    if words[0] == "python":
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    assert words[0] == "mpcompile", command
    ran = CliRunner().invoke(app, [word.strip("'\"") for word in words[1:]])
    if ran.exception and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    text = ran.output.replace(f"{os.getcwd()}/", "")
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _prose(text: str) -> str:
    return BLOCK.sub(lambda found: f"```{found[1]}```", text)


def _assert_like(shown: str, printed: str) -> None:
    """The same lines but for numbers; a few may differ, since rows are sorted by them and cut."""
    theirs, mine = (Counter(_words(text).splitlines()) for text in (printed, shown))
    if "…" in mine:
        theirs &= mine
        mine -= Counter({"…": 1})
    common = (mine & theirs).total()
    assert common >= 0.8 * max(mine.total(), theirs.total()), printed


def _words(text: str) -> str:
    """Without numbers, and with the widths that they give to columns."""
    return "\n".join(RULED.sub(" ", NUMBER.sub("#", line)).strip() for line in text.splitlines())


def test_every_page_is_found() -> None:
    assert PAGES
    assert all(BLOCK.search(page.read_text(encoding="utf-8")) for page in PAGES)
