"""The command line: what it prints, in text and in JSON, and how it refuses."""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from mpcompile import __version__
from mpcompile.tools.main import app

HERE = Path(__file__).parent
MODEL = f"{HERE / 'model_under_test.py'}:make"
VERBS = (
    "demo",
    "inspect",
    "explain",
    "compare",
    "bisect",
    "calibrate",
    "watch",
    "diff",
    "convert",
    "export",
    "bench",
    "doctor",
)


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "NO_COLOR": "1"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def data(*arguments: str, code: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", code=code).stdout)


def golden(name: str, text: str, update: bool) -> None:
    path = HERE / "golden" / name
    if update:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-goldens"))


def test_help_lists_every_verb() -> None:
    text = call("--help").stdout
    assert [verb for verb in VERBS if f" {verb} " not in text] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str) -> None:
    text = call(verb, "--help").stdout
    assert "--json" in text


def test_version() -> None:
    assert call("--version").stdout == f"mpcompile {__version__}\n"


def test_a_mistyped_verb_is_suggested() -> None:
    assert "Did you mean" in (said := call("inspekt", code=2).stderr)
    assert "'inspect'" in said


def test_inspect_table(update: bool) -> None:
    text = call("inspect", MODEL, "-p", "bf16").stdout
    kept = [line for line in text.splitlines() if not line.startswith("estimated")]
    golden("inspect.txt", "\n".join(kept) + "\n", update)


