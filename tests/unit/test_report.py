"""The report: one set of rows, and views that say the same."""

from __future__ import annotations

import json
from importlib import resources

import jsonschema
import pytest

from mpcompile.errors import UsageError
from mpcompile.graph import Node, PrecisionGraph, Value
from mpcompile.pipeline import run
from mpcompile.policy import Policy
from mpcompile.recipes import fx_passes
from mpcompile.report.costs import Estimate
from mpcompile.report.model import Report, build_report
from mpcompile.report.summary import summary_line
from mpcompile.tools.explain import _node_text, node_facts

BLOCKS = 3


def stack() -> PrecisionGraph:
    """`BLOCKS` blocks of linear, gelu and layer norm, and a user's cast at the end."""
    graph = PrecisionGraph(header={"source": "fx"})
    graph.add_input(Value("x", "fp32", (512, 512), 512 * 512))
    last = "x"
    for i in range(BLOCKS):
        weight = graph.add_input(Value(f"h.{i}.w", "fp32", (512, 512), 512 * 512, role="parameter"))
        norm = graph.add_input(Value(f"h.{i}.n", "fp32", (512,), 512, role="parameter"))
        steps = [("linear", "aten.linear.default", [last, weight.name], f"h.{i}.fc"),
                 ("gelu", "aten.gelu.default", [f"linear{i}"], f"h.{i}"),
                 ("norm", "aten.layer_norm.default", [f"gelu{i}", norm.name], f"h.{i}.ln")]  # fmt: skip
        for stem, op, inputs, module in steps:
            last = f"{stem}{i}"
            slots = [0, 2] if stem == "norm" else []
            flops = 2 * 512**3 if stem == "linear" else 0
            node = Node(last, op, inputs, slots=slots, module=module, source=f"model.py:{10 + i}", flops=flops)
            graph.add(node, [Value(last, "fp32", (512, 512), 512 * 512)])
    graph.add(Node("mystery", "mylib.mystery.default", [last]), [Value("mystery", "fp32", (512, 512), 512 * 512)])
    graph.outputs = ["mystery"]
    return graph


@pytest.fixture(scope="module")
def report() -> Report:
    policy, before = Policy("bf16"), stack()
    after, steps = run(before, fx_passes(policy))
    return build_report(after, policy, "cpu", steps=steps, before=before)


def schema() -> object:
    return json.loads(resources.files("mpcompile.report").joinpath("schema.json").read_text())


def test_fits_its_schema(report: Report) -> None:
    jsonschema.Draft202012Validator(schema()).validate(report.to_dict())
    assert json.loads(report.to_json()) == report.to_dict()


BREAKS = [
    lambda d: d["nodes"][0].pop("reason"),
    lambda d: d["nodes"][0].update(verdict="maybe"),
    lambda d: d["summary"].pop("cost"),
    lambda d: d.update(extra=1),
]


@pytest.mark.parametrize("break_it", BREAKS)
def test_schema_refuses_what_is_missing_or_unknown(report: Report, break_it) -> None:
    data = json.loads(report.to_json())
    break_it(data)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(data)


def test_every_field_is_filled(report: Report) -> None:
    rows = {row.id: row for row in report.nodes}
    linear = rows["linear1"]
    assert (linear.kind, linear.verdict, linear.precision, linear.was) == ("matmul", "low", "bf16", "fp32")
    assert (linear.module, linear.source) == ("h.1.fc", "model.py:11")
    assert linear.flops == 2 * 512**3
    assert linear.bytes == 512 * 512 * 2
    assert all(row.reason for row in report.nodes)
    shadows = [cast for cast in report.casts if cast.origin == "shadow"]
    assert {cast.value for cast in shadows} == {f"h.{i}.w" for i in range(BLOCKS)}
    assert shadows[0].readers == ("linear0",)
    assert shadows[0].bytes == 512 * 512 * 2


def test_summary_counts_the_rows(report: Report) -> None:
    summary = report.summary
    assert sum(summary["nodes"].values()) == sum(summary["precision"].values()) == len(report.nodes) == 3 * BLOCKS + 1
    assert summary["casts"] == len(report.casts)
    assert summary["unknown_ops"] == ["mylib.mystery.default"]
    assert 0 < summary["cost"]["plan"] < summary["cost"]["fp32"]


def test_a_report_leaves_its_graph_alone() -> None:
    graph, _ = run(stack(), fx_passes(Policy("bf16")))
    before = {value.name: value.dtype for value in graph.values.values()}
    build_report(graph, Policy("bf16"), "cpu")
    assert {value.name: value.dtype for value in graph.values.values()} == before
    assert graph.casts()


def test_table_folds_equal_blocks(report: Report) -> None:
    text = str(report)
    assert "h.{0-2}.fc ×3" in text
    assert text.count("gelu") == str(report.filter(where=lambda row: row.id == "gelu0")).count("gelu")
    assert "\x1b" not in text
    assert "1 fp32" in text.splitlines()[-2]


def test_table_tells_the_phases_apart() -> None:
    graph = stack()
    for name in ("gelu1", "norm1"):
        graph.nodes[name].phase = "backward"
    text = str(build_report(graph, Policy("bf16"), "cpu"))
    assert "backward: h.1.ln" in text
    assert "estimated step: " in text


