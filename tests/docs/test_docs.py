"""What the documents show runs, what they link to is there, and what is made from the source is fresh."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpcompile.tools.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
HOW_TO = ["docs/how-to.md", "docs/coming-from.md", "docs/how-to-onnx.md", "docs/how-to-distributed.md"]
TAUGHT = ["README.md", "docs/tutorial.md", *HOW_TO, "docs/explanation/training-step.md"]
# A minute of compilation each: run with what is slow.
LATER = {"docs/coming-from.md", "docs/how-to-distributed.md", "docs/explanation/training-step.md"}
HOSTS = [f"docs/hosts/{name}.md" for name in ("accelerate", "lightning", "peft", "transformers")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=[pytest.mark.slow] if one in LATER or one in HOSTS else []) for one in [*TAUGHT, *HOSTS]],
)
def test_every_python_block_runs(name: str, tmp_path: Path) -> None:
    """One process a page, as a reader would: its blocks in order, in an empty directory with a model.onnx."""
    code = blocks(ROOT / name, "python")
    assert code
    onnx_model(tmp_path / "model.onnx")
    script = tmp_path / "page.py"
    script.write_text("\n".join(code), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def onnx_model(path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    numpy = pytest.importorskip("numpy")
    ports = [onnx.helper.make_tensor_value_info(name, 1, [64, 64]) for name in ("x", "y")]
    weight = onnx.numpy_helper.from_array(numpy.eye(64, dtype="float32"), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "net", ports[:1], ports[1:], [weight]
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)


def test_no_page_has_python_that_nobody_runs() -> None:
    unrun = [page for page in PAGES if str(page.relative_to(ROOT)) not in [*TAUGHT, *HOSTS] and blocks(page, "python")]
    assert unrun == []


def test_shell_lines_name_real_verbs_and_targets() -> None:
    lines = [line for page in PAGES for text in blocks(page, "bash") for line in text.splitlines()]
    assert lines
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in lines:
        words = line.partition("#")[0].split()
        if words[0] == "make":
            assert words[1] in targets
        elif words[0] != "torchrun":
            assert words[0] == "mpcompile"
            assert CliRunner().invoke(app, [words[1], "--help"]).exit_code == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_reference_is_fresh(tmp_path: Path) -> None:
    """In a process of its own: other tests register operations."""
    subprocess.run([sys.executable, "-m", "mpcompile.tools.reference", tmp_path], cwd=ROOT, check=True)
    for made in tmp_path.iterdir():
        kept = ROOT / "docs" / "reference" / made.name
        assert kept.read_text(encoding="utf-8") == made.read_text(encoding="utf-8"), f"{made.name} is stale: make docs"


def test_the_picture_is_what_its_code_draws() -> None:
    code = (ROOT / "docs/pictures/flow.py").read_text(encoding="utf-8")
    scope: dict[str, object] = {"__name__": "flow"}
    exec(compile(code, "flow.py", "exec"), scope)
    assert scope["draw"]() == (ROOT / "docs/pictures/flow.svg").read_text(encoding="utf-8")  # type: ignore[operator]


@pytest.mark.slow
def test_the_site_builds_and_has_every_page(tmp_path: Path) -> None:
    """Warnings (a link, a name that is not there) are errors."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    made = {page.relative_to(tmp_path).with_suffix(".md") for page in tmp_path.rglob("*.html")}
    assert {page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")} <= made
    assert "train_step" in (tmp_path / "reference" / "api.html").read_text(encoding="utf-8")
