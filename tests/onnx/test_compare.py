"""`compare_nodes`: errors of ONNX plans against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import mlp, noise, parse

from mpcompile import mpcompile
from mpcompile.errors import OnnxError


def low(array: Any) -> Any:
    return array.astype(np.float16).astype(np.float32)


def off(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64)))


def test_errors_of_two_products_by_hand() -> None:
    w1, w2, x = noise(16, 32, scale=0.2), noise(32, 8, seed=1, scale=0.2), noise(4, 16, seed=2)
    model = parse("two (float[n, 16] x) => (float[n, 8] y) { h = MatMul(x, w1)\n y = MatMul(h, w2) }", w1=w1, w2=w2)
    made = mpcompile(model, "fp16", low=["*"])
    found = made.compare_nodes({"x": x})
    full_h = x @ w1
    plan_h = low(low(x) @ low(w1))
    plan_y, fed_y, full_y = low(plan_h @ low(w2)), low(low(full_h) @ low(w2)), full_h @ w2
    first, second = found.values
    assert (first.op, second.op) == ("onnx::MatMul", "onnx::MatMul")
    assert first.dtype == second.dtype == "fp16"
    assert first.error == pytest.approx(off(plan_h, full_h), rel=0.02)
    assert first.own == first.error
    assert second.error == pytest.approx(off(plan_y, full_y), rel=0.02)
    assert second.own == pytest.approx(off(fed_y, full_y), rel=0.02)
    size = np.linalg.norm(full_y.astype(np.float64))
    assert second.inherited == pytest.approx(float(np.linalg.norm(plan_y - fed_y)) / size, rel=0.05)
    assert found.source == "onnx"
    assert found.row(first.id).largest == pytest.approx(float(np.abs(full_h).max()), rel=1e-5)


def test_an_overflow_is_counted() -> None:
    model = parse("big (float[n, 4] x) => (float[n, 4] y) { h = MatMul(x, w)\n y = Tanh(h) }",
                  w=np.eye(4, dtype=np.float32) * 10)  # fmt: skip
    made = mpcompile(model, "fp16", low=["*"], ranges=False)
    found = made.compare_nodes({"x": np.array([[1, 2, 3, 10000]], np.float32)})
    assert found.values[0].overflow == 1
    assert found.values[0].error == math.inf
    assert not found.finite


def test_samples_join_and_generated_ones_serve() -> None:
    made = mpcompile(mlp(), "fp16", low=["*"])
    both = made.compare_nodes([{"x": noise(3, 16)}, {"x": noise(5, 16, seed=7)}], autocast=True)
    assert both.batches == 2
    assert {row.id for row in both.values} == {row.id for row in made.compare_nodes().values}
    assert any("generated" in note for note in made.compare_nodes().notes)
    with pytest.raises(OnnxError, match="MP606"):
        made.compare_nodes("no such file.npz")


def test_it_holds_for_values_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mpcompile(mlp(), "fp16", low=["*"])
    whole = made.compare_nodes({"x": noise(3, 16)})
    from mpcompile.onnx import compare

    monkeypatch.setattr(compare._Compared.slices, "__defaults__", (1,))
    parts = made.compare_nodes({"x": noise(3, 16)})
    assert [row.to_dict() for row in parts.values] == [row.to_dict() for row in whole.values]


def test_the_verb_takes_onnx_files(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mpcompile.tools.main import app

    onnx.save(mlp(), tmp_path / "m.onnx")
    np.savez(tmp_path / "s.npz", x=noise(3, 16))
    words = ["compare", str(tmp_path / "m.onnx"), "--samples", str(tmp_path / "s.npz"), "--low", "*"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "Gemm" in done.stdout
    assert CliRunner().invoke(app, [*words, "--max-error", "1e-9"]).exit_code == 1