def test_inspect_json_is_the_report() -> None:
    report = data("inspect", MODEL, "-p", "bf16")
    schema = json.loads(resources.files("mpcompile.report").joinpath("schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(report)
    assert report["policy"].startswith("low=bf16")
    assert {node["id"] for node in report["nodes"]} >= {"embedding", "linear", "exp"}


def test_inspect_only_and_sort() -> None:
    rows = data("inspect", MODEL, "-p", "bf16", "--only", "fp32")["nodes"]
    assert {row["precision"] for row in rows} == {"fp32"}
    sizes = [row["bytes"] for row in data("inspect", MODEL, "-p", "bf16", "--sort", "bytes")["nodes"]]
    assert sizes == sorted(sizes, reverse=True)
    assert "MP801" in call("inspect", MODEL, "-p", "bf16", "--only", "fp23", code=2).stderr


def test_inspect_opens_with_a_headline_and_says_none() -> None:
    lines = call("inspect", MODEL, "-p", "bf16", "--only", "unknown", "--time-passes").stdout.splitlines()
    assert lines[0].startswith("nodes: ")
    assert "% bf16" in lines[0]
    assert any(line.startswith("FP32, ") for line in lines)
    assert "none of the nodes is 'unknown'" in lines
    assert any(re.fullmatch(r"assign: [\d.]+ ms.*", line) for line in lines)


def test_inspect_overrides() -> None:
    report = data("inspect", MODEL, "-p", "bf16", "--keep-fp32", "layers.1*", "--low", "aten.exp*")
    rows = {row["id"]: row for row in report["nodes"]}
    inside = [row for row in rows.values() if row["module"].startswith("layers.1.")]
    assert inside
    assert {row["precision"] for row in inside} == {"fp32"}
    assert (rows["exp"]["precision"], rows["exp"]["decided_by"]) == ("bf16", "override")
    refused = call("inspect", MODEL, "-p", "bf16", "--keep-fp32", "layres.1*", code=2).stderr
    assert "MP203" in refused
    assert "layers.1" in refused


def test_inspect_after_a_pass() -> None:
    from mpcompile.parse import parse_graph

    text = call("inspect", MODEL, "-p", "bf16", "--after", "classify").stdout
    graph = parse_graph(text)
    assert not graph.casts()
    assert all(node.verdict for node in graph)
    assert "MP805" in call("inspect", MODEL, "-p", "bf16", "--after", "asign", code=2).stderr
    assert "'assign'" in call("inspect", MODEL, "-p", "bf16", "--after", "asign", code=2).stderr


def test_inspect_writes_pages(tmp_path: Path) -> None:
    said = call(
        "inspect", MODEL, "-p", "bf16", "--html", str(tmp_path / "r.html"), "--dot", str(tmp_path / "r.dot")
    ).stdout
    assert f"written: {tmp_path / 'r.html'}" in said
    assert "<table" in (tmp_path / "r.html").read_text()
    assert (tmp_path / "r.dot").read_text().startswith("digraph")


def test_a_factory_may_give_keywords_and_live_in_a_package() -> None:
    with_keywords = data("inspect", MODEL.replace(":make", ":make_with_keywords"), "-p", "bf16")
    assert "mul" in {node["id"] for node in with_keywords["nodes"]}
    assert data("inspect", "mpcompile.tools.gpt:make", "-p", "bf16")["summary"]["unknown_ops"] == []


@pytest.mark.parametrize(
    ("target", "code", "says"),
    [
        ("model", "MP802", "does not name a model"),
        ("model_undr_test.py:make", "MP802", "there is no file"),
        (f"{HERE / 'model_undr_test.py'}:make", "MP802", "did you mean 'model_under_test.py'"),
        (f"{HERE / 'absent.onnx'}", "MP", "absent.onnx"),
        ("no.such.module:make", "MP803", "ModuleNotFoundError"),
        (MODEL.replace(":make", ":mak"), "MP803", "did you mean 'make'"),
        (MODEL.replace(":make", ":number"), "MP804", "returned a int"),
        (MODEL.replace(":make", ":wrong_parts"), "MP804", "returned (str, int)"),
        (MODEL.replace(":make", ":fails"), "MP804", "model_under_test.py:"),
        ("json:loads", "MP804", "failed: TypeError"),
    ],
)
def test_bad_targets_are_one_clear_error(target: str, code: str, says: str) -> None:
    refused = call("inspect", target, code=2)
    assert refused.stdout == ""
    assert refused.stderr.startswith(code)
    assert says in refused.stderr


def test_a_bad_policy_is_one_clear_error() -> None:
    assert call("inspect", MODEL, "-p", "bf61", code=2).stderr.startswith("MP201")


def test_explain_a_node(update: bool) -> None:
    golden("explain.txt", call("explain", MODEL, "exp", "-p", "bf16").stdout, update)
    facts = data("explain", MODEL, "exp", "-p", "bf16")
    assert facts["node"]["precision"] == "fp32"
    assert facts["rule"]["kind"] == "exponential"
    assert facts["cost"]["bf16"]["bytes"] * 2 == facts["cost"]["fp32"]["bytes"]


def test_explain_says_how_to_change_the_decision() -> None:
    assert "--low 'exp'" in call("explain", MODEL, "exp", "-p", "bf16").stdout
    assert "--keep-fp32 'linear'" in call("explain", MODEL, "linear", "-p", "bf16").stdout


def test_explain_a_code() -> None:
    assert call("explain", "mp203").stdout.startswith("MP203: ")
    assert data("explain", "MP201")["remedy"]
    assert "MP806" in call("explain", "MP999", code=2).stderr


def test_explain_names_near_nodes() -> None:
    refused = call("explain", MODEL, "linaer", "-p", "bf16", code=2).stderr
    assert "MP806" in refused
    assert "'linear'" in refused
    assert "which node" in call("explain", MODEL, code=2).stderr


def test_diff(tmp_path: Path) -> None:
    saved = tmp_path / "report.json"
    saved.write_text(call("inspect", MODEL, "-p", "bf16", "--json").stdout)
    assert call("diff", MODEL, str(saved), "-p", "bf16").stdout == "the plans are the same\n"
    found = data("diff", MODEL, MODEL, "-p", "bf16", "--policy-b", "fp32", code=1)
    assert not found["same"]
    assert {"linear"} <= {one["id"] for one in found["changed"]}
    page = saved.with_suffix(".html")
    text = call("diff", MODEL, MODEL, "-p", "bf16", "--policy-b", "fp32", "--html", str(page), code=1).stdout
    assert f"written: {page}" in text
    assert "only in b" in page.read_text(encoding="utf-8")
    assert "~ linear (aten.linear.default): bf16 → fp32" in text


def test_diff_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("{")
    assert "MP807" in call("diff", str(tmp_path / "a.json"), MODEL, code=2).stderr
    assert "MP807" in call("diff", str(tmp_path / "b.json"), MODEL, code=2).stderr


def test_doctor() -> None:
    found = data("doctor")
    assert found["healthy"]
    assert {"torch", "cpu", "dynamo backend"} <= {check["name"] for check in found["checks"]}
    assert "ok   torch: " in call("doctor").stdout
    (products,) = (check for check in found["checks"] if check["name"] == "products on cpu")
    ratios = [float(number) for number in re.findall(r"(\d[\d.e+-]*) times", products["found"])]
    assert len(ratios) == 2
    assert products["good"] == (max(ratios) > 1.0) or 1.0 in ratios
    by_name = {check["name"]: check for check in found["checks"]}
    assert by_name["policy 'auto' on cpu"]["found"].partition(":")[0] in ("bf16", "fp16", "fp32")
    assert "in the table" in by_name["FLOP/s on cpu"]["found"]
    assert by_name["private parts of torch"]["good"]
    assert ("FP16 on cpu" in by_name) == (ratios[1] < 1.0) or 1.0 in ratios
    assert "CPUExecutionProvider" in by_name["onnxruntime providers"]["found"]


def test_doctor_names_what_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpcompile.tools import doctor
    from mpcompile.torch_internals import names

    rows = {
        path: names.PrivateName(path, "a", "b")
        for path in ("torch._guards.tracing", "torch._guards.gone", "torch.no_such.part")
    }
    monkeypatch.setattr(names, "names", lambda: rows)
    found = doctor._private()
    assert not found.good
    assert found.found == "missing: torch._guards.gone, torch.no_such.part"


def test_convert_an_onnx_model(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    source, made = tmp_path / "net.onnx", tmp_path / "net.fp16.onnx"
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["h"]), onnx.helper.make_node("Relu", ["h"], ["y"])]
    ports = [onnx.helper.make_tensor_value_info(name, 1, [64, 64]) for name in ("x", "y")]
    weight = onnx.numpy_helper.from_array(__import__("numpy").eye(64, dtype="float32"), "w")
    graph = onnx.helper.make_graph(nodes, "net", ports[:1], ports[1:], [weight])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), source)
    found = data("convert", str(source), str(made))
    assert found["written"] == str(made)
    assert onnxruntime.InferenceSession(str(made), providers=["CPUExecutionProvider"]).get_outputs()[0].name == "y"
    rows = data("inspect", str(source), "-p", "fp16")["nodes"]
    assert {row["precision"] for row in rows} == {"fp16"}
    assert "written:" in call("convert", str(source), str(made)).stdout
    assert "MP802" in call("convert", str(tmp_path / "nt.onnx"), str(made), code=2).stderr
    data("convert", str(source), str(made), "--precision", "bf16", "--keep-io", "--keep-fp32", "onnx::Relu")
    model = onnx.load(made)
    assert [node.op_type for node in model.graph.node] == ["Cast", "MatMul", "Cast", "Relu"]
    assert model.graph.initializer[0].data_type == onnx.TensorProto.BFLOAT16
    data("convert", str(source), str(made), "--low-io")
    numpy = pytest.importorskip("numpy")
    numpy.savez(tmp_path / "data.npz", x=numpy.linspace(0.1, 1, 64 * 64, dtype="float32").reshape(64, 64))
    sampled = ("convert", str(source), str(tmp_path / "s.onnx"), "--calibrate", str(tmp_path / "data.npz"))
    failed = call(*sampled, "--max-error", "1e-7", code=1)
    assert "MP605" in failed.stderr
    assert "MatMul" in failed.stderr
    assert not (tmp_path / "s.onnx").exists()
    assert "output y: off by" in call(*sampled).stdout
    assert data(*sampled, "--max-error", "1e-7", "--auto")["kept"]
    assert onnx.load(made).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_export_a_pytorch_model(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    made = tmp_path / "net.onnx"
    found = data("export", MODEL, str(made), "-p", "fp16")
    assert found == {"written": str(made), "bytes": made.stat().st_size}
    types = {tensor.data_type for tensor in onnx.load(made).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types


def test_export_refuses_onnx(tmp_path: Path) -> None:
    assert "mpcompile convert" in call("export", str(tmp_path / "net.onnx"), str(tmp_path / "out.onnx"), code=2).stderr


def test_errors_are_json_where_json_was_asked_for(tmp_path: Path) -> None:
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"")
    for arguments, code in [
        (("convert", str(empty), str(tmp_path / "o.onnx")), "MP601"),
        (("inspect", "no.such.module:make"), "MP803"),
        (("inspect", MODEL, "-p", "bf16", "--no-such-option"), "MP800"),
        (("inspekt", MODEL), "MP800"),
        (("bench", "--rounds", "many"), "MP800"),
    ]:
        found = data(*arguments, code=2)
        assert (found["error"]["code"], found["exit"]) == (code, 2)
        assert found["error"]["what"]


@pytest.mark.parametrize("option", ["--html", "--dot"])
def test_places_that_cannot_be_written_are_refused_before_any_work(option: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path / "no" / "such" / "r", tmp_path, tmp_path / "pipe", Path("/dev/null")):
        refused = call("inspect", "never.imported:make", option, str(bad), code=2)
        assert refused.stderr.startswith("MP808")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "pipe"]