def test_filter_and_sort(report: Report) -> None:
    assert [row.id for row in report.filter(only="fp32").nodes] == ["mystery"]
    assert {row.id for row in report.filter(only=["low", "unknown"]).nodes} == {
        "linear0",
        "linear1",
        "linear2",
        "mystery",
    }
    assert report.filter(only="fp32").summary == report.summary
    assert report.sort("flops").nodes[0].flops >= report.sort("flops").nodes[-1].flops
    with pytest.raises(UsageError, match="'fp32'"):
        report.filter(only="fp23")
    with pytest.raises(UsageError, match="'bytes'"):
        report.sort("byte")


def test_html_escapes_names() -> None:
    graph = stack()
    graph.nodes["gelu0"].module = "<script>alert(1)</script>"
    graph.nodes["gelu0"].reason = "a < b"
    made = build_report(graph, Policy("fp32"), "cpu")
    assert "<script>" not in made._repr_html_()


def test_dot_names_every_node_and_cast(report: Report) -> None:
    text = report.to_dot()
    assert all(f'"{name}" [' in text for name in report.graph.nodes)
    assert '"linear0" -> "gelu0"' in text
    assert text.count("{") == text.count("}") == 1


def test_a_half_built_graph_prints() -> None:
    graph = PrecisionGraph()
    graph.add_input(Value("x", "fp32", (2,), 2))
    graph.add(Node("a", "aten.gelu.default", ["x"]), [Value("a", "fp32", (2,), 2)])
    made = build_report(graph, Policy("bf16"), "cpu")
    assert "gelu" in str(made)
    assert made.nodes[0].precision == "keep"


def test_summary_line_says_what_the_report_says(report: Report) -> None:
    line = summary_line(report.graph, Policy("bf16"), 0.25)
    assert f"{len(report.nodes)} nodes" in line
    assert f"{len(report.casts)} casts" in line
    assert "no rule for mylib.mystery.default" in line
    assert "0.250 s" in line


def test_the_price_of_a_choice_is_that_of_the_whole_plan(report: Report) -> None:
    estimate = Estimate(report.graph, Policy.parse(report.policy), report.device)
    now = estimate.to_dict()["plan"]
    for node in [n for n in report.graph if n.precision in ("bf16", "fp32") and not n.is_cast]:
        other = "fp32" if node.precision == "bf16" else "bf16"
        assert estimate.with_node(node.id, node.precision) == now
        if node.verdict != "fp32":
            assert estimate.with_node(node.id, other) >= now, "the plan is the cheapest that the verdicts allow"


def test_integers_are_one_line() -> None:
    graph = PrecisionGraph(header={"source": "fx"})
    last = graph.add_input(Value("i", "int64", (4,), 4)).name
    for number in range(6):
        graph.add(Node(f"n{number}", "aten.add.Tensor", [last]), [Value(f"n{number}", "int64", (4,), 4)])
        last = f"n{number}"
    text = str(build_report(graph, Policy("bf16"), "cpu"))
    assert "n0 ×6" in text, "a report of nothing else shows them"
    graph.add_input(Value("x", "fp32", (4,), 4))
    graph.add(Node("exp", "aten.exp.default", ["x"], precision="fp32", reason="r"), [Value("exp", "fp32", (4,), 4)])
    text = str(build_report(graph, Policy("bf16"), "cpu"))
    assert "6 nodes" in text
    assert "n0" not in text


def test_a_report_of_fp8_says_of_each_operand_how_it_is_read_and_why() -> None:
    graph = PrecisionGraph()
    graph.add_input(Value("x", "bf16", (8192, 4096), 8192 * 4096))
    for number in range(3):
        graph.add_input(Value(f"w{number}", "fp32", (4096, 4096), 4096 * 4096, role="parameter"))
        given = "x" if number == 0 else f"fc{number - 1}"
        node = Node(
            f"fc{number}",
            "aten.linear.default",
            [given, f"w{number}"],
            module=f"blocks.{number}",
            flops=2 * 8192 * 4096**2,
        )
        graph.add(node, [Value(f"fc{number}", "fp32", (8192, 4096), 8192 * 4096)])
    graph.outputs = ["fc2"]
    for name, device in (("fp8", "h200"), ("fp8", "a100"), ("bf16", "h200")):
        policy = Policy.parse(name)
        plan, steps = run(graph, fx_passes(policy, device))
        report = build_report(plan, policy, device, steps=steps)
        found = report.to_dict()
        jsonschema.validate(
            found, json.loads(resources.files("mpcompile.report").joinpath("schema.json").read_text("utf-8"))
        )
        first, middle, _ = found["nodes"]
        assert middle["precision"] == "bf16"
        if name == "bf16":
            assert "operands" not in middle
            continue
        assert len(middle["operands"]) == len(first["operands"]) == 6
        wanted = {"bf16"} if device == "a100" else {"float8_e4m3fn", "float8_e5m2"}
        assert {one["format"] for one in middle["operands"]} == wanted
        assert {one["reason"] for one in first["operands"]} == {"in the first block"}
        assert {one["value"] for one in middle["operands"]} == {"fc0", "w1", "fc1"}
        assert all(one["scale"] == ("" if device == "a100" else "tensorwise") for one in middle["operands"])
        if device == "a100":
            assert "the device a100 has no FP8 products" in {one["reason"] for one in middle["operands"]}
        text = _node_text(node_facts(report, plan.nodes["fc1"]))
        assert "grad_weight: gradient as" in text
        assert found["summary"]["cost"]["plan"] < found["summary"]["cost"]["fp32"]
