"""Without samples a model is run on generated inputs: what overflows FP16 on them stays FP32, and the report says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_models import mlp, noise, parse

from mpcompile.onnx.convert import convert
from mpcompile.onnx.run import generate
from mpcompile.onnx.run.calibrate import measure
from mpcompile.onnx.run.session import run, session

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def growing(layers: int = 6) -> onnx.ModelProto:
    """Each product is ten times its operand: after five of them FP16 is at its end."""
    nodes = "\n".join(f"h{i + 1} = MatMul(h{i}, w)\n" for i in range(layers))
    return parse(f"g (float[n, 8] h0) => (float[n, 8] y) {{ {nodes} p = Softmax(h{layers})\n y = Mul(p, p) }}",
                 w=np.full((8, 8), 2.0, np.float32))  # fmt: skip


def test_what_overflows_on_generated_inputs_stays_fp32() -> None:
    made = convert(growing(), "fp16")
    kept = [node for node in made.graph if node.op == "onnx::MatMul" and node.precision == "fp32"]
    low = [node for node in made.graph if node.op == "onnx::MatMul" and node.precision == "fp16"]
    assert kept
    assert low
    assert all("measured on generated inputs" in node.reason for node in kept)
    assert any("generated inputs (seed 0: h0 float32[1, 8])" in note for note in made.notes)
    assert any("generated inputs" in note for step in made.report().steps for note in step.notes)
    x = np.random.default_rng(5).random((3, 8)).astype(np.float32)
    (want,) = ReferenceEvaluator(growing()).run(None, {"h0": x})
    (got,) = ReferenceEvaluator(made.model).run(None, {"h0": x})
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-3)
    blind = run(session(convert(growing(), "fp16", ranges=False).simulated()), {"h0": x})
    assert not np.isfinite(blind["y"]).all()


def test_ranges_are_seeded() -> None:
    first, second = (convert(growing(), "fp16").model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_bf16_and_samples_and_false_need_no_generated_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("mpcompile.onnx.convert.on_generated", refuse)
    convert(mlp(), "bf16")
    convert(mlp(), "fp16", ranges=False)
    convert(mlp(), "fp16", calibrate={"x": noise(3, 16)})


@pytest.mark.parametrize(
    "text",
    [
        "g (int64[b, s] i) => (float[b, s, 4] y) { h = Gather(table, i)\n y = MatMul(h, w) }",
        "g (int64[2] i, float[4, 4] x) => (float[?, ?] y) { h = MatMul(x, w)\n y = Reshape(h, i) }",
        "g (float[b, 3, height, width] x) => (float[b, 2, oh, ow] y) { y = Conv<kernel_shape = [40, 40]>(x, k) }",
        "g (bool c, float[n, 4] x) => (float[n, 4] y) { y = If(c) <then_branch = a () => (float[n, 4] t) "
        "{ t = MatMul(x, w) }, else_branch = b () => (float[n, 4] t) { t = Neg(x) }> }",
        "g (float16[n, 4] x) => (float[n, 4] y) { h = Cast<to = 1>(x)\n y = MatMul(h, w) }",
        "g (string[n] s, float[4, 4] x) => (float[4, 4] y, string[n] z) { y = MatMul(x, w)\n z = Identity(s) }",
        "g (double[n, 4] d) => (float[n, 4] y) { h = Cast<to = 1>(d)\n y = MatMul(h, w) }",
    ],
)
def test_inputs_of_all_kinds_are_generated(text: str) -> None:
    names = {"table": noise(5, 4), "w": noise(4, 4), "k": noise(2, 3, 40, 40)}
    made = convert(
        parse(text, **{name: held for name, held in names.items() if f"{name})" in text or f"({name}," in text}), "fp16"
    )
    found = [note for note in made.notes if "ranges" in note]
    if "Reshape" in text:  # no size that is made up fits
        assert "not measured, it does not run" in found[0]
    else:
        assert "ranges measured on 2 generated inputs" in found[0]
        assert made.ranges


def test_inputs_that_nobody_can_make_are_told() -> None:
    made = convert(
        parse("g (seq(float[4]) s, float[4, 4] x) => (float[4, 4] y) { y = MatMul(x, w) }", w=noise(4, 4)), "fp16"
    )
    assert any("not measured, the input 's' is of type sequence" in note for note in made.notes)


def test_a_run_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "SECONDS", 1.0)
    endless = parse("g (float[4] x) => (float[4] y) { y = Loop(n, yes, x) <body = b (int64 i, bool c, float[4] s) => "
                    "(bool d, float[4] t) { d = Identity(c)\n t = Neg(s) }> }",
                    n=np.int64(1 << 40), yes=np.array(True))  # fmt: skip
    assert any("not measured, it takes more than 1 seconds" in note for note in convert(endless, "fp16").notes)


@pytest.mark.parametrize(
    "array", [np.zeros(0, np.float32), np.full(3, np.nan, np.float32), np.full(2, np.inf, np.float32)]
)
def test_nothing_finite_is_nothing_measured(array: np.ndarray) -> None:
    assert measure(array, "fp16") is None


def test_what_is_measured() -> None:
    seen = measure(np.array([1.0, -3.0, np.inf, np.nan, 0.0, 1e-9], np.float32), "fp16")
    assert seen is not None
    assert (seen.least, seen.most) == (-3.0, 1.0)
    assert seen.vanishing == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["squeezenet", pytest.param("vgg19", marks=pytest.mark.slow)])
def test_light_models_are_right_in_true_fp16(name: str) -> None:
    path = str(LIGHT / f"light_{name}.onnx")
    made = convert(path, "fp16")
    held = session(path)
    assert any(node.precision == "fp16" and node.op == "onnx::Conv" for node in made.graph)
    for make in (np.random.default_rng(1).random, np.random.default_rng(1).standard_normal):
        feeds = {held.get_inputs()[0].name: make((1, 3, 224, 224)).astype(np.float32)}
        want, got = run(held, feeds), run(session(made.simulated()), feeds)
        for key in want:
            np.testing.assert_allclose(got[key], want[key], rtol=2e-2, atol=1e-3 * np.abs(want[key]).max())
