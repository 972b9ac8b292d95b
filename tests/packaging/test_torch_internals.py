"""Private names of torch stand in one room, each with a row that says what it is for."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpcompile.errors import MPCompileError
from mpcompile.torch_internals import names

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "mpcompile" / "torch_internals"
SEEN = {path for row in names.names().values() for path in (row.path, row.instead) if path}
LAST = {path.rpartition(".")[2] for path in SEEN}
# Underscored names that are not torch's: of named tuples, of Python, of a host's classes, and marks of our own.
NOT_TORCH = {"_asdict", "_fields", "_replace", "_getframe", "_after_closure", "_prepare_inputs", "_mpcompile_kept"}


def files() -> list[Path]:
    return [path for room in ("mpcompile", "passes", "tools") for path in (ROOT / room).rglob("*.py")]


def is_private(dotted: str) -> bool:
    return any(re.match(r"_[^_]", part) for part in dotted.split("."))


def own_names(trees: list[ast.Module]) -> set[str]:
    """What classes and modules of the package define themselves."""
    found = set[str]()
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for one in (n for target in targets for n in ast.walk(target)):
                if isinstance(one, ast.Name):
                    found.add(one.id)
                elif isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == "self":
                    found.add(one.attr)
    return found


def private_of_torch(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of each private module, function or attribute of torch that a file names."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=aliases) if module.partition(".")[0] == "torch":
                yield from ((node.lineno, f"{module}.{a.name}") for a in aliases if is_private(f"{module}.{a.name}"))
            case ast.Import(names=aliases):
                yield from (
                    (node.lineno, a.name) for a in aliases if a.name.startswith("torch.") and is_private(a.name)
                )
            case ast.Attribute(attr=name) if is_private(name) and is_torch_s(node, own):
                yield node.lineno, ast.unparse(node)
            case ast.Constant(value=str(text)) if text in LAST and is_private(text):
                yield node.lineno, repr(text)


def is_torch_s(node: ast.Attribute, own: set[str]) -> bool:
    """Whether an underscored attribute may be one of torch: no operator's name, and none of ours."""
    base = ast.unparse(node.value)
    if node.attr in NOT_TORCH or re.match(r"(torch\.ops|aten|_ATEN|_C10D)\b", base):
        return False
    return node.attr not in own and (base not in ("self", "cls") or node.attr in LAST)


def test_no_other_file_names_a_private_part_of_torch() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files() if ROOM not in path.parents}
    assert len(trees) > 200
    own = own_names(list(trees.values()))
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in private_of_torch(tree, own)
    ]
    assert found == []


@pytest.mark.parametrize("text", [
    "from torch._guards import tracing", "import torch._dynamo", "from torch.utils import _pytree", "torch._foreach_add_(x)",
    "x = torch._C._nn.f", "p._version", "getattr(p, '_backward_hooks')", "self._buffers", "op._schema.name",
    "torch.amp.autocast_mode._enter_autocast()", "operator.attrgetter('_version')",
])  # fmt: skip
def test_the_test_above_sees(text: str) -> None:
    assert list(private_of_torch(ast.parse(text), {"_mine"}))


@pytest.mark.parametrize(
    "text", ["self._mine", "from torch.fx import Graph", "torch.ops.aten._to_copy", "x._mine", "_version = 1"]
)
def test_the_test_above_leaves(text: str) -> None:
    assert not list(private_of_torch(ast.parse(text), {"_mine"}))


