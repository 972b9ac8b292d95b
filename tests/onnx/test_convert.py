"""Conversion: what is written, what is left alone, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_models import mlp, noise, ops, parse, types

from mpcompile.errors import OnnxError, RuleError
from mpcompile.onnx.convert import convert
from mpcompile.onnx.run.session import run, session

LOW = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}


def close(made: onnx.ModelProto, given: onnx.ModelProto, feeds: dict, tolerance: float) -> None:
    want, got = run(session(given), feeds), run(session(made), feeds)
    assert list(want) == list(got)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_allclose(got[name], array, rtol=tolerance, atol=tolerance * np.abs(array).max())


@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_matmuls_are_low_and_the_ends_keep_names_and_types(low: str) -> None:
    given = mlp()
    before = given.SerializeToString()
    made = convert(given, low)
    assert given.SerializeToString() == before
    found = types(made.model)
    assert found["h"] == found["r"] == found["w1"] == found["b2"] == LOW[low]
    assert found["x"] == found["y"] == "FLOAT"
    assert [(i.name, i.type) for i in made.model.graph.input] == [(i.name, i.type) for i in given.graph.input]
    assert [i.name for i in made.model.graph.output] == ["y"]
    assert ops(made.model).count("Cast") == 2
    close(made.simulated(), given, {"x": noise(3, 16)}, {"fp16": 5e-3, "bf16": 3e-2}[low])


def test_keep_io_false_takes_and_gives_low() -> None:
    made = convert(mlp(), "fp16", keep_io=False)
    assert types(made.model)["x"] == types(made.model)["y"] == "FLOAT16"
    assert "Cast" not in ops(made.model)
    low = run(made.session(), {"x": noise(3, 16).astype(np.float16)})["y"]
    np.testing.assert_allclose(low, run(session(mlp()), {"x": noise(3, 16)})["y"], rtol=1e-2, atol=1e-2)
    assert run(session(made.simulated()), {"x": noise(3, 16).astype(np.float16)})["y"].dtype == np.float16


def test_bf16_arrays_go_in_and_come_out() -> None:
    made = convert(parse("g (bfloat16[4] x) => (bfloat16[4] y) { y = Identity(x) }"), "fp16", provider="cpu")
    x = np.array([1.0, -2.5, 3.140625, 0.0], dtype=ml_dtypes.bfloat16)
    out = made.run(x=x)["y"]
    assert out.dtype == ml_dtypes.bfloat16
    assert (out == x).all()


def test_a_weight_of_fp32_and_low_readers_is_there_twice() -> None:
    given = parse(
        "g (float[4, 8] x) => (float[4, 8] y, float[8, 8] e) { y = MatMul(x, w)\n e = Exp(w) }",
        w=noise(8, 8, scale=0.1),
    )
    made = convert(given, "fp16").model
    assert sorted(t.data_type for t in made.graph.initializer) == [TensorProto.FLOAT, TensorProto.FLOAT16]
    close(made, given, {"x": noise(4, 8)}, 5e-3)


def test_weights_are_rounded_to_nearest_even() -> None:
    w = np.array([[1 + 2**-11, 1 + 3 * 2**-11], [65519.0, 6e-8]], np.float32)
    made = convert(parse("g (float[2, 2] x) => (float[2, 2] y) { y = MatMul(x, w) }", w=w), "fp16", ranges=False)
    stored = numpy_helper.to_array(made.model.graph.initializer[0])
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, [[1.0, 1 + 2**-9], [65504.0, np.float16(6e-8)]])


@pytest.mark.parametrize("value", [-1e9, float(np.finfo(np.float32).min)])
def test_mask_constants_stay_finite(value: float) -> None:
    given = parse(
        "g (float[2, 4] x, bool[2, 4] m, float[4, 4] v) => (float[2, 4] y) {"
        " h = MatMul(x, v)\n s = Where(m, h, c)\n p = Softmax<axis = -1>(s)\n y = MatMul(p, v) }",
        c=np.float32(value),
    )
    feeds = {"x": noise(2, 4), "m": np.array([[1, 0, 1, 1], [0, 0, 0, 0]], bool), "v": noise(4, 4)}
    made = convert(given, "fp16")
    where = next(node for node in made.graph if node.op == "onnx::Where")
    assert where.precision == "fp32"
    assert where.decided_by == "hazard"
    close(made.simulated(), given, feeds, 5e-3)
    close(made.model, given, feeds, 5e-3)


def test_statistics_that_fp16_cannot_hold_keep_their_node_fp32() -> None:
    given = parse(
        """g (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y) {
            c = Conv<kernel_shape = [1, 1]>(x, k)
            y = BatchNormalization(c, s, b, m, v)
        }""",
        k=noise(4, 4, 1, 1, scale=1e3), s=noise(4), b=noise(4), m=noise(4, scale=100), v=np.full(4, 1e6, np.float32),
    )  # fmt: skip
    made = convert(given, "fp16")
    assert [n.precision for n in made.graph if not n.is_cast] == ["fp16", "fp32"]
    assert "1e+06" in next(n for n in made.graph if n.op == "onnx::BatchNormalization").reason
    close(made.simulated(), given, {"x": noise(1, 4, 6, 6)}, 1e-2)


def test_infinite_masks_may_be_low() -> None:
    given = parse(
        "g (float[2, 4] x, bool[2, 4] m, float[4, 4] v) => (float[2, 4] y) {"
        " h = MatMul(x, v)\n s = Where(m, h, c)\n p = Softmax<axis = -1>(s)\n y = MatMul(p, v) }",
        c=np.float32(-np.inf),
    )
    feeds = {"x": noise(2, 4), "m": np.array([[1, 0, 1, 1], [0, 1, 0, 0]], bool), "v": noise(4, 4)}
    close(convert(given, "fp16").simulated(), given, feeds, 5e-3)


def test_resize_scales_and_shape_arithmetic_stay_fp32() -> None:
    given = parse(
        """g (float[1, 3, h, w] x) => (float[1, 2, oh, ow] y) {
            c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, k)
            s = Shape<start = 2>(c)
            f = Cast<to = 1>(s)
            g = Mul(f, two)
            u = Floor(g)
            i = Cast<to = 7>(u)
            d = Concat<axis = 0>(head, i)
            y = Resize<mode = "linear">(c, , , d)
        }""",
        k=noise(2, 3, 3, 3, scale=0.2), two=np.float32(1.9995), head=np.array([1, 2], np.int64),
    )  # fmt: skip
    made = convert(given, "fp16")
    verdicts = {node.op: node.precision for node in made.graph if not node.is_cast}
    assert verdicts["onnx::Conv"] == "fp16"
    assert verdicts["onnx::Mul"] == verdicts["onnx::Floor"] == "fp32"
    close(made.simulated(), given, {"x": noise(1, 3, 5, 33)}, 1e-2)


def test_scales_of_resize_are_fp32_by_schema() -> None:
    given = parse(
        """g (float[1, 3, 8, 8] x) => (float[1, 2, 16, 16] y) {
            c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, k)
            y = Resize<mode = "nearest">(c, , s)
        }""",
        k=noise(2, 3, 3, 3, scale=0.2), s=np.array([1, 1, 2, 2], np.float32),
    )  # fmt: skip
    made = convert(given, "fp16", low=["onnx::Resize"]).model
    assert types(made)["s"] == "FLOAT"
    close(made, given, {"x": noise(1, 3, 8, 8)}, 5e-3)


BRANCHES = """g (float[4, 4] x, bool flag) => (float[4, 4] y) {
    h = MatMul(x, w)
    b = If(flag) <
        then_branch = one () => (float[4, 4] t) { u = MatMul(h, w)
            t = Relu(u) },
        else_branch = two () => (float[4, 4] t) { t = Identity(h) }
    >
    y = MatMul(b, w)
}"""


@pytest.mark.parametrize("low", ["fp16", "bf16"])
@pytest.mark.parametrize("flag", [True, False])
def test_branches_read_what_they_capture(low: str, flag: bool) -> None:
    given = parse(BRANCHES, w=noise(4, 4))
    made = convert(given, low)
    inner = next(node for node in made.graph if node.scope and node.op == "onnx::MatMul")
    assert inner.precision == low
    close(made.simulated(), given, {"x": noise(4, 4), "flag": np.array(flag)}, {"fp16": 1e-2, "bf16": 6e-2}[low])


def test_loops_four_deep_convert() -> None:
    def body(depth: int) -> str:
        deeper = f"b{depth} = Loop(two, yes, a{depth}) <body = {body(depth - 1)}>" if depth else "b0 = Relu(a0)"
        state = f"s{depth}"
        return (
            f"l{depth} (int64 i{depth}, bool c{depth}, float[3, 3] {state}) => (bool d{depth}, float[3, 3] r{depth}) {{"
            f"d{depth} = Identity(c{depth})\n m{depth} = MatMul({state}, w)\n a{depth} = Add(m{depth}, x)\n {deeper}\n"
            f"r{depth} = Mul(b{depth}, half) }}"
        )

    given = parse(
        f"g (float[3, 3] x) => (float[3, 3] y) {{ y = Loop(two, yes, x) <body = {body(3)}> }}",
        w=noise(3, 3, scale=0.3), two=np.int64(2), yes=np.array(True), half=np.float32(0.5),
    )  # fmt: skip
    made = convert(given, "fp16")
    assert sum(node.op == "onnx::MatMul" and node.precision == "fp16" for node in made.graph) == 4
    close(made.simulated(), given, {"x": noise(3, 3)}, 2e-2)
    close(made.model, given, {"x": noise(3, 3)}, 2e-2)


def test_local_functions_are_inlined() -> None:
    given = parse(
        "g (float[2, 8] x) => (float[2, 8] y) { h = local.twice(x)\n y = MatMul(h, w) }\n"
        '<domain: "local", opset_import: ["" : 20]> twice (a) => (b) { b = Add(a, a) }',
        domains='"local" : 1', w=noise(8, 8),
    )  # fmt: skip
    made = convert(given, "fp16").model
    assert not made.functions
    close(made, given, {"x": noise(2, 8)}, 5e-3)


def test_custom_domains_stay_fp32_and_are_listed() -> None:
    given = parse(
        "g (float[2, 8] x) => (float[2, 8] y) { h = MatMul(x, w)\n c = vendor.Odd(h)\n y = MatMul(c, w) }",
        domains='"vendor" : 1', w=noise(8, 8),
    )  # fmt: skip
    made = convert(given, "fp16")
    odd = next(node for node in made.graph if node.op == "vendor::Odd")
    assert (odd.precision, odd.decided_by) == ("fp32", "unknown")
    assert any("vendor::Odd" in note for note in made.notes)
    assert any("does not load the original" in note for note in made.notes)
    assert types_of_inputs(made.model, "Odd") == ["FLOAT"]


def test_what_a_custom_operator_gives_has_the_type_that_its_readers_need() -> None:
    """Nobody infers the type of `c`; MatMul's result is FP32, so `d` is, so `c` is: casts stand where they must."""
    given = parse(
        "g (float[2, 8] x) => (float[2, 8] y) { h = MatMul(x, w)\n c = vendor.Odd(h)\n d = Relu(c)\n y = MatMul(d, w) }",
        domains='"vendor" : 1', w=noise(8, 8),
    )  # fmt: skip
    made = convert(given, "fp16", low=["onnx::Relu"]).model  # by itself it would stay FP32, as what `c` is
    assert ops(made) == ["Cast", "MatMul", "Cast", "Odd", "Cast", "Relu", "MatMul", "Cast"]
    del made.graph.value_info[:]  # the last product, with what is inferred from its own casts alone
    made.graph.node[3].CopyFrom(onnx.helper.make_node("Identity", made.graph.node[3].input, made.graph.node[3].output))
    assert types(made)["d"] == "FLOAT16"


