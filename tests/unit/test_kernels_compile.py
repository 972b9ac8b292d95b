"""What Triton's compiler makes of the kernels, which its interpreter does not show; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's; torch's CUDA builds bring it")

CODE = """
import re, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mpcompile.runtime.kernels import move_triton, update_triton as kernels

TYPES = dict(table="*i64", chunk_row="*i32", chunk_number="*i32", partials="*fp32", chunks="i32", numbers="*fp32",
             factors="*fp32", programs="i32", rows="i32", groups="*fp64", rule="*fp64", limits="*fp64", scale="*fp32",
             growth_tracker="*i32", hysteresis="*i32", steps="*i64", skipped="*i64", floor_hits="*i64", seed="*fp32",
             found_inf="*fp32", grad_scale="*fp32", finite_out="*u8", norm_out="*fp32", scale_out="*fp32")

def ptx(kernel, warps, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: TYPES[name] if name in names else "constexpr" for name in kernel.arg_names}
    given = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names if TYPES[name][0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": warps}).asm["ptx"]

kinds = [(True, tl.bfloat16, False, False), (True, tl.float16, True, True), (False, tl.bfloat16, True, False)]
for adam, low, mixed, split in kinds:
    text = ptx(move_triton.move, 4, LOW=low, MIXED=mixed, TWO=mixed, SHADOWS=low, SPLIT=split, ADAM=adam, MOMENTUM=True,
               WIDE=split, STATES=0, CHUNK=1024)
    found = set(re.findall(r"(?:ld|st)[.]global[.]v[0-9][.]b32", text))
    assert {"ld.global.v4.b32", "st.global.v4.b32", "ld.global.v2.b32", "st.global.v2.b32"} <= found, found
for states, access in ((1, "v2.b32"), (2, "b32")):
    text = ptx(move_triton.move, 4, LOW=tl.bfloat16, MIXED=False, TWO=False, SHADOWS=None, SPLIT=True, ADAM=True,
               MOMENTUM=True, WIDE=False, STATES=states, CHUNK=1024)
    assert text.count("ld.global." + access) >= 10 and text.count("st.global." + access) >= 8
assert "ld.global.v2.b32" in ptx(kernels.look, 8, LOW=tl.bfloat16, MIXED=False, TWO=False, CHUNK=4096)
for owned, adam in ((True, True), (False, False)):
    none = dict.fromkeys(("scale", "growth_tracker", "hysteresis", "steps", "skipped", "floor_hits", "seed"))
    ptx(kernels.advance_scale, 4, LOOKED=owned, OWNED=owned, FOUND=not owned, UNSCALE=True, ADAM=adam,
        **(dict(found_inf=None, grad_scale=None) if owned else none))
print("compiled")
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_the_update_compiles_to_wide_accesses(capability: int) -> None:
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", CODE.replace("CAPABILITY", str(capability))], capture_output=True,
                         text=True, check=False, env=environment, cwd=Path(__file__).parents[2])  # fmt: skip
    assert run.stdout.strip() == "compiled", run.stderr[-2000:]
