"""The kernels that make FP8 copies: their scales and layouts in Triton's interpreter, and what its compiler makes of them.

The interpreter's casts to FP8 are coarser than the device's, so elements are compared roughly; tests/gpu has the bits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's; torch's CUDA builds bring it")

INTERPRETED = """
import torch
from mpcompile.formats import FORMAT
from mpcompile.runtime.kernels import quantise_triton as kernels
from mpcompile.runtime.quantise import _plain, _shapes

for dtype in (torch.bfloat16, torch.float32, torch.float16):
    for form in ("float8_e4m3fn", "float8_e5m2"):
        for shape, scale in (((64, 128), 1.0), ((130, 272), 1e4), ((1, 1), 0.0), ((37, 21), 1e-7)):
            x = (torch.randn(shape) * scale).to(dtype).clamp(-6e4, 6e4)
            for lies, turned in ((True, True), (True, False), (False, True))[: 3 if shape[0] == 37 else 1]:
                want = _plain(x, form, lies, turned, False)
                got = _shapes(x, form, lies, turned, False)
                kernels.quantise(x, *got, form, lies, turned)
                for copy, its, right, right_scale in ((*got[:2], *want[:2]), (*got[2:], *want[2:])):
                    assert torch.equal(its, right_scale), (dtype, form, shape, scale)
                    a, b = copy.float(), right.float()
                    far = (a - b).abs() > 0.5 * b.abs() + 2 * FORMAT[form].smallest
                    assert not far.any(), (dtype, form, shape, scale)
                if lies and turned:
                    assert torch.equal(got[0].float().t(), got[2].float())
for bad in (float("nan"), float("inf")):
    x = torch.randn(64, 128)
    x[5, 7] = bad
    got = _shapes(x, "float8_e4m3fn", True, True, False)
    kernels.quantise(x, *got, "float8_e4m3fn", True, True)
    assert torch.isnan(got[1]).all() if bad != bad else torch.isinf(got[1]).all()
print("interpreted")
"""

COMPILED = """
import re
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mpcompile.runtime.kernels import quantise_triton as kernels

TYPES = dict(x="*bf16", partials="*i32", count="i32", programs="i32", scale="*fp32", turned_scale="*fp32", rows="i32",
             columns="i32")

def ptx(kernel, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: TYPES[name] if name in names else "constexpr" for name in kernel.arg_names}
    given = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    even = [name for name in names if TYPES[name][0] == "*" or name in ("rows", "columns", "count")]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": 8}).asm["ptx"]

assert "ld.global.v4.b32" in ptx(kernels.largest, BLOCK=kernels.BLOCK)
ptx(kernels.largest, BLOCK=kernels.BLOCK, count=1)
for form, name in ((tl.float8e4nv, "e4m3"), (tl.float8e5, "e5m2")):
    TYPES |= {"lies": "*" + str(form), "turned": "*" + str(form)}
    shape = dict(FORM=form, MOST=448.0, FLOOR=kernels.FLOOR, PROGRAMS=kernels.PROGRAMS, TILE_ROWS=kernels.TILE_ROWS,
                 TILE_COLUMNS=kernels.TILE_COLUMNS)
    for lies, turned in ((True, True), (True, False), (False, True)):
        text = ptx(kernels.copies, LIES=lies, TURNED=turned, **shape)
        assert "ld.global.v4.b32" in text
        assert len(re.findall(r"st[.]global[.]v[24][.]b32", text)) >= lies + turned, (form, lies, turned)
        assert f"cvt.rn.satfinite.{name}x2.f32" in text
    ptx(kernels.copies, LIES=True, TURNED=True, **shape, programs=1, rows=1, columns=1)
print("compiled")
"""


def ran(code: str, interpreted: bool) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False,
                         env=environment, cwd=Path(__file__).parents[2])  # fmt: skip
    return run.stdout.strip() or run.stderr[-2000:]


def test_scales_and_layouts_are_the_definition_s() -> None:
    assert ran(INTERPRETED, interpreted=True) == "interpreted"


@pytest.mark.parametrize("capability", [90])
def test_the_copies_compile_to_wide_accesses(capability: int) -> None:
    pytest.importorskip("triton.backends.nvidia")
    assert ran(COMPILED.replace("CAPABILITY", str(capability)), interpreted=False) == "compiled"