def test_values_of_unknown_type_keep_their_readers_fp32() -> None:
    given = parse(
        "g (float[2, 8] x) => (float[2, 8] y) { h = MatMul(x, w)\n c = vendor.Odd(h)\n d = Relu(c)\n e = Mul(d, d)\n"
        " y = vendor.Odd(e) }",
        domains='"vendor" : 1', w=noise(8, 8),
    )  # fmt: skip
    made = convert(given, "fp16", low=["onnx::Relu", "onnx::Mul"])
    assert ops(made.model) == ["Cast", "MatMul", "Cast", "Odd", "Relu", "Mul", "Odd"]


def types_of_inputs(model: onnx.ModelProto, op: str) -> list[str]:
    """Element types of what the first `op` reads, by the casts in front of it."""
    made = {out: node for node in model.graph.node for out in node.output}
    node = next(node for node in model.graph.node if node.op_type == op)
    return [TensorProto.DataType.Name(made[name].attribute[0].i) for name in node.input]


def test_quantized_patterns_are_left_alone() -> None:
    given = parse(
        """g (float[2, 8] x) => (float[2, 8] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            h = MatMul(d, w)
            r = QuantizeLinear(h, s, z)
            e = DequantizeLinear(r, s, z)
            m = Relu(e)
            n = MatMul(m, w)
            y = MatMul(n, w)
        }""",
        s=np.float32(0.05), z=np.uint8(128), w=noise(8, 8, scale=0.2),
    )  # fmt: skip
    made = convert(given, "fp16")
    order = [node.precision for node in made.graph if node.op == "onnx::MatMul"]
    assert order == ["fp32", "fp16", "fp16"]
    assert ops(made.model)[:5] == ops(given)[:5]
    close(made.model, given, {"x": noise(2, 8)}, 2e-2)


