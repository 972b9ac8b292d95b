"""Sample inputs: measured hazards, comparison, and the automatic search for what must stay FP32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_models import mlp, noise, parse

from mpcompile.errors import OnnxError
from mpcompile.onnx.convert import convert
from mpcompile.onnx.run.calibrate import difference, measure, samples
from mpcompile.onnx.tune import smallest
from mpcompile.passes.measured_hazards import Measured


def overflowing():
    """The product of two inputs of 300: 9e4 is beyond FP16."""
    return parse(
        """g (float[4, 8] x) => (float[4, 8] y) {
            h = MatMul(x, w)
            p = Mul(h, h)
            q = Mul(p, small)
            y = MatMul(q, w)
        }""",
        w=np.eye(8, dtype=np.float32), small=np.float32(1e-3),
    )  # fmt: skip


def test_measured_overflow_keeps_its_nodes_fp32_with_the_number() -> None:
    feeds = {"x": np.full((4, 8), 300, np.float32)}
    low = ["onnx::Mul"]
    assert np.isinf(convert(overflowing(), "fp16", low=low).compare(feeds)[0].relative)
    made = convert(overflowing(), "fp16", calibrate=feeds)
    product = next(node for node in made.graph if node.outputs == ["p"])
    assert (product.precision, product.decided_by) == ("fp32", "hazard")
    assert "9e+04" in product.reason
    assert made.ranges["p"].most == 90000
    assert made.errors[0].relative < 1e-2
    assert [n.precision for n in made.graph if n.op == "onnx::MatMul"] == ["fp16", "fp16"]


def test_an_input_that_overflows_is_read_in_fp32() -> None:
    given = parse("g (float[4, 8] x) => (float[4, 8] y) { y = MatMul(x, w) }", w=np.eye(8, dtype=np.float32) * 1e-3)
    made = convert(given, "fp16", calibrate={"x": np.full((4, 8), 1e5, np.float32)})
    assert [n.precision for n in made.graph] == ["fp32"]
    assert "1e+05" in next(iter(made.graph)).reason
    assert made.errors[0].relative < 1e-6


BODIES = """g (float[2, 4] x, bool c, int64 n) => (float[2, 4] y, float[2, 4] z) {
    y = If(c) <then_branch = t () => (float[2, 4] a) { p = MatMul(x, big)
            a = Mul(p, small) },
        else_branch = e () => (float[2, 4] b) {
            b = Loop(n, yes, x) <body = l (int64 i, bool k, float[2, 4] s) => (bool k2, float[2, 4] s2) {
                k2 = Identity(k)
                q = MatMul(s, ten)
                s2 = Tanh(q) }> }>
    z, o = Scan <num_scan_inputs = 1, body = d (float[2, 4] f, float[2, 4] v) => (float[2, 4] f2, float[2, 4] w) {
        w = MatMul(v, ten)
        f2 = Add(f, w) }> (x, xs) }"""


@pytest.mark.parametrize("opset", [16, 20])
def test_values_of_bodies_are_measured_too(opset: int) -> None:
    eye = np.eye(4, dtype=np.float32)
    given = parse(BODIES, opset=opset, ir=8, big=eye * 5e4, small=np.float32(1e-4), ten=eye * 10, yes=np.array(True),
                  xs=np.stack([np.full((2, 4), v, np.float32) for v in (3, -7, np.nan)]))  # fmt: skip
    x = np.linspace(-1, 2, 8, dtype=np.float32).reshape(2, 4)
    taken = {"x": x, "c": np.array(True), "n": np.array(3)}
    ranges = convert(given, "fp16", calibrate=taken).ranges
    assert (ranges["p"].least, ranges["p"].most) == (-5e4, 1e5)
    assert (ranges["w"].least, ranges["w"].most) == (-70, 30)
    assert "q" not in ranges
    made = convert(given, "fp16", calibrate=[taken, {**taken, "c": np.array(False)}])
    assert made.ranges["q"].most == 20
    product = next(node for node in made.graph if node.outputs == ["p"])
    assert (product.precision, product.decided_by) == ("fp32", "hazard")
    assert "1e+05" in product.reason
    assert made.errors[0].relative < 1e-2
    never = convert(given, "fp16", calibrate={**taken, "c": np.array(False), "n": np.array(0)})
    assert "q" not in never.ranges


def test_measured_underflow() -> None:
    given = parse("g (float[4, 8] x) => (float[4, 8] y) { h = MatMul(x, w)\n y = MatMul(h, v) }",
                  w=noise(8, 8, scale=1e-9), v=noise(8, 8, scale=1e6))  # fmt: skip
    made = convert(given, "fp16", calibrate={"x": noise(4, 8)})
    assert all(node.precision == "fp32" for node in made.graph if node.op == "onnx::MatMul")
    assert any("zero in fp16" in node.reason for node in made.graph)


def test_all_values_are_measured_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpcompile.onnx.run import calibrate

    feeds = {"x": noise(64, 16)}
    whole = convert(mlp(), "fp16", calibrate=feeds).ranges
    monkeypatch.setattr(calibrate.record, "__defaults__", (64, None))
    assert convert(mlp(), "fp16", calibrate=feeds).ranges == whole
    assert set(whole) == {"x", "h", "a", "r", "y"}


def test_max_error_names_the_sensitive_nodes_and_auto_keeps_them() -> None:
    """One product of large, nearly cancelling terms among harmless ones."""
    grid = np.vander(np.linspace(0.2, 1, 16), 16) + np.eye(16)
    given = parse(
        """g (float[8, 16] x) => (float[8, 16] y) {
            a = MatMul(x, w)
            b = MatMul(a, w)
            c = MatMul(b, bad)
            d = MatMul(c, w)
            y = MatMul(d, w)
        }""",
        w=noise(16, 16, scale=0.25),
        bad=np.linalg.inv(grid).astype(np.float32) * 3,
    )  # fmt: skip
    feeds = {"x": noise(8, 16)}
    error = convert(given, "fp16", calibrate=feeds).errors[0].relative
    limit = error / 3
    with pytest.raises(OnnxError, match=r"MP605") as caught:
        convert(given, "fp16", calibrate=feeds, max_error=limit)
    assert "MatMul" in caught.value.try_
    made = convert(given, "fp16", calibrate=feeds, max_error=limit, auto=True)
    assert made.errors[0].relative <= limit
    assert 0 < len(made.kept) < 5
    assert len(convert(given, "fp16", calibrate=feeds, max_error=0.0, auto=True).kept) == 5


def test_samples_come_in_many_forms(tmp_path: Path) -> None:
    x = noise(2, 16)
    np.savez(tmp_path / "data.npz", x=x)
    for given in (tmp_path / "data.npz", {"x": x}, lambda: {"x": x}, [{"x": x}], (d for d in [{"x": x}])):
        assert [list(feeds) for feeds in samples(given)] == [["x"]]
    for bad in (tmp_path / "no.npz", 3, []):
        with pytest.raises(OnnxError, match="MP606"):
            samples(bad)
    with pytest.raises(OnnxError, match="MP606"):
        convert(mlp(), "fp16", auto=True)


def test_measure_counts_what_vanishes() -> None:
    array = np.array([0, 1e-9, 1e-9, 1e-9, 2.0, np.inf, np.nan], np.float32)
    assert measure(array, "fp16") == Measured(0.0, 2.0, 0.75)
    assert measure(array, "bf16") == Measured(0.0, 2.0, 0.0)
    assert measure(np.array([np.nan]), "fp16") is None


def test_difference_sees_nan_and_infinity() -> None:
    one = np.array([1.0, np.nan, np.inf])
    assert difference("y", one, one).relative == 0
    assert difference("y", np.array([1.0, 2.0]), np.array([1.0, np.nan])).relative == np.inf
    assert difference("y", [np.array([1.5])], [np.array([1.0])]).absolute == 0.5
    assert difference("y", np.array([3]), np.array([4])).relative == 0.25


def test_smallest_asks_far_fewer_questions_than_there_are_nodes() -> None:
    order, asked = [f"n{i}" for i in range(1000)], []

    def judge(kept) -> float:
        asked.append(kept)
        return 0.0 if {"n3", "n17"} <= set(kept) else 1.0

    assert sorted(smallest(order, judge, 0.5)) == ["n17", "n3"]
    assert len(asked) < 60
    assert smallest(order, lambda kept: 1.0, 0.5) is None
    assert smallest(order, lambda kept: 0.0, 0.5) == []


def test_weights_in_a_data_file_calibrate_too(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    feeds = {"x": noise(3, 16)}
    want = convert(mlp(), "fp16", calibrate=feeds)
    for given in (tmp_path / "m.onnx", ir.load(tmp_path / "m.onnx")):
        made = convert(given, "fp16", calibrate=feeds)
        assert (made.errors, made.ranges) == (want.errors, want.ranges)
        assert made.compare(feeds) == want.errors
