"""Golden texts: one file per case, with the passes to run, the graph before and the graph after.

`pytest tests/golden --update-goldens` rewrites the second graph; read the diff before committing it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mpcompile import laws
from mpcompile.parse import parse_graph
from mpcompile.passes.base import Pass
from mpcompile.pipeline import run, verify_each
from mpcompile.text import print_graph

CASES = sorted(Path(__file__).parent.glob("*/*.txt"))
PASSES = ("normalize", "classify", "hazards", "origins", "assign", "insert_casts", "simplify_casts", "all_fp32")


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_case(path: Path, request: pytest.FixtureRequest) -> None:
    head, before, after = split(path.read_text(encoding="utf-8"))
    graph = parse_graph(before)
    laws.verify(graph, stage="structure")
    result, records = run(graph, list(passes(head)), verify_each)
    text = print_graph(result)
    assert any(record.modified for record in records) == (text != print_graph(graph))
    if request.config.getoption("--update-goldens"):
        path.write_text(f"{head}before:\n{before}after:\n{text}", encoding="utf-8")
    else:
        assert text == after


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_cases(name: str) -> None:
    assert len(list((Path(__file__).parent / name).glob("*.txt"))) >= (1 if name == "all_fp32" else 4)


@pytest.mark.parametrize("name", PASSES)
def test_file_class_and_pass_have_one_name(name: str) -> None:
    one = pass_class(name)
    assert one.name == name.replace("_", "-")  # type: ignore[attr-defined]
    assert inspect.getmodule(one).__name__ == f"mpcompile.passes.{name}"  # type: ignore[union-attr]


def split(text: str) -> tuple[str, str, str]:
    """(comment and run line, graph before, graph after)."""
    head, _, rest = text.partition("before:\n")
    before, _, after = rest.partition("after:\n")
    return head, before, after


def passes(head: str) -> Iterator[Pass]:
    """The passes of a line such as ``run: classify(low='bf16'), hazards('bf16')``."""
    line = next(line for line in head.splitlines() if line.startswith("run:"))
    tree = ast.parse(f"({line.removeprefix('run:').strip()},)", mode="eval").body
    assert isinstance(tree, ast.Tuple)
    for call in tree.elts:
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        options: dict[str, Any] = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
        yield pass_class(call.func.id)(*map(ast.literal_eval, call.args), **options)


def pass_class(name: str) -> Any:
    camel = "".join(part.capitalize() for part in name.split("_"))
    return getattr(import_module(f"mpcompile.passes.{name}"), camel)