@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_parts_in_half_precision_are_left_alone(low: str) -> None:
    given = parse(
        """g (float[2, 8] x) => (float16[2, 8] y, float[2, 8] z) {
            h = Cast<to = 10>(x)
            e = Exp(h)
            y = MatMul(e, w)
            f = Cast<to = 1>(y)
            z = MatMul(f, v)
        }""",
        w=noise(8, 8, scale=0.1).astype(np.float16), v=noise(8, 8, scale=0.1),
    )  # fmt: skip
    made = convert(given, low)
    found = types(made.model)
    assert found["e"] == found["y"] == found["w"] == "FLOAT16"
    assert found["v"] == LOW[low]
    close(made.simulated(), given, {"x": noise(2, 8)}, 2e-2)


def test_the_users_casts_keep_their_rounding() -> None:
    given = parse("g (float[2, 8] x) => (float[2, 8] y) { a = Cast<to = 10>(x)\n b = Cast<to = 1>(a)\n y = Exp(b) }")
    made = convert(given, "bf16", provider="cpu").model
    assert ops(made) == ["Cast", "Cast", "Exp"]
    close(made, given, {"x": noise(2, 8)}, 0.0)


def test_fp64_branches_and_integers_are_never_cast() -> None:
    given = parse(
        """g (double[2, 4] d, float[2, 4] x, int64[2] i) => (double[2, 4] p, float[2, 4] y) {
            p = Mul(d, d)
            g = Gather(w, i)
            y = MatMul(x, g2)
        }""",
        w=np.arange(8, dtype=np.int64), g2=noise(4, 4),
    )  # fmt: skip
    made = convert(given, "fp16").model
    assert types(made)["p"] == "DOUBLE"
    assert types(made)["g"] == "INT64"


