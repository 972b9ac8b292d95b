"""Models that were made to do harm: refused by code, in bounded time and memory, with nothing read or written elsewhere."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from onnx_models import mlp, noise, parse

from mpcompile.errors import MPCompileError, OnnxError
from mpcompile.onnx.convert import convert

HUGE = 1 << 40
BELL = "\x1b[2J\x07\x9b31m\u202e"


@contextmanager
def bounded(seconds: float = 10.0, more: int = 1 << 30) -> Iterator[None]:
    """What runs inside takes no longer, and no more memory."""
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert time.monotonic() - start < seconds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < more


def refused(model: object, *codes: str) -> str:
    with bounded(), pytest.raises(OnnxError) as caught:
        convert(model, "fp16")
    assert caught.value.code in (codes or ("MP601", "MP609")), caught.value
    return str(caught.value)


def linear() -> onnx.ModelProto:
    return parse("g (float[4, 8] x) => (float[4, 8] y) { y = MatMul(x, w) }", w=noise(8, 8))


def beside(folder: Path, location: str, **more: str) -> Path:
    """A model in a file whose weight lies at `location`."""
    model = linear()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        weight.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


# ------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.parametrize("dims", [[HUGE], [1 << 20, 1 << 20], [-8, 8], [-1, -64], [9, 8], [8], [0, 8], [1] * 100])
@pytest.mark.parametrize("field", ["raw", "float_data"])
def test_dimensions_that_the_bytes_do_not_bear_out(dims: list[int], field: str) -> None:
    model = linear()
    weight = model.graph.initializer[0]
    if field == "float_data":
        weight.ClearField("raw_data")
        weight.float_data.extend([1.0] * 64)
    del weight.dims[:]
    weight.dims.extend(dims)
    assert "'w'" in refused(model)


@pytest.mark.parametrize("where", ["constant", "body", "function", "attributes"])
def test_tensors_that_are_no_initializers_are_looked_at_too(where: str) -> None:
    claim = TensorProto(data_type=TensorProto.FLOAT, dims=[HUGE], raw_data=b"1234")
    node = onnx.helper.make_node("Constant", [], ["c"], value=claim)
    if where == "constant":
        model = parse("g (float[4] x) => (float[4] y) { y = Relu(x) }")
        model.graph.node.insert(0, node)
    elif where == "attributes":
        model = parse("g (float[4] x) => (float[4] y) { y = Relu(x) }")
        odd = model.graph.node.add(op_type="Odd", domain="vendor", input=["x"], output=["z"])
        odd.attribute.add(name="many", type=onnx.AttributeProto.TENSORS).tensors.append(claim)
    elif where == "body":
        model = parse("g (float[4] x, bool c) => (float[4] y) { y = If(c) <then_branch = a () => (float[4] t) "
                      "{ t = Relu(x) }, else_branch = b () => (float[4] t) { t = Neg(x) }> }")  # fmt: skip
        model.graph.node[0].attribute[0].g.node.insert(0, node)
    else:
        model = doubling(0)
        model.functions[0].node.insert(0, node)
    refused(model, "MP609")


@pytest.mark.parametrize("places", [[70], [-1], [0, 1, 2]])
def test_sparse_tensors_that_reach_beyond_themselves(places: list[int]) -> None:
    model = parse("g (float[4, 8] x) => (float[4, 8] y) { y = MatMul(x, w) }")
    sparse = model.graph.sparse_initializer.add(dims=[8, 8])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array(places), "i"))
    refused(model, "MP609")


def test_a_sparse_tensor_that_no_memory_holds() -> None:
    model = parse("g (float[4, 8] x) => (float[4, 8] y) { y = MatMul(x, w) }")
    sparse = model.graph.sparse_initializer.add(dims=[1 << 20, 1 << 20])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([3]), "i"))
    refused(model, "MP609")


@pytest.mark.parametrize(
    "op", ["ConstantOfShape(s)", "Expand(one, s)", "Tile(one1, s1)", "RandomNormal<shape=[1099511627776]>()"]
)
def test_results_that_no_memory_holds_are_neither_folded_nor_computed(op: str) -> None:
    model = parse(f"g (float[4] x) => (float[4] y, float[n] z) {{ h = {op}\n z = Relu(h)\n y = Relu(x) }}",
                  s=np.array([HUGE]), s1=np.array([HUGE]), one=np.float32(1), one1=np.ones(1, np.float32))  # fmt: skip
    with bounded():
        convert(model, "fp16")


def test_negative_dimensions_of_values_are_unknown_ones() -> None:
    model = mlp()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    made = convert(model, "fp16")
    assert any("negative" in note for note in made.notes)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == -1
    assert made.run(x=noise(3, 16))["y"].shape == (3, 4)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * 64, b"not a model\n" * 100, b"\x08\x0a", os.urandom(512)])
def test_files_that_are_no_models(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    refused(str(path), "MP601")


def test_an_empty_message_is_no_model() -> None:
    refused(onnx.ModelProto(), "MP601")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(path))


@pytest.mark.parametrize("make", [fifo, unix_socket, Path.mkdir])
def test_what_is_no_file_is_not_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "m.onnx")
    refused(str(tmp_path / "m.onnx"), "MP601")
    make(tmp_path / "w.data")
    refused(str(beside(tmp_path, "w.data")), "MP609")


def test_a_sparse_file_beyond_protobuf_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "m.onnx", "wb") as file:
        file.truncate(1 << 36)
    refused(str(tmp_path / "m.onnx"), "MP601")


@pytest.mark.parametrize("location", ["model.onnx", "./model.onnx", "../secret", "sub/../../secret", "/etc/passwd",
                                      "/dev/zero", "", "a\0b", "..\\secret", "link", "folder", "hard"])  # fmt: skip
def test_locations_that_are_not_the_models_own(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 256)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    path = beside(folder, location)
    os.link(path, folder / "hard")
    before = sorted(tmp_path.rglob("*"))
    refused(str(path), "MP609")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("told", [{"offset": "-4"}, {"offset": "8"}, {"length": "4"}, {"length": "-256"}, {"offset": "x"},
                                  {"offset": str(HUGE)}, {"length": str(HUGE)}])  # fmt: skip
def test_places_in_a_data_file_that_are_not_there(told: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(noise(8, 8).tobytes())
    refused(str(beside(tmp_path, "w.data", **told)), "MP609")


def test_data_beside_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "w").write_bytes(b"four" + noise(8, 8).tobytes())
    (tmp_path / "link").symlink_to(tmp_path / "deeper" / "w")
    for location in ("deeper/w", "link"):
        made = convert(str(beside(tmp_path, location, offset="4")), "fp16")
        stored = numpy_helper.to_array(made.model.graph.initializer[0])
        np.testing.assert_array_equal(stored, noise(8, 8).astype(np.float16))


def test_nothing_is_written_where_no_folder_is(tmp_path: Path) -> None:
    made = convert(mlp(), "fp16")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name in ("no/such/m.onnx", "pipe", "folder", "a\0b"):
        with pytest.raises(OnnxError, match="MP610"):
            made.save(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


# -------------------------------------------------------------------------------------------------------- functions


def doubling(depth: int, *, circle: bool = False, body: bool = False) -> onnx.ModelProto:
    """Each function calls the one before it twice."""
    model = parse(f"g (float[4] x) => (float[4] y) {{ y = local.f{depth}(x) }}", domains='"local" : 1')
    for i in range(depth + 1):
        called = f"f{i - 1}" if i else ("f0" if circle else "Relu")
        domain = "local" if i or circle else ""
        nodes = [onnx.helper.make_node(called, ["a"], ["h"], domain=domain),
                 onnx.helper.make_node(called, ["h"], ["b"], domain=domain)]  # fmt: skip
        if body:
            flag = onnx.helper.make_node("Constant", [], ["flag"], value=numpy_helper.from_array(np.array(True)))
            branch = onnx.helper.make_graph(nodes, "t", [], [onnx.helper.make_tensor_value_info("b", 1, [4])])
            nodes = [flag, onnx.helper.make_node("If", ["flag"], ["b"], then_branch=branch, else_branch=branch)]
        imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("local", 1)]
        model.functions.append(onnx.helper.make_function("local", f"f{i}", ["a"], ["b"], nodes, imports))
    return model


@pytest.mark.parametrize("body", [False, True])
@pytest.mark.parametrize("depth", [18, 40, 3000])
def test_functions_that_double_are_not_written_out(depth: int, body: bool) -> None:
    refused(doubling(depth, body=body), "MP609")


def test_functions_that_call_themselves() -> None:
    assert "circle" in refused(doubling(3, circle=True), "MP609")


def test_a_few_functions_are_written_out() -> None:
    assert len(convert(doubling(4), "fp16").model.graph.node) >= 32


def test_bodies_nested_beyond_bounds() -> None:
    model = linear()
    graph = model.graph
    for _ in range(60):  # in place: protobuf copies no message that is nested so deep
        node = graph.node.add(op_type="If", input=["c"], output=["t"])
        graph = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
    refused(model, "MP609")


# --------------------------------------------------------------------------------------------------------------- names


def renamed(old: str, new: str) -> onnx.ModelProto:
    model = mlp()
    for node in model.graph.node:
        node.name = f"{new}/{node.op_type}"
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
    return model


@pytest.mark.parametrize("name", [f"h{BELL}", "a\0b", "new\nline", "\ttab"])
def test_no_terminal_obeys_a_name(name: str) -> None:
    made = convert(renamed("h", name), "fp16")
    said = str(made.report()) + "\n".join(made.notes)
    assert not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c == "\u202e" for c in said)
    model = renamed("h", name)
    model.graph.node[0].input[0] = f"absent{name}"
    with pytest.raises(OnnxError) as caught:
        convert(model, "fp16")
    assert not set(str(caught.value)) & set("\0\x1b\x07\x9b\u202e")


# ------------------------------------------------------------------------------------------------------------ anything

BASES = [mlp().SerializeToString(), doubling(2).SerializeToString(), linear().SerializeToString()]


@settings(max_examples=60)
@given(st.sampled_from(BASES), st.data())
def test_whatever_the_bytes_the_answer_is_a_model_or_a_code(base: bytes, data: st.DataObject) -> None:
    """A model with some bytes changed, cut out or repeated."""
    held = bytearray(base)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(held) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "repeat"]))
        if kind == "flip":
            held[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del held[at : at + data.draw(st.integers(1, 8))]
        else:
            held[at:at] = held[at : at + 8]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.onnx")
        path.write_bytes(bytes(held))
        with contextlib.suppress(MPCompileError):
            convert(str(path), "fp16")
