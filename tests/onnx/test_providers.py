"""Providers: their names, which are used, what a plan for one is predicted to gain, and the comparison that is the default."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_models import mlp, noise, parse
from typer.testing import CliRunner

from mpcompile.errors import OnnxError
from mpcompile.onnx.convert import OnnxMixedPrecision, convert
from mpcompile.onnx.run import session as ort
from mpcompile.tools.main import app


@pytest.mark.parametrize("name", ["cuda", "CUDA", "CUDAExecutionProvider", "tensorrt", "openvino", "cpu", ""])
def test_names_that_exist(name: str) -> None:
    assert convert(mlp(), "fp16", provider=name, ranges=False).options.provider in {
        "cuda",
        "tensorrt",
        "openvino",
        "cpu",
        "",
    }


@pytest.mark.parametrize(
    ("name", "near"), [("tpu", "'cpu'"), ("cdua", "'cuda'"), ("tensort", "'tensorrt'"), ("§", "cuda"), (3, "cuda")]
)
def test_names_that_do_not(name: str, near: str) -> None:
    with pytest.raises(OnnxError, match="MP611") as caught:
        convert(mlp(), "fp16", provider=name)
    assert near in str(caught.value)
    with pytest.raises(OnnxError, match="MP611"):
        ort.session(mlp(), [str(name)])


def test_tensorrt_runs_on_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort.ort, "get_available_providers", lambda: there)
    monkeypatch.setattr(ort, "_preload", lambda: None)
    assert ort.default_providers() == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert ort.wanted(["tensorrt", "cpu"]) == ["TensorrtExecutionProvider", "CPUExecutionProvider"]


def test_one_line_says_where_a_model_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mpcompile"):
        held = convert(mlp(), "fp16", provider="cpu").session(["cpu"])
    assert "runs it on CPU" in caplog.messages[-1]
    assert ort.placed(held, ["CUDAExecutionProvider", "CPUExecutionProvider"]).endswith(
        "runs it on CPU; CUDA did not start"
    )


def convolutions() -> onnx.ModelProto:
    return parse(
        """g (float[64, 64, 56, 56] x) => (float[64, 64, 56, 56] y) {
            a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, k)
            b = Relu(a)
            y = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(b, k)
        }""",
        k=noise(64, 64, 3, 3, scale=0.05),
    )  # fmt: skip


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "cpu", ""])
def test_a_bf16_plan_is_never_slower_than_fp32_by_prediction(provider: str) -> None:
    product = parse(
        "g (float[256, 512] x) => (float[256, 512] y) { h = MatMul(x, w)\n y = Tanh(h) }", w=noise(512, 512, scale=0.05)
    )
    for model in (convolutions(), product):
        cost = convert(model, "bf16", provider=provider).report().summary["cost"]
        assert cost["plan"] <= cost["fp32"]


def test_a_poor_choice_is_said_to_be_one() -> None:
    made = convert(convolutions(), "bf16", provider="cuda")
    assert any("times as long as FP32 on cuda-onnx" in note for note in made.notes)
    assert any("FP16 would be" in note for note in made.notes)
    assert {node.precision for node in made.graph if node.op == "onnx::Conv"} == {"fp32"}
    assert {
        node.precision for node in convert(convolutions(), "fp16", ranges=False).graph if node.op == "onnx::Conv"
    } == {"fp16"}


def exploding() -> onnx.ModelProto:
    nodes = "\n".join(f"h{i + 1} = MatMul(h{i}, w)\n" for i in range(8))
    return parse(
        f"g (float[4, 8] h0) => (float[4, 8] y) {{ {nodes} y = Softmax(h8) }}", w=np.full((8, 8), 4.0, np.float32)
    )


def test_what_is_not_finite_is_an_error() -> None:
    made = convert(exploding(), "fp16", ranges=False)
    with pytest.raises(OnnxError, match="MP605") as caught:
        made.verify()
    assert "not finite" in str(caught.value)
    good = convert(exploding(), "fp16")
    assert [error.relative < 1e-2 for error in good.verify()] == [True]
    assert isinstance(good, OnnxMixedPrecision)
    assert any("compared on 2 generated inputs" in note for note in good.notes)


def test_the_command_line_compares_by_default(tmp_path: Path) -> None:
    onnx.save(exploding(), tmp_path / "in.onnx")
    arguments = ["convert", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]
    failed = CliRunner().invoke(app, [*arguments, "--no-ranges", "--json"])
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["error"]["code"] == "MP605"
    assert not (tmp_path / "out.onnx").exists()
    assert CliRunner().invoke(app, [*arguments, "--no-ranges", "--no-check"]).exit_code == 0
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0
    assert "output y: off by" in said.stdout
    assert CliRunner().invoke(app, [*arguments, "--provider", "tpu"]).exit_code == 2