def test_initializers_that_are_inputs_can_still_be_overridden() -> None:
    given = parse("g (float[2, 8] x, float[8, 8] w) => (float[2, 8] y) { y = MatMul(x, w) }", w=noise(8, 8))
    made = convert(given, "fp16").model
    assert [i.name for i in made.graph.input] == ["x", "w"]
    assert types(made)["w"] == "FLOAT"
    held, other = session(made), noise(8, 8, seed=9)
    np.testing.assert_allclose(
        held.run(None, {"x": noise(2, 8), "w": other})[0], noise(2, 8) @ other, rtol=1e-2, atol=1e-2
    )
    made = convert(given, "fp16")
    for weights, feeds in ((other, {"w": other}), (noise(8, 8), {})):
        np.testing.assert_allclose(made.run(x=noise(2, 8), **feeds)["y"], noise(2, 8) @ weights, rtol=1e-2, atol=1e-2)


def test_outputs_that_are_inputs_or_initializers_keep_their_names() -> None:
    given = parse(
        "g (float[2, 8] x) => (float[2, 8] x, float[8, 8] w, float[2, 8] y) { y = MatMul(x, w) }", w=noise(8, 8)
    )
    made = convert(given, "fp16")
    assert [o.name for o in made.model.graph.output] == ["x", "w", "y"]
    assert {types(made.model)[name] for name in ("x", "w", "y")} == {"FLOAT"}