def test_every_private_name_of_the_room_has_a_row_and_every_row_a_use() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in ROOM.glob("*.py")}
    own = own_names([ast.parse(text) for text in texts.values()])
    named = set[str]()
    for text in texts.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                named |= {f"{node.module}.{a.name}" for a in node.names if is_private(f"{node.module}.{a.name}")}
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "found":
                module, *wanted = (a.value for a in node.args if isinstance(a, ast.Constant))
                named |= {f"{module}.{name}" for name in wanted}
            elif isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in own:
                named.add(node.attr)
            elif isinstance(node, ast.Constant) and re.fullmatch(r"_[a-z]\w*", str(node.value)):
                named.add(node.value)
    named -= {"_increment_nesting", "_decrement_nesting", "_guards_fn", "_c10d_functional"}  # names of calls in a graph
    modules = {"torch._dynamo.config", "torch._functorch.config", "torch._inductor.config", "_C", "_nn"}
    assert {name for name in named - modules if name not in SEEN and name not in LAST} == set()
    everything = "\n".join(texts.values())
    assert [one.path for one in names.names().values() if one.path.rpartition(".")[2] not in everything] == []


def test_this_torch_has_them_all() -> None:
    assert [one.path for one in names.missing()] == []


def test_rows_say_what_they_are_for() -> None:
    assert [one.path for one in names.names().values() if not one.use or not one.without] == []
    assert {one.seen for one in names.names().values()} <= {
        "2.11",
        "2.11 to 2.13",
        "2.13 to 2.14",
        f"{names.TESTED[0]} to {names.TESTED[1]}",
    }


def test_a_name_that_is_gone_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        "torch._guards.gone",
        "torch.nn.Module._gone",
        "torch.nn.Module._buffers",
        "torch.gone.part",
        "torch._foreach_gone",
    ]
    monkeypatch.setattr(names, "names", lambda: {path: names.PrivateName(path, "x", "y") for path in paths})
    assert [one.path for one in names.missing()] == [path for path in paths if "gone" in path]
    either = names.PrivateName("torch._guards.gone", "x", "y", instead="torch._guards.tracing")
    monkeypatch.setattr(names, "names", lambda: {either.path: either})
    assert names.missing() == []


def test_one_warning_for_a_newer_torch_that_lacks_some(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = [names.PrivateName("torch._a.b", "this", "that"), names.PrivateName("torch._a.c", "these", "those")]
    monkeypatch.setattr(names, "missing", lambda: lacking)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        names.warn_of_missing("2.99.0+cpu")
        names.warn_of_missing(f"{names.TESTED[1]}.5")
        names.warn_of_missing("2.11.0")
    assert len(said) == 1
    assert "torch._a.b: for this; without it that" in str(said[0].message)
    assert "torch._a.c" in str(said[0].message)
    monkeypatch.setattr(names, "missing", list)
    names.warn_of_missing("2.99.0")  # a warning would be an error here


def test_what_is_absent_is_told_when_it_is_used() -> None:
    gone, here = names.found("torch._guards", "GoneContext", "tracing")
    assert callable(here)
    assert not isinstance(1, gone)
    for use in (lambda: gone(), lambda: gone.report_output_strides()):
        with pytest.raises(MPCompileError, match=r"MP705: torch .* has no torch._guards.GoneContext"):
            use()
    with pytest.raises(MPCompileError, match="MP705"):
        names.found("torch._no_such_module", "anything")()
    try:
        raise ValueError("another")
    except gone:
        pytest.fail("it stands for nothing that is raised")
    except ValueError:
        pass


def test_import_survives_a_torch_that_lacks_one() -> None:
    """A newer torch without two names: the package is imported, one warning names both, a model runs."""
    import subprocess
    import sys

    code = """
import warnings, torch, torch.nn.modules.transformer
torch.__version__ = torch.version.__version__ = "2.99.0"
del torch.nn.modules.transformer._detect_is_causal_mask, torch._foreach_zero_
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from mpcompile.api import mpcompile
ours = [str(one.message) for one in said if "mpcompile" in str(one.message)]
assert len(ours) == 1 and "_detect_is_causal_mask" in ours[0] and "_foreach_zero_" in ours[0], ours
assert ours[0].count("without it") == 2, ours
mp = mpcompile(torch.nn.Linear(4, 4), "bf16", backend="eager")
print(tuple(mp(torch.ones(2, 4)).shape))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip() == "(2, 4)"
