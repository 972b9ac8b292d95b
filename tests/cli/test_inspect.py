"""`mpcompile inspect` by module, operation, cast and hazard, and what each pass changes."""

from __future__ import annotations

import importlib
import inspect as python_inspect
import json
import pkgutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mpcompile.graph import Node, PrecisionGraph, Value
from mpcompile.pipeline import run
from mpcompile.policy import Policy
from mpcompile.recipes import fx_passes
from mpcompile.report import views
from mpcompile.report.model import Report, build_report
from mpcompile.tools.inspect import ONLY, PASSES
from mpcompile.tools.main import app
from mpcompile.tools.target import study

MODEL = f"{Path(__file__).parent / 'model_under_test.py'}:make"


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def report() -> Any:
    return study(MODEL, "bf16").report


def test_modules_by_depth_with_repeated_blocks_once(report: Any) -> None:
    rows = views.by_module(report, 2)
    assert [("  " * row["depth"] + row["module"], row["times"], row["nodes"]) for row in rows] == [
        ("(model)", 1, 12),
        ("  table", 1, 1),
        ("  layers", 1, 6),
        ("    {0-1}", 2, 6),
        ("  head", 1, 1),
    ]
    assert rows[3]["modules"] == ["layers.0", "layers.1"]
    for name in ("bytes", "flops"):
        assert rows[0][name] == sum(getattr(row, name) for row in report.nodes)
    assert rows[0]["precision"] == dict(Counter(row.precision for row in report.nodes).most_common())
    assert [row["module"] for row in views.by_module(report, 0)] == ["(model)"]
    deepest = views.by_module(report, 9)
    assert [row["times"] for row in deepest if row["depth"] == 3] == [1, 1, 1]


def test_modules_are_sorted_level_by_level(report: Any) -> None:
    rows = views.by_module(report, 1, "bytes")
    assert [row["bytes"] for row in rows[1:]] == sorted((row["bytes"] for row in rows[1:]), reverse=True)
    assert [row["module"] for row in views.by_module(report, 1, "name")] == ["(model)", "head", "layers", "table"]


def test_operations_add_up(report: Any) -> None:
    rows = views.by_operation(report)
    assert sum(row["nodes"] for row in rows) == len(report.nodes)
    assert sum(row["bytes"] for row in rows) == sum(row.bytes for row in report.nodes)
    assert {row["op"]: row["precision"] for row in rows}["aten.linear.default"] == {"bf16": 3}
    counts = [row["nodes"] for row in rows]
    assert counts == sorted(counts, reverse=True)


def test_casts_are_the_reports_largest_first(report: Any) -> None:
    rows = views.casts(report)
    assert sorted(map(str, rows)) == sorted(str(cast.to_dict()) for cast in report.casts)
    assert [row["bytes"] for row in rows] == sorted((row["bytes"] for row in rows), reverse=True)
    assert {row["value"] for row in views.casts(report.filter("fp32"))} == {"embedding", "mul"}


def test_the_command_prints_the_views_asked_for() -> None:
    text = call(MODEL, "-p", "bf16", "--depth", "2", "--ops", "--casts", "--hazards").stdout
    assert "nodes: 83% bf16" in text
    assert "  2 x      {0-1}" in text
    assert "6 shadow (280 kB)" in text
    assert "2 inserted (1.31 MB)" in text
    assert text.endswith("hazards:\nnone\n")
    assert "verdict" not in text
    found = json.loads(call(MODEL, "-p", "bf16", "--depth", "1", "--casts", "--json").stdout)
    assert set(found) == {"modules", "casts"}
    assert len(found["casts"]) == 8


def hazardous() -> Report:
    """x * x with x beyond FP16: a hazard keeps the square FP32."""
    graph = PrecisionGraph()
    graph.add_input(Value("x", "fp32", (64, 1024), 65536))
    graph.add(Node("mul", "aten.mul.Tensor", ["x", "x"], module="norm"), [Value("mul", "fp32", (64, 1024), 65536)])
    graph.add(Node("mean", "aten.mean.dim", ["mul"], module="norm"), [Value("mean", "fp32", (64, 1), 64)])
    graph.outputs = ["mean"]
    policy = Policy("fp16")
    done, steps = run(graph, fx_passes(policy))
    return build_report(done, policy, "cpu", steps=steps)


