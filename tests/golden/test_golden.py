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

import mpcompile.passes
from mpcompile import laws
from mpcompile.parse import parse_graph
from mpcompile.passes.base import Pass
from mpcompile.passes.measured_hazards import Measured
from mpcompile.pipeline import honest, run, together, verify_each
from mpcompile.signature import Signature
from mpcompile.text import print_graph

CASES = sorted(Path(__file__).parent.glob("*/*.txt"))
# What a run line may call besides passes and literals.
VALUES = {"Measured": Measured, "Signature": Signature}
# Fewer cases than other passes need: what these do is one thing.
FEW = {"all_fp32": 1, "strict": 2}


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


# A new file with a pass in it is asked for cases without being named here.
PASSES = [path.stem for path in sorted(Path(mpcompile.passes.__path__[0]).glob("[a-z]*.py"))
          if hasattr(import_module(f"mpcompile.passes.{path.stem}"), camel(path.stem))]  # fmt: skip


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_case(path: Path, request: pytest.FixtureRequest) -> None:
    head, before, after = split(path.read_text(encoding="utf-8"))
    graph = parse_graph(before)
    laws.verify(graph, stage="structure")
    result, records = run(graph, list(passes(head)), together(verify_each, honest(graph)))
    text = print_graph(result)
    assert any(record.modified for record in records) == (text != print_graph(graph))
    if request.config.getoption("--update-goldens"):
        path.write_text(f"{head}before:\n{before}after:\n{text}", encoding="utf-8")
    else:
        assert text == after


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_cases(name: str) -> None:
    assert len(list((Path(__file__).parent / name).glob("*.txt"))) >= FEW.get(name, 4)


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
        options: dict[str, Any] = {k.arg: value_of(k.value) for k in call.keywords if k.arg}
        yield pass_class(call.func.id)(*map(value_of, call.args), **options)


def value_of(node: ast.expr) -> Any:
    """A literal, or a value of `VALUES`, or a dictionary of these."""
    if isinstance(node, ast.Dict):
        return {value_of(k): value_of(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        named = {k.arg: value_of(k.value) for k in node.keywords if k.arg}
        return VALUES[node.func.id](*map(value_of, node.args), **named)
    return ast.literal_eval(node)


def pass_class(name: str) -> Any:
    return getattr(import_module(f"mpcompile.passes.{name}"), camel(name))
