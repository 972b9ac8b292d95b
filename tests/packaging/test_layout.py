"""What stands where, and what importing costs."""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib.metadata
import os
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import mpcompile

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def files() -> list[Path]:
    """Every file of the package, through the links, relative to mpcompile/."""
    walk = os.walk(ROOT / "mpcompile", followlinks=True)
    found = [Path(folder, name) for folder, _, names in walk for name in names if "__pycache__" not in folder]
    return [path.relative_to(ROOT / "mpcompile") for path in found]


def test_the_list_of_packages_is_the_tree() -> None:
    folders = {path.parent for path in files() if path.name == "__init__.py"}
    assert {".".join(("mpcompile", *folder.parts)) for folder in folders} == set(SETUPTOOLS["packages"])
    assert {path.parent for path in files()} == folders, "a folder without __init__.py is in no wheel"


def test_every_data_file_is_packaged() -> None:
    patterns = SETUPTOOLS["package-data"]["*"]
    data = [path.name for path in files() if path.suffix != ".py"]
    assert data
    assert [name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


@pytest.mark.parametrize("room", ["passes", "tools"])
def test_rooms_at_the_top_are_links_and_refuse_their_short_name(room: str) -> None:
    link = ROOT / "mpcompile" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room
    refused = python("-c", f"import {room}")
    assert refused.returncode == 1
    assert f"ImportError: import mpcompile.{room}, not {room}" in refused.stderr


def test_import_is_light() -> None:
    code = "import sys, mpcompile, mpcompile.tools.main; sys.exit(bool({'torch', 'onnx', 'scipy'} & set(sys.modules)))"
    assert python("-c", code).returncode == 0


BARE = """
import typer
app = typer.Typer()
@app.command()
def one(x: int = 1): "do"
@app.command()
def two(x: int = 1): "do"
app()
"""


def test_help_is_quick() -> None:
    """Beside the help of a program of two verbs that does nothing: seconds of a busy core count up to half as much again.

    All verbs together take three quarters of it, for the help is printed without rich; alone some 0.2 s.
    """
    pairs = [(cpu_seconds("-m", "mpcompile", "--help"), cpu_seconds("-c", BARE, "--help")) for _ in range(5)]
    ours, bare = (min(one) for one in zip(*pairs, strict=True))
    assert ours < bare


def cpu_seconds(*arguments: str) -> float:
    def now() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = now()
    assert python(*arguments).returncode == 0
    return now() - before


def test_public_names() -> None:
    for name in mpcompile.__all__:
        assert getattr(mpcompile, name) is not None
    assert callable(mpcompile.mpcompile)
    assert set(mpcompile.__all__) <= set(dir(mpcompile))
    with pytest.raises(AttributeError, match="mpcompyle"):
        _ = mpcompile.mpcompyle


def test_entry_points() -> None:
    backends = importlib.metadata.entry_points(group="torch_dynamo_backends")
    assert [one.value for one in backends if one.name == "mpcompile"][:1] == ["mpcompile.runtime.dynamo:backend"]
    assert callable(next(one for one in backends if one.name == "mpcompile").load())


def test_version_is_said_once() -> None:
    assert PROJECT["project"].get("version", mpcompile.__version__) == mpcompile.__version__


def test_rooms_know_what_they_may() -> None:
    """The import contracts, which `make lint` checks too: a test run alone must not miss them."""
    program = [Path(sys.executable).with_name("lint-imports")]
    checked = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout[-2000:]


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions count too; those for type checkers alone do not."""
    arrows = nx.DiGraph((name, other) for name, path in modules().items() for other in imported(path) if name != other)
    assert len(arrows) > 100
    assert [sorted(one) for one in nx.strongly_connected_components(arrows) if len(one) > 1] == []


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in (ROOT / "mpcompile").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for room in ("passes", "tools"):
        for path in (ROOT / room).rglob("*.py"):
            found[".".join(("mpcompile", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")] = (
                path
            )
    return found


def imported(path: Path) -> Iterator[str]:
    known = modules()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from (name for name in (inner if inner in known else node.module,) if name in known)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def test_the_onnx_extra_puts_nothing_over_an_onnxruntime_gpu() -> None:
    """Neither the extra nor what it asks for names a distribution of ONNX Runtime; one extra does for a GPU."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    below = [one for name in extras["onnx"] for one in importlib.metadata.requires(name) or []]
    asked = [*extras["onnx"], *(one for one in below if "extra ==" not in one)]
    assert asked
    assert not [one for one in asked if one.replace("_", "-").lower().startswith("onnxruntime")]
    assert {*extras["onnx"], "onnxruntime-gpu"} == {*extras["gpu"]}


def test_missing_onnx_packages_are_one_coded_message() -> None:
    code = """
import importlib.util as util
found = util.find_spec
util.find_spec = lambda name, *rest: None if name == "onnxruntime" else found(name, *rest)
from mpcompile import mpcompile
mpcompile("absent.onnx", "fp16")
"""
    said = python("-c", code).stderr
    assert "MP613" in said
    assert "onnxruntime-gpu" in said


# Lines of code in a function's body: neither its signature, nor its docstring, nor comments and blank lines.
LONGEST_FUNCTION, LONGEST_FILE = 40, 400
# function -> why it is longer.
LONGER_FUNCTIONS: dict[str, str] = {}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, text: list[str]) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    lines = text[body[0].lineno - 1 : body[-1].end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def test_functions_and_files_fit_a_screen() -> None:
    long = dict[str, int]()
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > LONGEST_FILE:
            long[name] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = body_lines(node, text.splitlines())
                long |= {f"{name}.{node.name}": count} if count > LONGEST_FUNCTION else {}
    assert {name: count for name, count in long.items() if name not in LONGER_FUNCTIONS} == {}
    assert set(LONGER_FUNCTIONS) <= set(long), "an exception that is none any more"


def test_what_counts_as_a_line_of_a_body() -> None:
    text = 'def f(\n    a,\n    b,\n):\n    """Says.\n\n    More.\n    """\n'
    text += "    # why\n    x = 1\n\n    return (\n        x\n    )\n"
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    assert body_lines(function, text.splitlines()) == 4