def test_unnamed_and_equally_named_nodes_are_told_apart() -> None:
    given = mlp()
    for node in given.graph.node:
        node.name = "same"
    made = convert(given, "fp16", keep_fp32=["same_2"])
    assert next(node for node in made.graph if node.id == "same_2").precision == "fp32"
    assert {node.id for node in made.capture.graph} == {"same", "same_1", "same_2", "same_3"}
    assert {node.id for node in convert(mlp(), "fp16").capture.graph} == {"MatMul_0", "Add_0", "Gelu_0", "Gemm_0"}


def test_empty_optional_operands_and_unused_outputs_keep_their_places() -> None:
    given = parse(
        """g (float[2, 8] x) => (float[2, 2] v, float[2, 8] c) {
            h = MatMul(x, w)
            v, unused = TopK<axis = 1>(h, k)
            c = Clip(h, , top)
        }""",
        w=noise(8, 8), k=np.array([2], np.int64), top=np.float32(0.5),
    )  # fmt: skip
    made = convert(given, "fp16").model
    clip = next(node for node in made.graph.node if node.op_type == "Clip")
    assert clip.input[1] == ""
    close(made, given, {"x": noise(2, 8)}, 1e-2)


def test_zero_size_tensors_and_dynamic_shapes_convert() -> None:
    given = parse("g (float[n, 8] x) => (float[m, 8] y) { c = Concat<axis = 0>(x, e)\n y = MatMul(c, w) }",
                  e=np.zeros((0, 8), np.float32), w=noise(8, 8))  # fmt: skip
    for rows in (0, 3):
        close(convert(given, "fp16").model, given, {"x": noise(rows, 8) + 1}, 1e-2) if rows else session(
            convert(given, "fp16").model
        ).run(None, {"x": noise(0, 8)})


def test_the_opset_is_raised_where_the_low_type_needs_it() -> None:
    given = parse(
        "g (float[2, 8] x) => (float[2, 8] y) { h = MatMul(x, w)\n y = Relu(h) }", opset=11, ir=6, w=noise(8, 8)
    )
    made = convert(given, "bf16")
    assert made.model.opset_import[0].version == 22
    assert any("opset raised from 11 to 22" in note for note in made.notes)
    assert convert(given, "fp16").model.opset_import[0].version == 11


def test_bf16_keeps_to_the_kernels_of_the_provider() -> None:
    given = parse(
        "g (float[2, 8] x) => (float[2, 8] y) { h = MatMul(x, w)\n y = Softplus(h) }", opset=22, w=noise(8, 8)
    )
    assert [n.precision for n in convert(given, "bf16", provider="cpu").graph] == ["fp32", "fp32"]
    session(convert(given, "bf16", provider="cpu").model)
    foreign = convert(given, "bf16", provider="cuda")
    assert next(n.precision for n in foreign.graph if not n.is_cast) == "bf16"
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
            foreign.session()