def test_no_verb_makes_folders_in_silence(tmp_path: Path) -> None:
    out = str(tmp_path / "a" / "b")
    for arguments in (("export", MODEL, out), ("convert", "m.onnx", out), ("bench", "-o", out), ("demo", "--out", out)):
        assert call(*arguments, code=2).stderr.startswith("MP808")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["make_too_short", "make_index_beyond", "make_bad_keyword", "make_int_input"])
def test_examples_that_the_model_itself_refuses_are_refused(name: str) -> None:
    refused = call("inspect", MODEL.replace(":make", f":{name}"), "-p", "bf16", code=2)
    assert refused.stderr.startswith("MP810")


def test_trying_the_example_out_changes_nothing() -> None:
    import torch

    from mpcompile.tools.target import load

    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    made = load(MODEL.replace(":make", ":make_with_statistics"))
    assert torch.equal(torch.rand(3), wanted)
    assert int(made.model.num_batches_tracked) == 0
    assert torch.equal(made.model.running_mean, torch.zeros(4))
    assert torch.equal(made.args[0], torch.ones(2, 4))


def test_a_fault_that_nobody_foresaw_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpcompile.tools import target

    def fault(*_: Any) -> Any:
        raise KeyError("odd")

    monkeypatch.setattr(target, "study", fault)
    monkeypatch.delenv("MPCOMPILE_TRACEBACK", raising=False)
    assert call("inspect", MODEL, code=2).stderr.startswith("MP809: KeyError: 'odd'")
    assert data("inspect", MODEL, code=2)["error"]["code"] == "MP809"


def test_no_terminal_obeys_what_is_printed(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    bad = "h\x1b[2J\x9b31m\u202e"
    nodes = [onnx.helper.make_node("MatMul", ["x", "x"], [bad], bad), onnx.helper.make_node("Relu", [bad], ["y"])]
    ports = [onnx.helper.make_tensor_value_info(name, 1, [64, 64]) for name in ("x", "y")]
    source = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "net", ports[:1], ports[1:])), source)
    for arguments in (("inspect", str(source)), ("explain", str(source), bad), ("explain", str(source), "h"),
                      ("inspect", str(source), "--after", "assign"), ("diff", str(source), str(source)),
                      ("convert", str(source), str(tmp_path / "o.onnx"), "--keep-fp32", bad)):  # fmt: skip
        for more in ((), ("--json",)):
            said = CliRunner().invoke(app, [*arguments, *more, "-p", "fp16"])
            assert not set(said.output) & set("\x1b\x9b\u202e"), arguments
