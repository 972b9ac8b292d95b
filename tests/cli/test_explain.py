"""`mpcompile explain`: modules in sums, neighbours in words, and how to change a decision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mpcompile.report.modules import inside, module_facts, module_paths
from mpcompile.report.neighbours import gives_of, reads_of
from mpcompile.tools.main import app
from mpcompile.tools.target import study

MODEL = f"{Path(__file__).parent / 'model_under_test.py'}:make"


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["explain", *arguments, "-p", "bf16"])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def report() -> Any:
    return study(MODEL, "bf16").report


@pytest.fixture(scope="module")
def mixed() -> Any:
    return study(MODEL, "bf16", keep_fp32=["gelu"]).report


def test_a_module_sums_up_its_nodes(report: Any) -> None:
    rows = [row for row in report.nodes if row.module.startswith("layers.1")]
    facts = json.loads(call(MODEL, "layers.1", "--json").stdout)
    assert facts["modules"] == ["layers.1"]
    assert facts["nodes"] == len(rows) == 3
    assert facts["precisions"]["bf16"]["bytes"] == sum(row.bytes for row in rows)
    assert facts["precisions"]["bf16"]["flops"] == sum(row.flops for row in rows)
    assert {one["reason"] for one in facts["why"]} == {row.reason for row in rows}
    weights = [cast for cast in report.casts if cast.value.startswith("layers.1.")]
    assert [cast["bytes"] for cast in facts["casts"]["weights"]] == [cast.bytes for cast in weights]
    assert facts["casts"]["in"] == facts["casts"]["out"] == facts["casts"]["inside"] == []
    assert facts["cost"]["bf16"] == pytest.approx(facts["cost"]["plan"])
    assert facts["cost"]["fp32"] > facts["cost"]["plan"]


def test_casts_at_the_border_of_a_module(mixed: Any) -> None:
    sides = {
        name: {side: [cast["value"] for cast in casts] for side, casts in module_facts(mixed, name)["casts"].items()}
        for name in ("table", "layers.0", "layers.1")
    }
    weights = {f"layers.{at}": [f"layers.{at}.1.weight", f"layers.{at}.1.bias"] for at in (0, 1)}
    assert sides == {
        "table": {"in": [], "out": ["embedding"], "inside": [], "weights": []},
        "layers.0": {"in": ["embedding"], "out": [], "inside": ["linear"], "weights": weights["layers.0"]},
        "layers.1": {"in": [], "out": ["gelu_1"], "inside": ["layer_norm_1"], "weights": weights["layers.1"]},
    }
    cost = module_facts(mixed, "layers.1")["cost"]
    assert cost["plan"] == mixed.summary["cost"]["plan"]
    assert cost["bf16"] < cost["plan"] < cost["fp32"]


@pytest.mark.parametrize(
    ("pattern", "path", "is_in"),
    [
        ("layers.1", "layers.1", True),
        ("layers.1", "layers.10", False),
        ("layers.1", "layers.1.0", True),
        ("layers.{0-1}", "layers.1.2", True),
        ("layers.{0-1}", "layers.2", False),
        ("layers.{0,2}.fc", "layers.2.fc", True),
        ("layers.{0,2-4}.fc", "layers.3.fc", True),
        ("layers.{0,2}.fc", "layers.1.fc", False),
        ("layers.{0-999999999999}", "layers.5", True),
        ("layers.{3-1}", "layers.2", False),
        ("layers.{x", "layers.1", False),
        ("layers.*.fc", "layers.1.fc", True),
        ("a+b", "a+b.c", True),
        ("a+b", "aab", False),
    ],
)
def test_paths_and_patterns(pattern: str, path: str, is_in: bool) -> None:
    assert inside(pattern)(path) is is_in


def test_folded_paths_of_the_table_name_all_their_modules(report: Any) -> None:
    facts = module_facts(report, "layers.{0-1}")
    assert facts["modules"] == ["layers.0", "layers.1"]
    assert facts["nodes"] == 6
    assert module_paths(report) == [
        "table", "layers", "layers.0", "layers.0.0", "layers.0.1", "layers.0.2",
        "layers.1", "layers.1.0", "layers.1.1", "layers.1.2", "head",
    ]  # fmt: skip


def test_near_names_are_modules_too() -> None:
    refused = call(MODEL, "lyers.1", code=2).stderr
    assert refused.startswith("MP806")
    assert "'layers.1'" in refused


def test_what_to_write_is_taken() -> None:
    """The line "to change it" of a module, followed, changes all of its nodes."""
    said = call(MODEL, "layers.{0-1}").stdout
    (line,) = (line for line in said.splitlines() if "to change it" in line)
    options = line.partition("to change it: ")[2].partition(", or ")[0].replace("'", "").split()
    facts = json.loads(call(MODEL, "layers.{0-1}", "--json", *options).stdout)
    assert set(facts["precisions"]) == {"fp32"}
    assert "take out the override" in call(MODEL, "linear", *options).stdout


def test_neighbours_in_words(report: Any) -> None:
    graph = report.graph
    (read,) = reads_of(graph, graph.nodes["exp"])
    lost = "rounded: it carries roundings of the low type already"
    assert read["says"] == f"`mul` as FP32 through a cast of 262 kB (it is BF16); {lost}"
    assert read["origin"] == "rounded"
    assert (read["stored"], read["dtype"], read["cast"]["bytes"]) == ("bf16", "fp32", 262_144)
    weight = reads_of(graph, graph.nodes["linear"])[1]
    assert "the parameter `layers.0.1.weight` as BF16 through a shadow" in weight["says"]
    (given,) = gives_of(graph, graph.nodes["embedding"])
    said, lost = given["says"].split("; ")
    assert said == "`embedding` as FP32 (2.1 MB) to `layer_norm`, `add` as BF16 through a cast of 1.05 MB"
    assert lost == "row: looked up in a weight by an index"
    assert gives_of(graph, graph.nodes["exp"])[0]["readers"] == ["(output)"]


def test_every_read_and_cast_is_said(report: Any) -> None:
    """Each cast of the report stands at its value's maker and at each of its readers."""
    graph = report.graph
    read = {
        (one["value"], node.id) for node in graph if not node.is_cast for one in reads_of(graph, node) if one["cast"]
    }
    assert read == {(cast.value, reader) for cast in report.casts for reader in cast.readers}


def test_a_node_by_its_value_and_a_module_of_the_same_name(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "x"], ["h"], "l"),
        onnx.helper.make_node("Relu", ["h"], ["y"], "/l/Relu"),
    ]
    ports = [onnx.helper.make_tensor_value_info(name, 1, [64, 64]) for name in ("x", "y")]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "net", ports[:1], ports[1:])), tmp_path / "net.onnx")
    target = str(tmp_path / "net.onnx")
    by_value, by_name = call(target, "h").stdout, call(target, "l").stdout
    assert by_value == by_name
    assert by_name.startswith("l = onnx::MatMul")
    assert by_name.splitlines()[-1].endswith("explain TARGET l.")
    assert call(target, "l.").stdout.startswith("module l: 1 node\n")