def test_overrides_and_strictness() -> None:
    made = convert(mlp(), "fp16", keep_fp32="onnx::Gemm", low=["onnx::Gelu"])
    chosen = {node.op: (node.precision, node.decided_by) for node in made.graph if not node.is_cast}
    assert chosen["onnx::Gemm"] == ("fp32", "override")
    assert chosen["onnx::Gelu"] == ("fp16", "override")
    with pytest.raises(RuleError, match=r"MP203.*onnx::Gem"):
        convert(mlp(), "fp16", keep_fp32=["onnx::Gemmm"])
    with pytest.raises(RuleError, match="MP205"):
        convert(
            parse("g (float[2] x) => (float[2] y) { y = vendor.Odd(x) }", domains='"vendor" : 1'), "fp16", strict=True
        )


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match="MP601"):
        convert(tmp_path / "missing.onnx", "fp16")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(OnnxError, match="MP601"):
        convert(tmp_path / "text.onnx", "fp16")
    with pytest.raises(OnnxError, match="MP601"):
        convert(42, "fp16")
    with pytest.raises(OnnxError, match=r"MP601.*'nobody'"):
        convert(parse("g (float[2] x) => (float[2] y) { y = Add(x, nobody) }"), "fp16")
    with pytest.raises(OnnxError, match=r"MP601.*cycle"):
        convert(parse("g (float[2] x) => (float[2] y) { a = Add(x, b)\n b = Relu(a)\n y = Relu(b) }"), "fp16")
    captured = "g (float[2] x, bool c) => (float[2] y) { y = If(c) <a = t () => (float[2] x) {}, b = e () => (float[2] x) {}> }"
    with pytest.raises(OnnxError, match=r"MP601.*'x'"):
        convert(parse(captured.replace("a =", "then_branch =").replace("b =", "else_branch =")), "fp16")


def test_nodes_in_any_order_are_sorted() -> None:
    given = parse(
        "g (float[4, 8] x) => (float[4, 8] y) { h = MatMul(x, w)\n e = Exp(h)\n y = MatMul(e, w) }", w=noise(8, 8)
    )
    turned = onnx.ModelProto()
    turned.CopyFrom(given)
    del turned.graph.node[:]
    turned.graph.node.extend(reversed(given.graph.node))
    made = convert(turned, "fp16")
    assert ops(made.model) == ops(convert(given, "fp16").model)
    close(made.simulated(), given, {"x": noise(4, 8, scale=0.3)}, 1e-2)


