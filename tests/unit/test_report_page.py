"""The HTML page without a browser: one file, nothing loaded, hostile names harmless, the numbers those of the report."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_report import HOSTILE, hostile, stacked

from mpcompile import mpcompile
from mpcompile.aten.facts import code_lines
from mpcompile.report.columns import node_seconds, page_data
from mpcompile.report.costs import Estimate
from mpcompile.report.difference import difference, difference_page
from mpcompile.report.headline import headline
from mpcompile.report.html import render
from mpcompile.report.model import Report
from mpcompile.text import print_graph

ROOT = Path(__file__).parents[2]
THIRD_PARTY = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
BLOCKS = 5


@pytest.fixture(scope="module")
def report() -> Report:
    return stacked(BLOCKS)


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return render(report)


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attrs = self.tags[-1] if self.tags else ("", {})
        if tag in ("script", "style") and data.strip():
            self.inside += [] if "type" in attrs else [(tag, data)]  # with a type it is data, which is not run
        else:
            self.words += data


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def column(data: dict[str, Any], name: str) -> list[Any]:
    found = data["nodes"][name]
    return found if isinstance(found, list) else [found["words"][at] for at in found["at"]]


def test_nothing_is_loaded_from_anywhere(text: str) -> None:
    page = Page(text)
    loads = [a[name] for _, a in page.tags for name in ("src", "href", "data", "action", "srcset") if a.get(name)]
    assert [one for one in loads if not one.startswith("#")] == []
    assert not re.search(r"@import|url\((?!#)", "".join(data for kind, data in page.inside if kind == "style"))
    assert "sourceMappingURL=" not in text


def test_the_policy_lets_only_what_is_in_the_page_run(text: str) -> None:
    page = Page(text)
    assert len(page.inside) == 5
    rules = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert rules.startswith("default-src 'none'")
    assert "unsafe" not in rules
    for kind, data in page.inside:
        assert base64.b64encode(hashlib.sha256(data.encode()).digest()).decode() in rules, kind
    # What the policy forbids in attributes is not there either.
    assert [a for _, a in page.tags if "style" in a or any(name.startswith("on") for name in a)] == []


def test_the_columns_hold_the_report(report: Report, text: str) -> None:
    data = embedded(text)
    for name in ("id", "op", "phase", "verdict", "precision", "reason", "decided_by", "module", "source", "was",
                 "bytes", "flops"):  # fmt: skip
        assert column(data, name) == [getattr(row, name) for row in report.nodes], name
    assert data["casts"]["value"] == [cast.value for cast in report.casts]
    assert data["casts"]["readers"] == [list(cast.readers) for cast in report.casts]


def test_links_lead_through_casts_to_where_values_come_from(report: Report) -> None:
    data = page_data(report, node_seconds(report))
    rows, values = {row.id: at for at, row in enumerate(report.nodes)}, data["values"]
    reads = [values["reads"][i : i + 3] for i in range(0, len(values["reads"]), 3)]
    of_norm = [read for read in reads if read[0] == rows["norm0"]]
    makers = {values["maker"][value] for _, value, _ in of_norm}
    assert rows["gelu0"] in makers
    cast = next(cast for node, value, cast in reads if node == rows["linear0"] and values["name"][value] == "h.0.w")
    assert report.casts[cast].value == "h.0.w"
    assert report.casts[cast].to == "bf16"
    assert all(cast < len(report.casts) for _, _, cast in reads)
    assert len(values["returned"]) == len(report.graph.outputs)


def test_repeated_blocks_stand_once_and_nothing_is_lost(report: Report) -> None:
    seconds = node_seconds(report)
    data = page_data(report, seconds)
    name, _, sums, below = data["tree"]
    assert name == "(model)"
    assert sum(one[0] for one in sums.values()) == len(report.nodes)
    assert sum(one[1] for one in sums.values()) == sum(row.bytes for row in report.nodes)
    layers = next(one for one in below if one[0] == "h")
    assert [one[0] for one in layers[3]] == [f"{{0-{BLOCKS - 1}}}"]
    modules = data["nodes"]["module"]["words"]
    held = {modules[at] for branch in walk(data["tree"]) for at in branch[1]}
    assert held == set(modules)
    assert {modules[at] for at in layers[3][0][3][0][1]} == {f"h.{i}.fc" for i in range(BLOCKS)}


def walk(branch: list[Any]) -> list[Any]:
    return [branch, *(one for below in branch[3] for one in walk(below))]


def test_blocks_that_are_decided_otherwise_stand_apart() -> None:
    odd = stacked(BLOCKS, keep_fp32=["linear2"])
    tree = page_data(odd, node_seconds(odd))["tree"]
    layers = next(one for one in tree[3] if one[0] == "h")
    assert [one[0] for one in layers[3]] == ["{0,1,3,4}", "2"]


def test_the_headline_says_what_is_fp32_and_why(report: Report) -> None:
    seconds = node_seconds(report)
    head = headline(report, seconds)
    assert [share.name for share in head.shares] == ["nodes", "FLOPs", "bytes", "time"]
    assert head.shares[0].amounts == {k: float(v) for k, v in report.summary["precision"].items()}
    assert head.shares[3].total == pytest.approx(sum(seconds))
    fp32 = sum(row.precision == "fp32" for row in report.nodes)
    assert sum(one.nodes for one in head.why) + head.more == fp32 > 0
    assert head.unknown_ops == ("mylib.mystery.default",)
    assert head.low[0] == "bf16"
    assert head.low[1] > 0.9


def test_reasons_that_differ_in_names_and_sizes_are_one() -> None:
    made = stacked(3)
    says = [
        "gradient of linear_16: FP32 accumulation; 1,024 bytes.",
        "gradient of linear_2: FP32 accumulation; 8 bytes.",
    ]
    rows = [replace(row, precision="fp32", reason=says[at % 2]) for at, row in enumerate(made.nodes)]
    head = headline(replace(made, nodes=tuple(rows)), [0.0] * len(rows))
    assert [one.text for one in head.why] == ["gradient of …: FP32 accumulation; … bytes."]
    assert head.why[0].reasons == tuple(says)


def test_the_costs_add_up(report: Report, text: str) -> None:
    estimate = Estimate.of(report)
    parts = estimate.breakdown()
    for name, total in estimate.to_dict().items():
        assert parts[name]["total"] == pytest.approx(total)
        assert parts[name]["work"] + parts[name]["moved"] + parts[name]["casts"] == pytest.approx(total)
    assert parts["fp32"]["casts"] == 0
    assert parts["fp32"]["kept"] > parts["plan"]["kept"] > 0
    # What a node takes is its part of work and bytes: nothing is counted twice.
    assert sum(node_seconds(report)) == pytest.approx(parts["plan"]["work"] + parts["plan"]["moved"])
    assert "kept for the backward" in Page(text).words


def unpacked(text: str) -> dict[str, Any]:
    found = re.search(r'<script id="pass-texts" type="application/octet-stream">(.*?)</script>', text, re.S)
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_the_texts_before_and_after_each_pass_are_those_of_the_passes(report: Report, text: str) -> None:
    texts, history = unpacked(text), report.history
    assert history is not None
    whole = [print_graph(history.graph)]
    history.replay(lambda graph, _: whole.append(print_graph(graph)))
    assert len(texts["after"]) == len(report.steps) + 1 == len(whole)
    last: list[str] = []
    for stage, printed in zip(texts["after"], whole, strict=True):
        last = last if stage is None else [texts["lines"][line] for line in stage[1::2]]
        assert last == printed.splitlines()
        if stage is not None:
            assert len(set(stage[::2])) == len(stage) // 2  # a key is of one line


def test_every_report_of_one_graph_has_its_history(report: Report) -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU())
    example = torch.randn(4, 16)
    made = mpcompile(linear, "bf16", backend="eager")
    assert unpacked(render(made.report(example)))["after"][0]
    step = made.train_step(torch.optim.SGD(linear.parameters(), lr=0.1), lambda model, x: model(x).square().mean())
    step(example)
    assert len(unpacked(render(step.report()))["after"]) == len(step.report().steps) + 1


class Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x) * self.scale  # the line that the page shows


def test_the_users_line_of_code_stands_beside_its_place() -> None:
    made = mpcompile(Twice(), "bf16", backend="eager").report(torch.randn(4))
    data = embedded(render(made))
    code = dict(zip(data["nodes"]["source"]["words"], data["code"], strict=True))
    exp = next(row for row in made.nodes if "exp" in row.op)
    assert code[exp.source].startswith("return torch.exp(x) * self.scale")


def test_code_of_two_files_of_one_name_is_not_mixed_up() -> None:
    graph = torch.fx.Graph()
    for folder, code in (("a", "x + 1"), ("b", "x - 1")):
        graph.placeholder(folder).meta["stack_trace"] = f'File "/{folder}/model.py", line 3, in forward\n    {code}\n'
    graph.placeholder("c").meta["stack_trace"] = 'File "/a/model.py", line 4, in forward\n    x * 2\n'
    assert code_lines(graph) == {"model.py:4": "x * 2"}


def test_a_difference_names_every_node_that_differs() -> None:
    one, other = stacked(3).to_dict(), stacked(4, keep_fp32=["linear1"]).to_dict()
    found = difference(one, other)
    data = embedded(difference_page(one, other, ("one.json", "other.json")))
    rows = {name: field if isinstance(field, list) else [field["words"][at] for at in field["at"]]
            for name, field in data["rows"].items()}  # fmt: skip
    by = dict(zip(rows["id"], zip(rows["how"], rows["precision_a"], rows["precision_b"], strict=True), strict=True))
    assert set(by) == {*(row["id"] for row in found["changed"]), *found["only_a"], *found["only_b"]}
    assert by["linear1"] == ("other precision", "bf16", "fp32")
    assert by["linear3"] == ("only in b", "", "bf16")
    assert {column["field"] for column in data["columns"]} <= set(rows)


def test_the_page_of_equal_plans_says_so() -> None:
    same = stacked(2).to_dict()
    page = Page(difference_page(same, same))
    assert "The plans are the same" in page.words
    assert [a for tag, a in page.tags if a.get("src")] == []


def test_products_that_read_fp8_are_told() -> None:
    made = stacked(2)
    made.graph.nodes["linear1"].fp8 = {"output": "1.4 times as fast"}
    at = [row.id for row in made.nodes].index("linear1")
    assert embedded(render(made))["fp8"] == {str(at): {"output": "1.4 times as fast"}}


def test_without_javascript_the_headline_the_costs_and_the_passes_are_there(report: Report, text: str) -> None:
    words = Page(text).words
    assert "need JavaScript" in words
    assert all(step.name in words for step in report.steps)
    assert report.policy in words


def test_hostile_names_stay_text() -> None:
    bad = hostile()
    text = render(bad)
    page = Page(text)
    assert HOSTILE in column(embedded(text), "module")
    assert [tag for tag, _ in page.tags if tag in ("img", "iframe", "b-hostile")] == []
    assert text.count("<script") == text.count("</script")  # no name closes a script
    assert "b-hostile" not in "".join(tag for tag, _ in Page(bad._repr_html_()).tags)


def test_the_same_report_gives_the_same_bytes(report: Report, text: str) -> None:
    assert render(report) == text


def test_a_report_of_nothing_and_a_report_without_its_graph_render() -> None:
    whole = stacked(1)
    for bare in (Report("fx", whole.policy, "cpu", (), (), whole.summary),
                 Report("fx", whole.policy, "cpu", whole.nodes, whole.casts, whole.summary)):  # fmt: skip
        assert column(embedded(render(bare)), "id") == [row.id for row in bare.nodes]


def test_what_the_page_carries_of_others_is_unchanged_and_licensed() -> None:
    vendor = ROOT / "mpcompile" / "report" / "vendor"
    sums = dict(reversed(line.split("  ")) for line in re.findall(r"^[0-9a-f]{64}  \S+$", THIRD_PARTY, re.M))
    files = [path for path in vendor.iterdir() if path.suffix in (".js", ".css")]
    held = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert held == sums
    for library in ("tabulator", "dagre"):
        assert "Permission is hereby granted" in (vendor / f"{library}.LICENSE.txt").read_text(encoding="utf-8")
        assert f"{library}.LICENSE.txt" in THIRD_PARTY
