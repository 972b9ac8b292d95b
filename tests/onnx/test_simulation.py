"""The simulation against onnx's reference evaluator, on onnx's own node tests: every low operator that the tests reach.

The same simulated model runs in both.  Where the bits differ, the two differ in the last bit of an FP32 result (the
order of a sum, an exponential), so that a value near the middle of two low numbers falls to the other side: never more
than one step of the low type.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.backend.test import loader
from onnx.reference import ReferenceEvaluator

from mpcompile.formats import LOW
from mpcompile.onnx.convert import convert
from mpcompile.onnx.run.session import run, session

EPSILON = {"fp16": float(np.finfo(np.float16).eps), "bf16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)}
# A recurrence carries a last bit on; a step at its small values is more, relative to them.
STEPS = {"GRU": 128}


@cache
def node_tests() -> list[tuple[str, onnx.ModelProto, dict[str, Any]]]:
    """Name, model and inputs of each node test of plain FP32 tensors; onnx makes them once in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = loader.load_model_tests(kind="node")
    found = []
    for test in made:
        ends = (*test.model.graph.input, *test.model.graph.output)
        if any(i.type.WhichOneof("value") != "tensor_type" for i in ends):
            continue
        names = [i.name for i in test.model.graph.input]
        if any(i.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for i in test.model.graph.input):
            found.append((test.name, test.model, dict(zip(names, test.data_sets[0][0], strict=False))))
    return found


def runs(model: onnx.ModelProto, feeds: dict[str, Any]) -> bool:
    """True when both run the FP32 model and agree, and onnx's checker likes it."""
    try:
        onnx.checker.check_model(model, full_check=True)
        got = run(session(model, ["CPUExecutionProvider"]), feeds).values()
        want = ReferenceEvaluator(model).run(None, feeds)
        return all(distance(a, b) < 1e-3 for a, b in zip(got, want, strict=True))
    except Exception:  # both have errors of their own
        return False


def distance(got: Any, want: Any) -> float:
    """The largest difference, relative to the element; infinite where one is a number and the other is not."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    with np.errstate(invalid="ignore"):
        off = np.where((got == want) | (np.isnan(got) & np.isnan(want)), 0.0, np.abs(got - want))
    return float((np.where(np.isnan(off), np.inf, off) / np.maximum(np.abs(want), 1e-3)).max(initial=0.0))


@pytest.mark.slow
@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_the_bits_are_the_reference_evaluators(low: str) -> None:
    identical = total = 0
    for name, model, feeds in node_tests():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not runs(model, feeds):
                continue
            made = convert(model, low, low=["*"])
            operators = {n.op.rpartition("::")[2] for n in made.graph if n.precision in LOW and not n.is_cast}
            if not operators:
                continue
            simulated = made.simulated()
            got = list(run(session(simulated, ["CPUExecutionProvider"]), feeds).values())
            want = ReferenceEvaluator(simulated).run(None, feeds)
        total += 1
        same = all(
            np.array_equal(a, b, equal_nan=np.asarray(b).dtype.kind == "f") for a, b in zip(got, want, strict=True)
        )
        identical += same
        steps = max((STEPS.get(op, 1) for op in operators), default=1) + len(operators) // 4
        assert same or max(map(distance, got, want)) <= steps * EPSILON[low], name
    assert total > 600
    assert identical > 0.96 * total
