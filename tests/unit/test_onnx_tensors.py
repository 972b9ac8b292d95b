"""Ranges of initializers: many at once are the same as one by one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from mpcompile.onnx import tensors as onnx_tensors
from mpcompile.onnx.tensors import range_of, ranges_of


def tensors() -> list[Any]:
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(size).astype(np.float32) for size in (1, 8, 0, 300, 7)]
    arrays += [np.array(row, np.float32) for row in ([math.nan, 2, -1], [math.nan], [math.inf, -3.0], [-0.0])]
    arrays += [np.arange(4, dtype=np.float16), np.full((2, 2), 65504.0, np.float32)]
    listed = TensorProto(data_type=TensorProto.FLOAT, dims=[2], float_data=[3.0, -4.0])
    return [*map(numpy_helper.from_array, arrays), listed]


@pytest.mark.parametrize("together", [1, 3, 100])
def test_ranges_together_are_those_of_each(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_tensors, "TOGETHER", together)
    given = tensors()
    found = ranges_of(given)
    assert found == [range_of(one) for one in given]
    assert found[5] == (-1.0, 2.0)  # past the NaN
    assert found[6] is None
    assert found[7] == (-3.0, math.inf)


def test_a_tensor_of_too_few_bytes_is_an_error() -> None:
    good = numpy_helper.from_array(np.ones(2, np.float32))
    broken = TensorProto(data_type=TensorProto.FLOAT, dims=[1], raw_data=b"abc")
    with pytest.raises(ValueError, match="multiple"):
        ranges_of([good, broken])
