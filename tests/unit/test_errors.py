"""Every error has a code of its room, a page, and says what to try."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from mpcompile import errors
from mpcompile.errors import MPCompileError, suggest

ROOT = Path(__file__).parents[2]
SOURCES = [p for room in ("mpcompile", "passes", "tools") for p in (ROOT / room).rglob("*.py")]
FAMILIES = {
    "CaptureError": "1",
    "RuleError": "2",
    "AssignError": "3",
    "LawError": "4",
    "TrainingError": "5",
    "OnnxError": "6",
    "RuntimeFailure": "7",
    "UsageError": "8",
}


def raised() -> list[tuple[str, str, str]]:
    """(family, code, place) of every error that is built with a literal code."""
    found = []
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or not call.args:
                continue
            if call.func.id in FAMILIES and isinstance(call.args[0], ast.Constant):
                found.append((call.func.id, str(call.args[0].value), f"{path.name}:{call.lineno}"))
    return found


def test_every_code_has_its_page_and_its_room() -> None:
    pages, used = errors.pages(), raised()
    assert len(used) > 30
    assert [one for one in used if one[1] not in pages] == []
    assert [one for one in used if not re.fullmatch(f"MP{FAMILIES[one[0]]}\\d\\d", one[1])] == []


def test_every_page_is_raised_somewhere() -> None:
    """A code that is documented and never raised is a promise nobody keeps."""
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    marks = ('"{}"', "({})")
    said = {code for code in errors.pages() for text in texts for mark in marks if mark.format(code) in text}
    assert sorted(errors.pages().keys() - said) == []


def test_every_page_is_whole() -> None:
    for one in errors.pages().values():
        assert re.fullmatch(r"MP[1-8]\d\d", one.code)
        assert one.title
        assert not one.title.endswith(".")
        assert one.cause.endswith(".")
        assert one.remedy


def test_every_family_is_listed() -> None:
    members = inspect.getmembers(errors, inspect.isclass)
    families = [c.__name__ for _, c in members if issubclass(c, MPCompileError) and c is not MPCompileError]
    assert sorted(families) == sorted(FAMILIES)


def test_message() -> None:
    error = MPCompileError("MP101", "no graph", where="model.py:4", why="a loop", try_="unroll it")
    assert str(error).splitlines() == [
        "MP101: no graph",
        "  where: model.py:4",
        "  why:   a loop",
        "  try:   unroll it",
    ]
    assert str(MPCompileError("MP101", "no graph")) == "MP101: no graph"
    assert (error.code, error.what, error.where, error.why, error.try_) == (
        "MP101",
        "no graph",
        "model.py:4",
        "a loop",
        "unroll it",
    )


def test_suggest() -> None:
    assert suggest("ouput", ["output", "plan"]) == "'output'"
    assert suggest("zzz", ["output", "plan"]) == ""