def test_save_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, path = convert(mlp(), "fp16"), tmp_path / "deep" / "out.onnx"
    with pytest.raises(OnnxError, match="MP610"):
        made.save(path)
    path.parent.mkdir()
    made.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["out.onnx"]
    assert onnx.load(path) == made.model
    before = path.read_bytes()
    monkeypatch.setattr(type(made.model), "SerializeToString", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["out.onnx"]


def test_large_weights_go_to_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpcompile.onnx.write import check as onnx_check
    from mpcompile.onnx.write import message as onnx_emit

    monkeypatch.setattr(onnx_check, "EXTERNAL_FROM", 1000)
    monkeypatch.setattr(onnx_emit, "HEAVY", 100)
    made = convert(mlp(), "fp16")
    with pytest.raises(OnnxError, match="MP604"):
        _ = made.model
    made.save(tmp_path / "big.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    close(onnx.load(tmp_path / "big.onnx"), mlp(), {"x": noise(3, 16)}, 5e-3)
    broken = convert(mlp(), "fp16")
    broken._written.proto.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(OnnxError, match="MP602"):
        broken.save(tmp_path / "broken.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    foreign = convert(mlp(), "bf16", provider="migraphx")  # what is loaded is its simulation, by way of a file too
    monkeypatch.setattr(onnx_emit, "IN_MEMORY", 0)
    foreign.save(tmp_path / "bf16.onnx")
    monkeypatch.undo()
    again = convert(tmp_path / "big.onnx", "fp16")
    close(again.model, mlp(), {"x": noise(3, 16)}, 5e-3)


def test_a_model_that_would_not_load_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpcompile.onnx.write import edits as onnx_write

    good = onnx_write.write

    def broken(*args: object, **options: object) -> object:
        model = good(*args, **options)
        model.proto.graph.node[0].op_type = "NoSuchOperator"
        return model

    monkeypatch.setattr(onnx_write, "write", broken)
    with pytest.raises(OnnxError, match="MP602"):
        convert(mlp(), "fp16")


def test_conversion_of_its_own_output_changes_nothing() -> None:
    once = convert(mlp(), "fp16").model
    twice = convert(once, "fp16").model
    assert ops(twice) == ops(once)
    assert types(twice) == types(once)


def test_same_model_same_bytes() -> None:
    assert convert(mlp(), "fp16").model.SerializeToString() == convert(mlp(), "fp16").model.SerializeToString()


def test_annotations_say_why() -> None:
    made = convert(mlp(), "fp16").model
    node = next(node for node in made.graph.node if node.op_type == "MatMul")
    props = {p.key: p.value for p in node.metadata_props}
    assert props["mpcompile.verdict"] == "low"
    assert props["mpcompile.precision"] == "fp16"
    assert "accumulation" in props["mpcompile.reason"]
    assert {p.key: p.value for p in made.metadata_props}["mpcompile.policy"].startswith("low=fp16")
    assert not any(
        n.metadata_props for n in convert(mlp(), "fp16", annotate=False).model.graph.node if n.op_type != "Cast"
    )


def test_fp32_changes_nothing() -> None:
    assert ops(convert(mlp(), "fp32").model) == ops(mlp())


def test_scatter_with_a_sum_stays_fp32() -> None:
    given = parse(
        """g (float[4, 4] x, int64[2, 1] i, float[2, 4] u) => (float[4, 4] y) {
            h = MatMul(x, w)
            s = ScatterND<reduction = "add">(h, i, u)
            y = MatMul(s, w)
        }""",
        w=noise(4, 4),
    )
    made = convert(given, "fp16")
    assert next(n for n in made.graph if n.op == "onnx::ScatterND").precision == "fp32"
    close(made.model, given, {"x": noise(4, 4), "i": np.array([[1], [1]]), "u": noise(2, 4)}, 1e-2)


def test_sequences_keep_their_type() -> None:
    given = parse(
        """g (float[4, 4] x) => (float[4, 4] y) {
            h = MatMul(x, w)
            s = SequenceConstruct(h, x)
            e = SequenceAt(s, at)
            y = MatMul(e, w)
        }""",
        w=noise(4, 4), at=np.int64(0),
    )  # fmt: skip
    close(convert(given, "fp16").model, given, {"x": noise(4, 4)}, 1e-2)


def test_simulation_is_the_reference_evaluators_arithmetic() -> None:
    given = parse(
        "g (float[8, 8] x) => (float[8, 8] y) { a = Add(x, w)\n b = Mul(a, w)\n y = MatMul(b, w) }", w=noise(8, 8)
    )
    made = convert(given, "fp16", low=["*"])
    want = ReferenceEvaluator(made.model).run(None, {"x": noise(8, 8)})[0]
    got = session(made.simulated()).run(None, {"x": noise(8, 8)})[0]
    np.testing.assert_array_equal(got.astype(np.float16), want.astype(np.float16))


def test_the_report_calls_parts_in_half_precision_what_they_are() -> None:
    once = convert(mlp(), "fp16", keep_fp32=["onnx::Gemm"]).model
    report = convert(once, "bf16").report().to_dict()
    found = {row["op"]: (row["precision"], row["verdict"]) for row in report["nodes"] if row["op"] != "onnx::Cast"}
    assert found["onnx::MatMul"] == ("fp16", "propagate")
    assert found["onnx::Gemm"] == ("bf16", "low")
    assert report["source"] == "onnx"
    assert report["schema"] == "mpcompile.report/1"


def test_much_fp16_for_a_provider_that_is_not_here_is_loaded_as_its_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's CPU provider takes time with the square of the FP16 nodes."""
    from mpcompile.onnx import converted as onnx_api
    from mpcompile.onnx.write import check as onnx_check

    loaded: list[bool] = []
    real = onnx_check.session

    def watched(model: onnx.ModelProto, **options: object) -> object:
        loaded.append(any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer))
        return real(model, **options)

    monkeypatch.setattr(onnx_check, "session", watched)
    monkeypatch.setattr(onnx_api, "FP16_NODES", 2)
    made = convert(mlp(), "fp16", provider="migraphx")
    assert any("loaded as its simulation" in note for note in made.notes)
    assert not convert(mlp(), "fp16", provider="cpu", ranges=False).notes
    assert loaded == [False, True]
    assert {t.data_type for t in made.model.graph.initializer} == {TensorProto.FLOAT16}


MEASURE = """
import resource, sys
from mpcompile.onnx.write import check as onnx_check
from mpcompile.onnx.convert import convert
onnx_check.EXTERNAL_FROM = 1 << 28
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = convert(sys.argv[1] + "/m.onnx", sys.argv[2])
made.save(sys.argv[1] + "/out.onnx")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_large_weights_are_streamed(low: str, tmp_path: Path) -> None:
    """A gigabyte of weights is converted, checked and saved in less than half of that."""
    size, count = 4096 * 4096 * 4, 16
    (tmp_path / "w.data").touch()
    os.truncate(tmp_path / "w.data", count * size)  # zeros that take no space
    chain = "\n".join(f"h{i + 1} = MatMul(h{i}, w{i})" for i in range(count))
    given = parse(f"g (float[n, 4096] h0) => (float[n, 4096] h{count}) {{ {chain} }}")
    for i in range(count):
        tensor = given.graph.initializer.add(
            name=f"w{i}", data_type=1, dims=[4096, 4096], data_location=TensorProto.EXTERNAL
        )
        for key, text in (("location", "w.data"), ("offset", str(i * size)), ("length", str(size))):
            tensor.external_data.add(key=key, value=text)
    onnx.save(given, tmp_path / "m.onnx")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), low], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "out.onnx.data").stat().st_size == count * size // 2
    assert int(done.stdout) * 1024 < count * size / 2


def test_annotations_survive_saving_and_loading_and_replace_older_ones(tmp_path: Path) -> None:
    given = mlp()
    for key, text in (("author", "me"), ("mpcompile.reason", "stale")):
        given.graph.node[0].metadata_props.add(key=key, value=text)
    convert(given, "bf16").save(tmp_path / "m.onnx")
    onnx.save(onnx.load(tmp_path / "m.onnx"), tmp_path / "again.onnx")
    for model in (onnx.load(tmp_path / "again.onnx"), ir.to_proto(ir.load(tmp_path / "m.onnx"))):
        node = next(node for node in model.graph.node if node.op_type == "MatMul")
        props = {p.key: p.value for p in node.metadata_props}
        assert len(props) == len(node.metadata_props) == 4
        assert props["author"] == "me"
        assert props["mpcompile.precision"] == "bf16"
        assert "accumulation" in props["mpcompile.reason"]


def test_names_of_casts_never_meet_those_of_the_model() -> None:
    given = parse(
        "g (float[2, 8] x) => (float[2, 8] y) { x_fp16 = Exp(x)\n h = MatMul(x, w)\n w_fp16 = Relu(h)\n"
        " a = MatMul(w_fp16, w)\n y = Add(a, x_fp16) }",
        w=noise(8, 8, scale=0.2),
    )
    made = convert(given, "fp16")
    names = [name for node in made.model.graph.node for name in node.output] + [
        t.name for t in made.model.graph.initializer
    ]
    assert len(set(names)) == len(names)
    close(made.simulated(), given, {"x": noise(2, 8)}, 1e-2)


def test_the_report_tells_what_rounding_would_lose() -> None:
    """A raw input that something is taken from is full and keeps its digits; what products give is rounded."""
    given = parse(
        """g (float[8, 16] x) => (float[8, 4] y) {
            d = Sub(x, shift)
            h = MatMul(x, w1)
            r = Relu(h)
            s = Add(d, r)
            y = MatMul(s, w2)
        }""",
        w1=noise(16, 16), w2=noise(16, 4), shift=np.full(16, 1000.0, np.float32),
    )  # fmt: skip
    report = convert(given, "bf16").report().to_dict()
    assert report["origins"] == {"x": "full"}
    origins = {name: one for node in report["nodes"] for name, one in node.get("origins", {}).items()}
    assert (origins["d"], origins["h"], origins["r"], origins["s"]) == ("full", "rounded", "rounded", "full")
    kept = {out: node for node in report["nodes"] for out in node.get("origins", {}) if node["precision"] == "fp32"}
    assert "FP32, because the graph's input x reaches it" in kept["d"]["reason"]
    assert "reaches it through" in kept["s"]["reason"]