def test_hazards_are_listed_with_their_numbers() -> None:
    found = hazardous()
    rows = views.hazards(found)
    assert [row["node"] for row in rows] == [row.id for row in found.nodes if row.decided_by == "hazard"]
    assert rows
    text = views.hazards_text(rows)
    for row in rows:
        assert row["reason"].split(":")[0][:20] in text
        assert any(character.isdigit() for character in row["reason"])


def test_sort_by_cost_and_name(report: Any) -> None:
    names = [row["id"] for row in json.loads(call(MODEL, "-p", "bf16", "--sort", "name", "--json").stdout)["nodes"]]
    assert names == sorted(names)
    from mpcompile.report.columns import node_seconds

    taken = node_seconds(report.sort("cost"))
    assert taken == sorted(taken, reverse=True)
    assert {row.id for row in report.sort("cost").nodes} == {row.id for row in report.nodes}


def test_print_changed_is_the_passes_own_story() -> None:
    changed = json.loads(call(MODEL, "-p", "bf16", "--print-changed", "--json").stdout)["changed"]
    diffs = {one["pass"]: one["diff"] for one in changed}
    assert "verify" not in diffs
    assert list(diffs) == [name for name in PASSES if name in diffs]
    added = [line for line in diffs["insert-casts"].splitlines() if line.startswith("+") and "mp.cast" in line]
    assert len(added) == 8
    assert "mp.cast" not in diffs["assign"]
    assert all(line[0] in "+-@ " for one in diffs.values() for line in one.splitlines())
    said = call(MODEL, "-p", "bf16", "--print-changed").stdout
    assert "+++ after insert-casts" in said
    assert "verify" in said.splitlines()[-1]


def test_help_names_every_pass_and_every_word() -> None:
    """PASSES is written down, since help must not wait for the passes: here it is compared with them."""
    from mpcompile import passes
    from mpcompile.report.model import _FILTERS

    names = {"verify"}
    for module in pkgutil.iter_modules(passes.__path__):
        for _, kind in python_inspect.getmembers(importlib.import_module(f"mpcompile.passes.{module.name}")):
            if python_inspect.isclass(kind) and callable(getattr(kind, "apply", None)) and "name" in vars(kind):
                names.add(kind.name)
    assert set(PASSES) == names
    assert set(ONLY) == set(_FILTERS)
    text = "".join(call("--help").stdout.split())
    assert [name for name in (*PASSES, *ONLY) if name not in text] == []


def test_words_that_nothing_knows_are_refused_before_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from mpcompile.tools.main import app\n"
        "for words in (['--after', 'asign'], ['--phase', 'bakward'], ['--sort', 'byte'], ['--depth', '-1']):\n"
        "    done = CliRunner().invoke(app, ['inspect', 'json:make', *words]); print(done.exit_code, done.stderr)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ") >= 4
    for near in ("'assign'", "'backward'", "'bytes'"):
        assert near in done.stdout


def test_a_shell_completes_the_words() -> None:
    import typer

    command: Any = typer.main.get_command(app)
    inspect = command.commands["inspect"]
    option = next(one for one in inspect.params if one.name == "after")
    with inspect.make_context("inspect", [MODEL]) as context:
        assert [item.value for item in option.shell_complete(context, "as")] == ["assign"]


STEP = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)
    def forward(self, x):
        return self.a(x).square().mean()

def make():
    return Net(), (torch.ones(8, 16),)

def lossless():
    return nn.Linear(16, 16), (torch.ones(8, 16),)
"""


def test_phases_of_a_training_step(tmp_path: Path) -> None:
    (tmp_path / "step_to_inspect.py").write_text(STEP)
    target = f"{tmp_path / 'step_to_inspect.py'}"
    policy = ("-p", "bf16", "--low", "a", "--json")
    for phase in ("backward", "optimizer"):
        rows = json.loads(call(f"{target}:make", *policy, "--phase", phase).stdout)["nodes"]
        assert rows
        assert {row["phase"] for row in rows} == {phase}
        assert ("bf16" in {row["precision"] for row in rows}) == (phase == "backward")
    forward = json.loads(call(f"{target}:make", *policy, "--phase", "forward").stdout)["nodes"]
    assert {"linear", "mean"} <= {row["id"] for row in forward}
    refused = call(f"{target}:lossless", "-p", "bf16", "--phase", "backward", code=2).stderr
    assert refused.startswith("MP5")
    (tmp_path / "net.onnx").write_bytes(b"")
    assert "forward alone" in call(f"{tmp_path / 'net.onnx'}", "--phase", "backward", code=2).stderr
