"""CONTRIBUTING's recipes, each performed in a copy of the repository: its edits, then the tests that it names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its tests, links as links."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("mpcompile", "passes", "tools", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=unwanted)
    shutil.copytree(ROOT / "docs" / "reference", tmp_path / "docs" / "reference")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def python(copy: Path, *arguments: str, good: bool = True) -> str:
    """What a program says that runs in the copy, on the copy's package."""
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert (ran.returncode == 0) == good, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def pytested(copy: Path, *arguments: str, good: bool = True) -> str:
    """What pytest says in the copy."""
    return python(copy, "-m", "pytest", "-q", *arguments, good=good)


def reference(copy: Path, page: str) -> str:
    """A page of the reference after `make docs`."""
    python(copy, "-m", "mpcompile.tools.reference", "docs/reference")
    return (copy / "docs" / "reference" / page).read_text(encoding="utf-8")


OPERATION = """
import torch
from torch.library import custom_op
from mpcompile import mpcompile

@custom_op("mylib::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2

@twice.register_fake
def _(x):
    return torch.empty_like(x)

class Model(torch.nn.Module):
    def forward(self, x):
        return torch.ops.mylib.twice(x)

node = next(n for n in mpcompile(Model(), "bf16").report(torch.ones(4, 4)).nodes if "twice" in n.op)
print(node.reason)
"""


@pytest.mark.slow
def test_an_operation_is_one_line(copy: Path) -> None:
    assert "One line in `mpcompile/rules/aten.toml`" in RECIPES
    before = python(copy, "-c", OPERATION)
    edit(
        copy / "mpcompile/rules/aten.toml",
        '"aten.relu" = "elementwise"\n',
        '"aten.relu" = "elementwise"\n"mylib.twice" = "elementwise"\n',
    )
    after = python(copy, "-c", OPERATION)
    assert before != after
    assert "no rule" not in after
    pytested(copy, "tests/unit/test_rules.py")
    assert "mylib.twice" in reference(copy, "rules-aten.md")


PASS = '''"""Products whose name begins with "head" stay FP32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpcompile.graph import PrecisionGraph
from mpcompile.passes.base import PassResult


@dataclass(frozen=True)
class MyPass:
    """Fields:
    prefix: what the names begin with.
    """

    prefix: str = "head"

    name: ClassVar[str] = "my-pass"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        named = [node for node in graph if node.id.startswith(self.prefix)]
        raised = [node.raise_to_fp32("its name says so") for node in named]
        return PassResult(any(raised))
'''
CASE = """# {name}
run: classify('bf16'), my_pass()
before:
graph source=fx
input x: fp32[8, 64]
{name}: fp32[8, 64] = {op}(x, x)
return {name}
after:
"""


@pytest.mark.slow
def test_a_pass_is_a_file_a_name_and_four_cases(copy: Path) -> None:
    assert "Name it in `FX`, `ONNX` or both" in RECIPES
    (copy / "passes" / "my_pass.py").write_text(PASS, encoding="utf-8")
    pytested(copy, "tests/golden", "-k", "my_pass", good=False)  # it has no case yet
    recipes = copy / "mpcompile" / "recipes.py"
    edit(recipes, '_DECIDE = ("measured-hazards", ', '_DECIDE = ("my-pass", "measured-hazards", ')
    edit(
        recipes,
        '    "normalize": lambda',
        '    "my-pass": lambda asked: MyPass() if asked.looks else None,\n    "normalize": lambda',
    )
    edit(
        recipes,
        "from mpcompile.passes.normalize",
        "from mpcompile.passes.my_pass import MyPass\nfrom mpcompile.passes.normalize",
    )
    cases = copy / "tests" / "golden" / "my_pass"
    cases.mkdir()
    for name, op in (
        ("head", "aten.mm.default"),
        ("body", "aten.mm.default"),
        ("header", "aten.add.Tensor"),
        ("h", "aten.mul.Tensor"),
    ):
        (cases / f"{name}.txt").write_text(CASE.format(name=name, op=op), encoding="utf-8")
    pytested(copy, "tests/golden", "-k", "my_pass", "--update-goldens")
    assert "head: fp32[8, 64] = aten.mm.default(x, x) | fp32" in (cases / "head.txt").read_text(encoding="utf-8")
    pytested(copy, "tests/golden", "-k", "my_pass")
    assert "my-pass" in reference(copy, "passes.md")


@pytest.mark.slow
def test_an_error_is_raised_with_a_page(copy: Path) -> None:
    assert "which has a page in `mpcompile/errors.toml`" in RECIPES
    laws = copy / "mpcompile" / "laws.py"
    text = laws.read_text(encoding="utf-8")
    laws.write_text(text + '\n\ndef short_names(graph: PrecisionGraph) -> None:\n    """Law of the copy."""\n'
                    '    if any(len(node.id) > 99 for node in graph):\n        raise LawError("MP499", "a name is too long")\n',
                    encoding="utf-8")  # fmt: skip
    pytested(copy, "tests/unit/test_errors.py", good=False)  # it has no page yet
    page = '\n[MP499]\ntitle = "A long name"\ncause = "A node\'s name has a hundred letters."\nremedy = "Shorten it."\n'
    edit(copy / "mpcompile/errors.toml", "\n# MP5xx.", f"{page}\n# MP5xx.")
    pytested(copy, "tests/unit/test_errors.py")
    law = "from mpcompile.laws import short_names; from mpcompile.parse import parse_graph; "
    law += "short_names(parse_graph('graph\\ninput x: fp32[4]\\n' + 'n' * 100 + ': fp32[4] = aten.relu.default(x)\\n'))"
    python(copy, "-c", law, good=False)
    assert "A long name" in python(copy, "-m", "mpcompile", "explain", "MP499")
    assert "MP499" in reference(copy, "errors.md")


@pytest.mark.slow
def test_a_device_is_a_row(copy: Path) -> None:
    assert "A row in `mpcompile/devices.toml`" in RECIPES
    rows = copy / "mpcompile" / "devices.toml"
    rows.write_text(rows.read_text(encoding="utf-8") + '\n[b200]\nlike = "h100"\nproducts = ["B200"]\ncapability = 10.0\n'
                    'fp32 = 8.0e13\nsource = "published"\n', encoding="utf-8")  # fmt: skip
    found = "from mpcompile.hardware import cuda_row as row; from mpcompile.devices import pinned\n"
    found += "print(row('NVIDIA B200', (10, 0)), row('NVIDIA B300', (10, 3)), pinned('b200').fp32)"
    assert python(copy, "-c", found).split() == ["b200", "b200", "80000000000000.0"]
    assert "b200" in pytested(copy, "-vv", "tests/unit/test_devices.py", "-k", "every_row")


def test_a_number_format_is_a_row(copy: Path) -> None:
    assert "One row of `FORMATS`" in RECIPES
    row = '    Format("float8_e4m3fnuz", 1, 4, 240.0, 2.0**-7, 2.0**-10, False, False,\n'
    row += '           "float8_e4m3fnuz", "FLOAT8E4M3FNUZ", "float8_e4m3fnuz", "cyan", "#9ecae1"),\n'
    last = '           "float8_e5m2", "FLOAT8E5M2", "float8_e5m2", "cyan", "#9ecae1"),\n'
    edit(copy / "mpcompile" / "formats.py", last, last + row)
    assert "float8_e4m3fnuz" in pytested(copy, "-vv", "tests/unit/test_formats.py")
    wrong = row.replace("240.0", "448.0")
    edit(copy / "mpcompile" / "formats.py", row, wrong)
    pytested(copy, "tests/unit/test_formats.py", good=False)
