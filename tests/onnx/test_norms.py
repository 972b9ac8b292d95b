"""Norms and activations in elementary operations have the types with which ONNX Runtime's fusions load."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx_models import noise, parse

from mpcompile.onnx.convert import convert
from mpcompile.onnx.run.session import run, session

NORM = """m = ReduceMean<axes = [-1]>(h)
    d = Sub(h, m)
    q = {square}
    v = ReduceMean<axes = [-1]>(q)
    e = Add({sum})
    s = Sqrt(e)
    n = Div(d, s)
    a = Mul(n, g0)
    b = Add(a, b0)"""
BEFORE = {
    "product": "h = MatMul(x, w)",
    "residual": "p = MatMul(x, w)\n h = Add(p, x)",
    "input": "h = Identity(x)",
    "exponential": "p = MatMul(x, w)\n h = Exp(p)",
}
GELU = "f = Div(b, r2)\n k = Erf(f)\n l = Add(k, one)\n t = Mul(b, l)\n u = Mul(t, half)"


def model(before: str, square: str, total: str, gelu: bool) -> onnx.ModelProto:
    after = f"{GELU}\n y = MatMul(u, w)" if gelu else "y = MatMul(b, w)"
    norm = NORM.format(square=square, sum=total)
    return parse(
        f"g (float[2, 8, 64] x) => (float[2, 8, 64] y) {{ {BEFORE[before]}\n {norm}\n {after} }}",
        opset=17, w=noise(64, 64, scale=0.1), two=np.float32(2), eps=np.float32(1e-5), g0=noise(64), b0=noise(64, seed=2),
        r2=np.float32(2**0.5), one=np.float32(1), half=np.float32(0.5),
    )  # fmt: skip


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("square", "total"), [("Pow(d, two)", "v, eps"), ("Mul(d, d)", "eps, v")])
@pytest.mark.parametrize("before", BEFORE)
def test_norms_load_and_match(before: str, square: str, total: str, gelu: bool) -> None:
    given = model(before, square, total, gelu)
    feeds = {"x": noise(2, 8, 64)}
    want = run(session(given), feeds)["y"]
    for low, tolerance in (("fp16", 1e-2), ("bf16", 6e-2)):
        made = convert(given, low, ranges=False)
        assert [node.precision for node in made.graph if node.op == "onnx::MatMul"][-1] == low
        core = {node.precision for node in made.graph if node.op in ("onnx::ReduceMean", "onnx::Sqrt", "onnx::Sub")}
        assert core == {"fp32"}
        for loaded in [session(made.simulated())] + ([session(made.model, ["cpu"])] if low == "fp16" else []):
            got = run(loaded, feeds)["y"]
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def test_what_the_user_keeps_stays() -> None:
    made = convert(
        model("product", "Pow(d, two)", "v, eps", gelu=False), "fp16", keep_fp32=["onnx::MatMul"], ranges=False
    )
    assert {node.precision for node in made.graph if not node.is_cast} == {"fp32"}
