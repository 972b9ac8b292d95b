"""The pages of the verbs: their files are written, their commands run, and what these print is what the page shows.

A block ```` ```python name.py ```` is a file, a block ```` ```console ```` holds commands ("$ mpcompile …") and their
output. Each line must be printed as it is shown, in any order where numbers sort them, and each number within a tenth;
what a clock measured may be any number (```` ```console timed ````: all numbers), and a line of "…" stands for any lines. Of
```` ```console names ```` (what this machine is) the names alone count.
``--update-goldens`` writes what was printed into the page.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpcompile.tools.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "verbs").glob("*.md"))
# Compiles three ways to train.
SLOW = {"bench": pytest.mark.slow}
BLOCK = re.compile(r"^```(python [\w.]+|console|console names|console timed)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(e[+-]?\d+)?|\b(inf|nan)\b|(?<= )-(?= |$)")
RULED = re.compile(r"[ ─━╭╮╰╯│▁-█]+")


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem, marks=SLOW.get(page.stem, ())) for page in PAGES])
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
        CHECKS.get(shown[0], _assert_like)(shown[1], printed[1])


def _block(kind: str, body: str, folder: Path) -> str:
    if not kind.startswith("console"):
        (folder / kind.split()[1]).write_text(body, encoding="utf-8")
        return f"```{kind}\n{body}```"
    shown = ""
    for command, _ in _commands(body):
        # A page says what a machine is, not what this suite pins.
        shown += f"$ {command}\n{_run(command, {'MPCOMPILE_DEVICES': ''} if kind == 'console names' else {})}"
    return f"```{kind}\n{shown}```"


def _commands(body: str) -> list[tuple[str, str]]:
    """(command, output) of a block."""
    parts = re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]
    return [(head, rest) for head, _, rest in (part.partition("\n") for part in parts)]


def _run(command: str, environment: dict[str, str]) -> str:
    words = shlex.split(command)
    if words[0] == "python":
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    assert words[0] == "mpcompile", command
    ran = CliRunner().invoke(app, words[1:], env=environment)
    if ran.exception and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    text = ran.output.replace(f"{os.getcwd()}/", "")
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _prose(text: str) -> str:
    return BLOCK.sub(lambda found: f"```{found[1]}```", text)


def _assert_like(shown: str, printed: str) -> None:
    """The same lines, as often, and the same numbers to a tenth; where the page has "…", more may be printed."""
    _assert_same_lines(shown, printed, numbers=True)


def _assert_same_words(shown: str, printed: str) -> None:
    _assert_same_lines(shown, printed, numbers=False)


def _assert_same_lines(shown: str, printed: str, *, numbers: bool) -> None:
    theirs, mine = (_by_words(text) for text in (printed, shown))
    any_more = mine.pop("…", None) is not None
    lacking = [line for line in mine if len(mine[line]) > len(theirs.get(line, ()))]
    more = [] if any_more else [line for line in theirs if len(theirs[line]) > len(mine.get(line, ()))]
    assert (lacking, more) == ([], []), printed
    off = [
        (ours, its)
        for line in mine
        for ours, its in zip(mine[line], theirs[line], strict=False)
        if numbers and not _near(ours, its)
    ]
    assert off == [], printed


def _assert_same_names(shown: str, printed: str) -> None:
    """The same checks; what a machine without a device says less is not asked for."""
    names = [[line.partition(":")[0][4:].strip() for line in text.splitlines()] for text in (shown, printed)]
    assert len(names[0]) > 10
    assert set(names[0]) - OF_SOME_MACHINES == set(names[1]) - OF_SOME_MACHINES


CHECKS = {"console names": _assert_same_names, "console timed": _assert_same_words}
# Checks that one machine has and another has not.
OF_SOME_MACHINES = {"cuda", "FP16 on cpu", "policy 'auto' on cuda", "products on cuda", "FLOP/s on cuda"}
# Lines with what a clock measured.
TIMED = re.compile(r"step_seconds")


def _by_words(text: str) -> dict[str, list[str]]:
    """Line without its numbers -> the lines that read so."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        found.setdefault(_words(line), []).append(line)
    return found


def _near(ours: str, its: str) -> bool:
    if TIMED.search(ours):
        return True
    pairs = zip(*([found[0] for found in NUMBER.finditer(line)] for line in (ours, its)), strict=False)
    return all(_value(a) == pytest.approx(_value(b), rel=0.1, nan_ok=True) for a, b in pairs)


def _value(number: str) -> float:
    return float(number.replace(",", "")) if number != "-" else 0.0


def _words(text: str) -> str:
    """Without numbers, and with the widths that they give to columns."""
    return "\n".join(RULED.sub(" ", NUMBER.sub("#", line)).strip() for line in text.splitlines())


def test_every_page_is_found() -> None:
    assert PAGES
    assert all(BLOCK.search(page.read_text(encoding="utf-8")) for page in PAGES)
