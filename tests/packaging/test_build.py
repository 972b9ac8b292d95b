"""sdist -> wheel -> a clean environment in which every module imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("mpcompile", "passes", "tools", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md", "MANIFEST.in")

IMPORT_ALL = """
import importlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
import mpcompile
assert sys.prefix in mpcompile.__file__, mpcompile.__file__
names = [m.name for m in pkgutil.walk_packages(mpcompile.__path__, "mpcompile.") if not m.name.endswith("__main__")]
# Triton comes with torch's CUDA builds alone.
names = [name for name in names if not name.endswith("_triton")]
for name in names:
    importlib.import_module(name)
from mpcompile.report.model import build_report
from mpcompile.graph import PrecisionGraph
from mpcompile.policy import Policy
from mpcompile.report.html import render
assert "Tabulator" in render(build_report(PrecisionGraph(), Policy("bf16"), "cpu"))  # the page's files are in the wheel
from mpcompile.rules import rules_for
assert rules_for("aten").get("aten.linear.default").kind.name == "matmul"
print(len(names))
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from the sdist, of a copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source, cwd=source)
    return source / "dist"


def test_wheel_holds_every_source(dist: Path) -> None:
    wheel = next(dist.glob("*.whl"))
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mpcompile/")}
    rooms = {"passes": "mpcompile/passes", "tools": "mpcompile/tools", "mpcompile": "mpcompile"}
    wanted = {
        f"{target}/{path.relative_to(ROOT / room).as_posix()}"
        for room, target in rooms.items()
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted


def test_clean_install_imports_every_module(dist: Path, tmp_path: Path) -> None:
    home = tmp_path / "clean"
    venv.create(home, with_pip=False, symlinks=True)
    inside = home / "bin" / "python"
    # The dependencies of the running environment, without its own mpcompile: a plain path runs no editable finder.
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    wheel = next(dist.glob("*.whl"))
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        inside,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    assert int(run(inside, "-c", IMPORT_ALL, cwd=tmp_path)) >= 40
    assert "mpcompile 0." in run(home / "bin" / "mpcompile", "--version", cwd=tmp_path)
