"""Shapes of models that other converters fail on, each converted to both types and run in true low numerics."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_models import noise, parse

from mpcompile.errors import OnnxError
from mpcompile.garbage import no_garbage_collection
from mpcompile.onnx.convert import convert
from mpcompile.onnx.run.session import run, session

TOLERANCE = {"fp16": 2e-2, "bf16": 8e-2}
W = noise(8, 8, scale=0.3)
X = {"x": noise(4, 8)}
LOCAL = '"local" : 1'
MICROSOFT = '"com.microsoft" : 1'
FUNCTIONS = """
<domain: "local", opset_import: ["" : 20, "local" : 1]> lin (a, v) => (b) { m = MatMul(a, v)
    b = local.act(m) }
<domain: "local", opset_import: ["" : 20]> act (a) => (b) { b = Gelu(a) }
<domain: "local", opset_import: ["" : 20]> leaky <alpha> (a) => (b) { b = LeakyRelu <alpha : float = @alpha> (a) }"""
YES, THREE, FIRST = np.array(True), np.int64(3), np.int64(0)

# Name -> (text, weights, inputs, options of `parse`).
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "nested branches that capture": (
        """g (float[4, 8] x, bool c) => (float[4, 8] y) { h = MatMul(x, w)
        y = If(c) <then_branch = a () => (float[4, 8] t) { t = Relu(h) }, else_branch = b () => (float[4, 8] e) {
            e = If(c) <then_branch = a2 () => (float[4, 8] t2) { t2 = MatMul(h, w) },
                       else_branch = b2 () => (float[4, 8] e2) { e2 = MatMul(x, w) }> }> }""",
        {"w": W}, {**X, "c": np.array(False)}, {},
    ),
    "one name in two bodies": (
        """g (float[4, 8] x, bool c) => (float[4, 8] y) { h = MatMul(x, w)
        r = If(c) <then_branch = a () => (float[4, 8] t) { q = MatMul(h, w)
            t = Relu(q) }, else_branch = b () => (float[4, 8] t) { q = Add(h, h)
            t = Tanh(q) }>
        y = MatMul(r, w) }""",
        {"w": W}, {**X, "c": YES}, {},
    ),
    "loop with scan outputs": (
        """g (float[4, 8] x) => (float[4, 8] y, float[3, 4, 8] z) { y, z = Loop(n, t, x) <body =
        b (int64 i, bool c, float[4, 8] s) => (bool c2, float[4, 8] s2, float[4, 8] o) { c2 = Identity(c)
            m = MatMul(s, w)
            s2 = Tanh(m)
            o = MatMul(s2, w) }> }""",
        {"w": W, "n": THREE, "t": YES}, X, {},
    ),
    "loop that returns its own inputs": (
        """g (float[4, 8] x) => (float[4, 8] y) { y, z = Loop(n, t, x, x) <body =
        b (int64 i, bool c, float[4, 8] s, float[4, 8] u) => (bool c, float[4, 8] s2, float[4, 8] u) {
            m = MatMul(s, w)
            s2 = Add(m, u) }> }""",
        {"w": W, "n": THREE, "t": YES}, X, {},
    ),
    "scan": (
        """g (float[8] f, float[5, 8] xs) => (float[8] l, float[5, 8] ys) { l, ys = Scan <num_scan_inputs = 1,
        body = b (float[8] s, float[8] v) => (float[8] s2, float[8] o) { m = MatMul(s, w)
            s2 = Add(m, v)
            o = Identity(s2) }> (f, xs) }""",
        {"w": W}, {"f": noise(8), "xs": noise(5, 8)}, {},
    ),
    "constants in bodies": (
        """g (float[4, 8] x, bool c) => (float[4, 8] y) { y = If(c) <then_branch = a () => (float[4, 8] t) {
            k = Constant <value = float[8] {1, 2, 3, 4, 5, 6, 7, 8}> ()
            q = MatMul(x, w)
            t = Add(q, k) }, else_branch = b () => (float[4, 8] e) { k = Constant <value_float = 2.5> ()
            e = Mul(x, k) }> }""",
        {"w": W}, {**X, "c": YES}, {},
    ),
    "a weight of a body and of the main graph": (
        """g (float[4, 8] x, bool c) => (float[4, 8] y) { h = MatMul(x, w)
        y = If(c) <then_branch = a () => (float[4, 8] t) { t = MatMul(h, w) },
                   else_branch = b () => (float[4, 8] e) { q = Exp(w)
            e = MatMul(x, q) }> }""",
        {"w": W}, {**X, "c": np.array(False)}, {},
    ),
    "functions that call functions": (
        "g (float[4, 8] x) => (float[4, 8] y) { h = local.lin(x, w)\n y = local.lin(h, w) }" + FUNCTIONS,
        {"w": W}, X, {"domains": LOCAL},
    ),
    "a function in a branch": (
        """g (float[4, 8] x, bool c) => (float[4, 8] y) { y = If(c) <then_branch = a () => (float[4, 8] t) {
            t = local.lin(x, w) }, else_branch = b () => (float[4, 8] e) { e = Relu(x) }> }""" + FUNCTIONS,
        {"w": W}, {**X, "c": YES}, {"domains": LOCAL},
    ),
    "a function's attribute": (
        "g (float[4, 8] x) => (float[4, 8] y) { h = MatMul(x, w)\n y = local.leaky <alpha = 0.3> (h) }" + FUNCTIONS,
        {"w": W}, X, {"domains": LOCAL},
    ),
    "sequences": (
        """g (float[4, 8] x) => (float[4, 16] y, int64 n) { h = MatMul(x, w)
        s = SplitToSequence <axis = 1> (h, halves)
        e = SequenceEmpty ()
        s1 = SequenceInsert(e, h)
        s2 = SequenceInsert(s1, x)
        n = SequenceLength(s2)
        c = ConcatFromSequence <axis = 1> (s2)
        y = Relu(c) }""",
        {"w": W, "halves": np.array([4, 4])}, X, {},
    ),
    "a sequence as loop state": (
        """g (float[4, 8] x) => (float[12, 8] y) { e = SequenceEmpty ()
        q = Loop(n, t, e) <body = b (int64 i, bool c, seq(float[4, 8]) s) => (bool c2, seq(float[4, 8]) s2) {
            c2 = Identity(c)
            m = MatMul(x, w)
            s2 = SequenceInsert(s, m) }>
        y = ConcatFromSequence <axis = 0> (q) }""",
        {"w": W, "n": THREE, "t": YES}, X, {},
    ),
    "sequence map": (
        """g (seq(float[4, 8]) x) => (seq(float[4, 8]) y) { y = SequenceMap(x) <body =
        b (float[4, 8] a) => (float[4, 8] r) { m = MatMul(a, w)
            r = Relu(m) }> }""",
        {"w": W}, {"x": [X["x"]]}, {},
    ),
    "optionals": (
        """g (float[4, 8] x) => (float[4, 8] y, bool h) { m = MatMul(x, w)
        o = Optional(m)
        h = OptionalHasElement(o)
        e = OptionalGetElement(o)
        y = MatMul(e, w) }""",
        {"w": W}, X, {},
    ),
    "a mask of the smallest number": (
        """g (float[4, 8] x) => (float[4, 8] y) { h = MatMul(x, w)
        s = Shape(h)
        c = ConstantOfShape <value = float[1] {-3.4e38}> (s)
        g = Greater(h, z)
        a = Where(g, h, c)
        y = Softmax(a) }""",
        {"w": W, "z": np.float32(-1)}, X, {},
    ),
    "a mask that is multiplied": (
        """g (float[4, 8] x, float[4, 4] m) => (float[4, 8] y) { q = MatMul(x, w)
        k = Transpose <perm = [1, 0]> (q)
        s = MatMul(q, k)
        n = Sub(one, m)
        b = Mul(n, c)
        a = Add(s, b)
        p = Softmax <axis = -1> (a)
        y = MatMul(p, q) }""",
        {"w": W, "c": np.float32(-1e9), "one": np.float32(1)}, {**X, "m": np.tril(np.ones((4, 4), np.float32))}, {},
    ),
    "padding by a million": (
        "g (float[4, 8] x) => (float[5, 8] y) { h = MatMul(x, w)\n c = Pad(h, p, v)\n y = Relu(c) }",
        {"w": W, "p": np.array([0, 0, 1, 0]), "v": np.float32(1e6)}, X, {},
    ),
    "bounds as attributes": (
        "g (float[4, 8] x) => (float[4, 8] y) { h = MatMul(x, w)\n c = Clip <min = -1e30, max = 0.5> (h)\n y = Relu(c) }",
        {"w": W}, X, {"opset": 10, "ir": 5},
    ),
    "a bound that is none": (
        "g (float[4, 8] x) => (float[4, 8] y) { h = MatMul(x, w)\n c = Clip(h, lo, hi)\n y = MatMul(c, w) }",
        {"w": W, "lo": np.float32(0), "hi": np.finfo(np.float32).max}, X, {},
    ),
    "outputs that nobody reads": (
        """g (float[4, 8] x) => (float[4, 4] a) { h = MatMul(x, w)
        a, b = Split <axis = 1> (h, s)
        v, i = TopK(h, k) }""",
        {"w": W, "s": np.array([4, 4]), "k": np.array([2])}, X, {},
    ),
    "empty operands and results of an LSTM": (
        """g (float[3, 2, 8] x) => (float[3, 1, 2, 4] y) { h = MatMul(x, v)
        y, , c = LSTM <hidden_size = 4> (h, w, r, , , , ) }""",
        {"v": W, "w": noise(1, 16, 8, scale=0.3), "r": noise(1, 16, 4, scale=0.3)}, {"x": noise(3, 2, 8)}, {},
    ),
    "boxes": (
        """g (float[1, 6, 4] b, float[1, 1, 6] s) => (int64[n, 3] y) { d = MatMul(b, w)
        y = NonMaxSuppression(d, s, m, t) }""",
        {"w": np.eye(4, dtype=np.float32), "m": np.array([3]), "t": np.array([0.5], np.float32)},
        {"b": np.abs(noise(1, 6, 4)).cumsum(-1), "s": np.abs(noise(1, 1, 6))}, {},
    ),
    "a range of floats": (
        "g (float[4, 8] x) => (float[n] r, float[4, 8] y) { y = MatMul(x, w)\n r = Range(z, m, d) }",
        {"w": W, "z": np.float32(0), "m": np.float32(3000), "d": np.float32(1)}, X, {},
    ),
    "training statistics": (
        """g (float[2, 4, 3, 3] x) => (float[2, 4, 3, 3] y, float[4] rm, float[4] rv) {
        c = Conv <kernel_shape = [1, 1]> (x, k)
        y, rm, rv = BatchNormalization <training_mode = 1> (c, s, b, m, v) }""",
        {"k": noise(4, 4, 1, 1), "s": noise(4), "b": noise(4), "m": noise(4), "v": np.abs(noise(4))},
        {"x": noise(2, 4, 3, 3)}, {"opset": 15, "ir": 8},
    ),
    "dynamic quantization": (
        """g (float[4, 8] x) => (float[4, 8] y) { h = MatMul(x, w)
        q, s, z = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, k, z)
        f = Cast <to = 1> (i)
        d = Mul(f, s)
        y = Add(h, d) }""",
        {"w": W, "k": np.arange(64, dtype=np.int8).reshape(8, 8) - 32}, X, {},
    ),
    "a branch in FP64": (
        """g (float[4, 8] x) => (float[4, 8] y, double[4, 8] e) { h = MatMul(x, w)
        d = Cast <to = 11> (h)
        e = Tanh(d)
        f = Cast <to = 1> (e)
        y = MatMul(f, w) }""",
        {"w": W}, X, {},
    ),
    "integers cast to the type of a float": (
        "g (float[4, 8] x, int64[4, 8] i) => (float[4, 8] y) { h = MatMul(x, w)\n c = CastLike(i, h)\n y = Add(h, c) }",
        {"w": W}, {**X, "i": np.ones((4, 8), np.int64)}, {},
    ),
    "fused operators of ONNX Runtime": (
        """g (float[2, 4, 8] x) => (float[2, 4, 8] y) { h = com.microsoft.FusedMatMul(x, w)
        b = com.microsoft.BiasGelu(h, bias)
        s, , , r = com.microsoft.SkipLayerNormalization(b, x, scale, bias)
        y = com.microsoft.MultiHeadAttention <num_heads = 2> (s, s, s) }""",
        {"w": W, "bias": noise(8), "scale": noise(8)}, {"x": noise(2, 4, 8)}, {"domains": MICROSOFT},
    ),
    "strings": (
        "g (string[2] s, float[4, 8] x) => (string[2] t, float[4, 8] y) { t = Identity(s)\n y = MatMul(x, w) }",
        {"w": W}, {**X, "s": np.array(["a", "b"])}, {},
    ),
    "a factor without dimensions": (
        "g (float f, float[4, 8] x) => (float[4, 8] y) { m = MatMul(x, w)\n y = Mul(m, f) }",
        {"w": W}, {**X, "f": np.array(2.5, np.float32)}, {},
    ),
    "nothing to do": ("g (float[4, 8] x) => (float[4, 8] x) { }", {}, X, {}),
    "no rows": (
        "g (float[n, 8] x) => (float[n, 8] y) { h = MatMul(x, w)\n y = Softmax(h) }",
        {"w": W}, {"x": np.zeros((0, 8), np.float32)}, {},
    ),
}  # fmt: skip


def same(given: onnx.ModelProto, made: Any, feeds: dict[str, Any], tolerance: float) -> None:
    want, got = run(session(given), feeds), run(session(made), feeds)
    assert list(got) == list(want)
    for name, one in want.items():
        for a, b in zip(*((x if isinstance(x, list) else [x]) for x in (got[name], one)), strict=True):
            assert a.dtype == b.dtype
            if b.dtype.kind != "f":
                np.testing.assert_array_equal(a, b)
            elif b.size:
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(np.abs(b).max(), 1e-6))


@pytest.mark.parametrize("low", ["fp16", "bf16"])
@pytest.mark.parametrize("name", list(CASES))
def test_it_converts_loads_and_computes_the_same(name: str, low: str) -> None:
    text, weights, feeds, options = CASES[name]
    given = parse(text, **options, **weights)
    made = convert(given, low)
    products = [n for n in made.graph if n.kind in ("matmul", "convolution", "attention") and not n.is_cast]
    assert all(n.precision == low for n in products)
    same(given, made.simulated(), feeds, TOLERANCE[low])
    if low == "fp16":
        same(given, made.model, feeds, TOLERANCE[low])


@pytest.mark.parametrize("low", ["fp16", "bf16"])
@pytest.mark.parametrize("opset", range(11, onnx.defs.onnx_opset_version() + 1))
def test_every_opset(opset: int, low: str) -> None:
    given = parse(
        """g (float[4, 8] x) => (float[4, 8] y) { h = MatMul(x, w)
        s = Softmax <axis = 1> (h)
        r = ReduceMax <keepdims = 1> (s)
        d = Div(s, r)
        p = Sqrt(d)
        c = Clip(p, lo, hi)
        y = Gemm(c, w, b) }""",
        opset=opset, ir=6 if opset < 15 else 8 if opset < 19 else 10, w=W, b=noise(8), lo=np.float32(0), hi=np.float32(2),
    )  # fmt: skip
    made = convert(given, low)
    assert made.model.opset_import[0].version == max(opset, 22 if low == "bf16" and opset < 13 else 0)
    same(given, made.simulated(), X, TOLERANCE[low])


@pytest.mark.parametrize("indices", [np.array([3, 9]), np.array([[0, 3], [1, 1]])])
def test_sparse_initializers(indices: np.ndarray) -> None:
    given = parse("g (float[4, 8] x) => (float[4, 8] y) { y = MatMul(x, w) }")
    sparse = given.graph.sparse_initializer.add(dims=[8, 8])
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(indices, "i"))
    dense = np.zeros((8, 8), np.float32)
    dense[0, 3], dense[1, 1] = 1, 2
    same(
        parse("g (float[4, 8] x) => (float[4, 8] y) { y = MatMul(x, w) }", w=dense),
        convert(given, "fp16").model,
        X,
        1e-2,
    )


def test_what_onnx_ir_cannot_read_is_an_error_of_ours() -> None:
    given = parse("g (float[4, 8] x) => (float[4, 8] y) { h = Relu(x)\n h = Relu(x)\n y = Add(h, h) }")
    with pytest.raises(OnnxError, match=r"MP601(.|\n)*redeclared"):
        convert(given, "fp16")


def test_descriptions_of_values_in_any_order_stale_and_twice() -> None:
    """What a model says of its values beside the nodes need be neither in their order nor true of this graph."""
    text = "g (float[4, 8] x) => (float[4, 8] y) { h = MatMul(x, w)\n e = Exp(h)\n y = MatMul(e, w) }"
    plain, given = parse(text, w=W), parse(text, w=W)
    for name, shape in (("gone", [2]), ("y", [4, 8]), ("e", [4, 8]), ("h", [4, 8]), ("w", [8, 8]), ("h", [4, 8])):
        given.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, shape))
    want, got = convert(plain, "fp16", keep_io=False).model, convert(given, "fp16", keep_io=False).model
    types = [{info.name: info.type.tensor_type.elem_type for info in made.graph.value_info} for made in (want, got)]
    assert types[0] == types[1]
    assert list(got.graph.node) == list(want.graph.node)
    assert "gone" not in types[1]
    assert "y" not in types[1]


def test_types_that_no_inference_gives_are_written() -> None:
    """ONNX knows nothing of this operator, ONNX Runtime's schema does."""
    given = parse("g (float[4, 8] x) => (float[4, 8] y) { h = com.microsoft.QuickGelu(x)\n y = MatMul(h, w) }",
                  domains=MICROSOFT, w=W)  # fmt: skip
    made = convert(given, "fp16", low=["com.microsoft::QuickGelu"])
    assert made.capture.graph.values["h"].dtype == "fp32"
    told = {info.name: info.type.tensor_type.elem_type for info in made.model.graph.value_info}
    assert told["h"] == onnx.TensorProto.FLOAT16


