"""Ranges of an ONNX model as a file: what is measured, who takes it, and that another graph's are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from mpcompile import mpcompile
from mpcompile.errors import MPCompileError, OnnxError, RuleError
from mpcompile.onnx.ranges import OnnxRanges, measure
from mpcompile.tools.main import app

WIDTH = 64


def net(large: float = 40.0, inner: int = WIDTH, relu: str = "Relu") -> onnx.ModelProto:
    """Two products, whose second overflows FP16 where `large` is, a softmax and a third."""
    random = np.random.default_rng(0)
    shapes = {"a": (WIDTH, inner, large), "b": (inner, WIDTH, large), "c": (WIDTH, WIDTH, 1.0)}
    weights = [
        numpy_helper.from_array((random.standard_normal((rows, columns)) * size).astype(np.float32), name)
        for name, (rows, columns, size) in shapes.items()
    ]
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "a"], ["h"]), node(relu, ["h"], ["r"]), node("MatMul", ["r", "b"], ["d"]),
        node("Softmax", ["d"], ["s"], axis=-1), node("MatMul", ["s", "c"], ["y"]),
    ]  # fmt: skip
    ports = [helper.make_tensor_value_info(name, 1, [8, WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "net", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture(scope="module")
def samples() -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((8, WIDTH)).astype(np.float32)}


def hazards(made: Any) -> dict[str, str]:
    return {row.op.removeprefix("onnx::"): row.reason for row in made.report().nodes if row.decided_by == "hazard"}


def test_what_was_measured_is_the_reason_and_survives_its_file(samples: dict[str, Any], tmp_path: Path) -> None:
    model, path = net(), tmp_path / "ranges.json"
    x = samples["x"]
    first, second = (numpy_helper.to_array(one) for one in model.graph.initializer[:2])
    found = measure(model, samples)
    d = np.maximum(x @ first, 0) @ second
    assert found.on == ""
    assert set(found.values) >= {"x", "h", "r", "d", "s"}
    assert (found.values["d"].least, found.values["d"].most) == pytest.approx((d.min(), d.max()), rel=1e-5)
    found.save(path)
    assert OnnxRanges.load(path) == found
    for given in (found, str(path), path):
        why = hazards(mpcompile(model, "fp16", ranges=given, provider="cpu"))
        assert set(why) == {"MatMul", "Softmax"}
        assert f"'d' reaches {np.abs(d).max():.4g}" in why["Softmax"]
    assert mpcompile(model, "bf16", ranges=path).report().nodes


def test_generated_inputs_are_named_and_a_tame_model_has_no_hazard(tmp_path: Path) -> None:
    found = measure(net(large=0.1))
    assert found.on.startswith("2 generated inputs")
    assert "Softmax" not in hazards(mpcompile(net(large=0.1), "fp16", ranges=found))


@pytest.mark.parametrize(
    ("other", "where"), [({"inner": 32}, "a"), ({"relu": "Tanh"}, "r")], ids=["shape", "operation"]
)
def test_ranges_of_another_graph_are_refused(other: dict[str, Any], where: str, samples: dict[str, Any]) -> None:
    found = measure(net(), samples)
    with pytest.raises(RuleError, match="MP207") as caught:
        mpcompile(net(**other), "fp16", ranges=found)
    assert caught.value.where == where
    # Other weights of the same shapes are the same graph.
    assert mpcompile(net(large=39.0), "fp16", ranges=found).ranges


def steps(
    *ops: str, factor: float = 2.0, axes: tuple[int, ...] = (0,), rows: int = 8, sizes: tuple[int, ...] = ()
) -> onnx.ModelProto:
    """A product, and `ops` on what the one before gave; Mul by `factor`, ReduceSum over `axes`, Reshape to `sizes`."""
    weight = numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")
    numbers = [("factor", np.float32(factor)), ("axes", np.int64(axes)), ("sizes", np.int64(sizes or (rows, 2, 8)))]
    second = {"Mul": "factor", "ReduceSum": "axes", "Reshape": "sizes"}
    nodes, read = [helper.make_node("MatMul", ["x", "w"], ["h0"])], "h0"
    for number, op in enumerate(ops, 1):
        nodes.append(helper.make_node(op, [read, *([second[op]] if op in second else [])], [f"h{number}"]))
        read = f"h{number}"
    constants = [
        numpy_helper.from_array(np.asarray(array), name)
        for name, array in numbers
        if name in {second.get(o) for o in ops}
    ]
    ports = [helper.make_tensor_value_info("x", 1, [rows, 16])], [helper.make_tensor_value_info(read, 1, None)]
    graph = helper.make_graph(nodes, "steps", *ports, [weight, *constants])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    ("was", "now", "refused"),
    [
        ({"ops": "Relu Tanh"}, {"ops": "Tanh Relu"}, True),
        ({"ops": "Relu Tanh"}, {"ops": "Tanh"}, True),
        ({"ops": "Relu Mul"}, {"ops": "Relu Mul", "factor": 1e6}, True),
        ({"ops": "Relu Mul"}, {"ops": "Relu Mul", "factor": 2.5}, False),  # as weights of a training move
        ({"ops": "ReduceSum"}, {"ops": "ReduceSum", "axes": (1,)}, True),
        ({"ops": "ReduceSum"}, {"ops": "ReduceSum", "axes": (1,), "rows": 4}, True),
        ({"ops": "Reshape"}, {"ops": "Reshape", "sizes": (8, 8, 2)}, True),
        ({"ops": "Reshape"}, {"ops": "Reshape", "rows": 4}, False),  # another batch
        ({"ops": "Relu"}, {"ops": "Relu", "rows": 4}, False),
    ],
)  # fmt: skip
def test_what_is_another_graph_and_what_another_batch(was: dict[str, Any], now: dict[str, Any], refused: bool) -> None:
    def made(ops: str, **told: Any) -> onnx.ModelProto:
        return steps(*ops.split(), **told)

    found = measure(made(**was))
    if not refused:
        assert mpcompile(made(**now), "fp16", ranges=found).ranges
        return
    with pytest.raises(RuleError, match="MP207"):
        mpcompile(made(**now), "fp16", ranges=found)


def test_what_is_no_file_of_such_ranges_is_refused(tmp_path: Path, samples: dict[str, Any]) -> None:
    wrong = {"empty.json": "", "list.json": "[]", "torch.json": '{"schema": "mpcompile.ranges/1"}',
             "cut.json": '{"schema": "mpcompile.onnx-ranges/2", "values": {"x": [1]}}'}  # fmt: skip
    for name, text in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(RuleError, match="MP208"):
            mpcompile(net(), "fp16", ranges=tmp_path / name)
    with pytest.raises(OnnxError, match="MP606"):
        mpcompile(net(), "fp16", ranges=measure(net(), samples), calibrate=samples)
    with pytest.raises(MPCompileError, match="MP606"):
        measure(net(), {"x": np.zeros((3, 5), np.float32)})


def test_the_command_line_measures_and_takes_it(tmp_path: Path, samples: dict[str, Any]) -> None:
    model, data, out = (str(tmp_path / name) for name in ("net.onnx", "data.npz", "ranges.json"))
    onnx.save(net(), model)
    np.savez(data, **samples)

    def call(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == code, done.output
        return done.output

    facts = json.loads(call("calibrate", model, "--samples", data, "-o", out, "--json"))
    assert list(facts["large"]) == ["d"]
    assert "d reaches" in call("calibrate", model, "-o", out)
    for verb in (["inspect", model], ["explain", model, "d"], ["compare", model, "--samples", data]):
        assert "Traceback" not in call(*verb, "--ranges", out)
    assert "written" in call("convert", model, str(tmp_path / "out.onnx"), "--ranges", out)
    assert "MP800" in call("convert", model, str(tmp_path / "out.onnx"), "--ranges", out, "--no-ranges", code=2)
    assert "MP800" in call("calibrate", model, "--batches", "2", code=2)
    onnx.save(net(relu="Tanh"), model)
    assert "MP207" in call("inspect", model, "--ranges", out, code=2)
