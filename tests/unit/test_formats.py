"""One row per format says what torch, numpy and ONNX say of it, and no other file has a table of its own."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from mpcompile.formats import FORMATS, Format

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
def test_a_row_says_what_torch_says(one: Format) -> None:
    info = torch.finfo(getattr(torch, one.torch))
    assert (one.bytes, one.largest, one.smallest_normal) == (info.bits // 8, info.max, info.tiny)
    assert 2.0 ** (1 - one.significand) == info.eps
    tiny = torch.tensor(one.smallest, dtype=torch.float64).to(getattr(torch, one.torch))
    assert float(tiny) == one.smallest, "the smallest subnormal number is a number of the format"
    half = torch.tensor(one.smallest * 0.4999, dtype=torch.float64).to(torch.float32).to(getattr(torch, one.torch))
    assert float(half) == 0.0, "less than half of it rounds to zero"


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
def test_a_row_names_numpy_s_and_onnx_s_types(one: Format) -> None:
    held = np.dtype(getattr(np, one.numpy, None) or getattr(ml_dtypes, one.numpy))
    assert held.itemsize == one.bytes
    element = onnx.TensorProto.DataType.Value(one.onnx)
    assert onnx.helper.tensor_dtype_to_np_dtype(element) == held
    assert one.onnx_type in onnx.defs.get_schema("Cast", 25).type_constraints[0].allowed_type_strs


def test_no_other_file_says_what_a_format_is() -> None:
    """A dict or tuple that puts two formats side by side is a copy of the rows."""
    table = re.compile(r'"fp16": |torch\.float16, torch\.bfloat16|torch\.bfloat16, torch\.float16|65504(?!\d)')
    files = [*(ROOT / "mpcompile").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    code = {
        file.relative_to(ROOT): re.sub(r'""".*?"""|#.*', "", file.read_text(encoding="utf-8"), flags=re.S)
        for file in files
        if "tools" not in file.parts and file.name != "formats.py"
    }
    assert len(code) > 100
    # OPSETS is what ONNX's operators took when, and a rate is a device's.
    known = {"mpcompile/onnx/read/prepare.py", "mpcompile/devices.py"}
    assert {str(name) for name, text in code.items() if table.search(text)} <= known
