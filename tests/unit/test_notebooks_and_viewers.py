"""What notebooks show, and what other viewers read: DOT, Model Explorer, Netron."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from synthetic_report import graph_of, hostile, stacked

from mpcompile import mpcompile
from mpcompile.graph import Node, PrecisionGraph
from mpcompile.report.html import fragment


class Cell(HTMLParser):
    """Tags, attributes and words of what a notebook is given."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words, self.open = "", 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


def onnx_model() -> onnx.ModelProto:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [256, 256], torch.randn(256, 256).flatten().tolist())
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Relu", ["h"], ["y"], name="relu"),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [256, 256])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [256, 256])
    graph = helper.make_graph(nodes, "model", [given], [made], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def converted() -> Any:
    return mpcompile(onnx_model(), "fp16")


def shown(converted: Any) -> dict[str, str]:
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU())
    plan = mpcompile(net, "bf16", backend="eager").plan(torch.randn(4, 16))
    return {"report": stacked(3)._repr_html_(), "graph": graph_of(2)._repr_html_(), "plan": plan._repr_html_(),
            "onnx": converted._repr_html_()}  # fmt: skip


def test_notebooks_show_report_graph_plan_and_onnx(converted: Any) -> None:
    for name, text in shown(converted).items():
        cell = Cell(text)
        assert "script" not in cell.tags, name
        assert not [one for one in cell.attributes if one[0].startswith("on") or one[0] in ("src", "href")], name
        assert "nodes" in cell.words, name
    assert "linear" in Cell(shown(converted)["plan"]).words
    assert "MatMul" in Cell(shown(converted)["onnx"]).words


def test_a_cell_folds_repeated_blocks_and_stays_small() -> None:
    cell = Cell(stacked(200)._repr_html_())
    assert "× 200" in cell.words
    assert cell.tags.count("details") < 10
    uneven = stacked(200, keep_fp32=[f"linear{i}" for i in range(0, 200, 3)])
    assert len(uneven._repr_html_()) < 400_000


def test_a_cells_styles_touch_nothing_else() -> None:
    style = re.search(r"<style>(.*?)</style>", stacked(1)._repr_html_(), re.S)
    assert style
    rules = re.sub(r"@media[^{]*\{(.*?\})\s*\}", r"\1", style[1])
    for selectors in re.findall(r"([^{}]+)\{", rules):
        assert all(one.strip().startswith(".mpcompile") for one in selectors.split(",")), selectors


def test_hostile_names_are_text_in_notebooks() -> None:
    bad = hostile()
    for text in (bad._repr_html_(), bad.graph._repr_html_(), fragment(bad, ["<img src=x onerror=alert(1)>"])):
        assert {"script", "img", "b-hostile"}.isdisjoint(Cell(text).tags)


def test_a_half_built_graph_shows() -> None:
    graph = PrecisionGraph()
    graph.add(Node("a", "aten.gelu.default", ["missing"], ["lost"]))
    assert "lost: ?" in Cell(graph._repr_html_()).words


# A node data file as Model Explorer's own types describe it (NodeDataProviderData in its visualizer's common types).
NODE_DATA = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {
        "type": "object",
        "required": ["results"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string"},
            "results": {
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "required": ["value"],
                    "additionalProperties": False,
                    "properties": {
                        "value": {"type": ["string", "number"]},
                        "bgColor": {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
                        "textColor": {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
                    },
                },
            },
            "thresholds": {"type": "array"},
            "gradient": {"type": "array"},
            "hideInAggregatedStatsTable": {"type": "boolean"},
            "hideInChildrenStatsTable": {"type": "boolean"},
            "hideAggregatedStats": {"type": "array", "items": {"enum": ["min", "max", "sum", "avg"]}},
            "showExpandedSummaryOnGroupNode": {"type": "boolean"},
            "showLabelCountColumnsInChildrenStatsTable": {"type": "boolean"},
        },
    },
}


def test_model_explorer_reads_each_nodes_precision(tmp_path: Path, converted: Any) -> None:
    for name, report in (("fx", stacked(2)), ("onnx", converted.report())):
        report.to_model_explorer(tmp_path / name)
        data = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator(NODE_DATA).validate(data)
        results = data["graph"]["results"]
        assert [one["value"] for one in results.values()] == [row.precision for row in report.nodes]
    assert set(results) == {"h", "y"}  # by the tensors that nodes give
    converted.report().to_model_explorer(tmp_path / "named", graph="model")
    assert list(json.loads((tmp_path / "named").read_text(encoding="utf-8"))) == ["model"]


def test_model_explorer_finds_the_nodes_of_an_exported_program(tmp_path: Path) -> None:
    """Its adapter names nodes as the exported program does."""
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU())
    example = torch.randn(4, 16)
    mpcompile(net, "bf16", backend="eager").report(example).to_model_explorer(tmp_path / "data")
    keys = set(json.loads((tmp_path / "data").read_text(encoding="utf-8"))["graph"]["results"])
    names = {node.name for node in torch.export.export(net, (example,)).graph.nodes if node.op == "call_function"}
    assert keys == names


def test_netron_shows_the_decisions(converted: Any) -> None:
    """Netron prints a node's metadata_props."""
    told = {node.name: {one.key: one.value for one in node.metadata_props} for node in converted.model.graph.node}
    assert told["product"]["mpcompile.verdict"] == "low"
    assert told["product"]["mpcompile.precision"] == "fp16"
    assert told["product"]["mpcompile.reason"]


def test_dot_is_one_digraph_whatever_the_names() -> None:
    text = hostile().to_dot()
    assert text.startswith("digraph")
    for line in text.split("\n")[1:-2]:
        assert len(re.findall(r'(?<!\\)(?:\\\\)*"', line)) % 2 == 0, line