def test_constants_of_a_body_in_a_body_are_converted_once() -> None:
    given = parse(
        """g (float[4, 8] x, bool c) => (float[4, 8] y) { k0 = Constant <value_int = 3> ()
        y = If(c) <then_branch = a () => (float[4, 8] t) { t = If(c) <then_branch = a2 () => (float[4, 8] t2) {
            k = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]> ()
            m = MatMul(x, w)
            t2 = Add(m, k) }, else_branch = b2 () => (float[4, 8] x2) { x2 = Relu(x) }> },
            else_branch = b () => (float[4, 8] e) { e = Relu(x) }> }""",
        w=W,
    )
    made = convert(given, "fp16")
    assert not [node for node in made.capture.graph if node.op == "onnx::Constant"]
    assert made.capture.graph.values["k"].range == (1.0, 8.0)


def test_sequences_keep_their_type_when_inputs_are_given_low() -> None:
    given = parse("g (seq(float[4, 8]) xs, float[4, 8] x) => (float[4, 8] y) { s = SequenceAt(xs, i)\n y = Add(s, x) }",
                  i=FIRST)  # fmt: skip
    made = convert(given, "fp16", keep_io=False, provider="cpu")
    assert made.model.graph.input[0] == given.graph.input[0]
    assert made.model.graph.input[1].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_a_control_node_and_a_node_in_its_body_may_share_a_name() -> None:
    given = parse("""g (float[4, 8] x, bool c) => (float[4, 8] y) { y = If(c) <
        then_branch = a () => (float[4, 8] t) { t = Relu(x) }, else_branch = b () => (float[4, 8] e) { e = Tanh(x) }> }""")
    control = given.graph.node[0]
    control.name = control.attribute[0].g.node[0].name = control.attribute[1].g.node[0].name = "same"
    made = convert(given, "fp16")
    assert {node.id for node in made.capture.graph} == {"same", "same_1", "same_2"}


def test_external_data_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    given = parse("g (float[4, 8] x) => (float[4, 8] y) { y = MatMul(x, w) }", w=noise(8, 8))
    tensor = given.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="gone.data")
    onnx.save(given, tmp_path / "m.onnx")
    with pytest.raises(OnnxError, match=r"MP601(.|\n)*gone.data"):
        convert(tmp_path / "m.onnx", "fp16")


@pytest.mark.parametrize("frozen", [False, True])
def test_what_was_made_without_collection_is_old_and_what_the_caller_froze_stays_frozen(frozen: bool) -> None:
    found: list[list[int]] = []
    if frozen:
        gc.freeze()
    count = gc.get_freeze_count()
    try:
        with no_garbage_collection():
            assert not gc.isenabled()
            found.append([])
        assert gc.isenabled()
        assert gc.get_freeze_count() == count
        assert frozen or any(one is found[0] for one in gc.get_objects(2))
    finally:
        gc.unfreeze()
