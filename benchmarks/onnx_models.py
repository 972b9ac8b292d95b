"""Real ONNX models that PyPI packages ship, and conversion time.

The packages are no dependency: give the folder that they were installed into, for example

    pip install --no-deps --target models magika rapidocr-onnxruntime silero-vad
    python benchmarks/onnx_models.py models --out benchmarks/results/onnx_models.json

Inputs are seeded noise of the models' own shapes; errors are in true low-precision numerics, relative to the largest
element of an output ("mean" to its mean magnitude).  Conversion time is that of chains of MatMul, Add, Gelu, Softmax and
Exp, in processor time: "ours" is reading, deciding and writing; the checks (onnx's checker with strict shape inference,
and the load of an ONNX Runtime session) are others' time, and never left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mpcompile.garbage import no_garbage_collection
from mpcompile.onnx.convert import convert
from mpcompile.onnx.options import Options, onnx_policy
from mpcompile.onnx.plan import plan
from mpcompile.onnx.read.reader import read
from mpcompile.onnx.run.session import run, session

MATMUL_KINDS = ("matmul", "convolution", "attention")


def feeds(path: Path, held: Any) -> dict[str, Any]:
    """Seeded noise; free dimensions get what the model's family takes."""
    random = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for one in held.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in one.shape]
        if "rapidocr" in str(path) and len(shape) == 4:
            shape = [1, 3, 48 if "det" not in path.name else 320, 192 if "cls" in path.name else 320]
        elif "silero" in str(path) and one.name in ("input", "x") and not isinstance(one.shape[-1], int):
            shape = [1, 512]
        elif "silero" in str(path) and one.name == "state":
            shape = [2, 1, 128]
        if one.name == "sr":
            made[one.name] = np.array(16000, np.int64)
        elif "int" in one.type:
            made[one.name] = random.integers(0, 255, shape).astype("int32" if "int32" in one.type else "int64")
        else:
            made[one.name] = (random.standard_normal(shape) * 0.3).astype(
                np.float16 if "16" in one.type else np.float32
            )
    return made


def model_row(path: Path, low: str) -> dict[str, Any]:
    start = time.perf_counter()
    made = convert(path, low)
    seconds = time.perf_counter() - start
    held = session(path)
    given = feeds(path, held)
    want, got = run(held, given), run(session(made.simulated()), given)
    off = [np.abs(got[k].astype(np.float64) - want[k]) for k in want]
    size = [np.abs(want[k]) for k in want]
    matmuls = [node for node in made.graph if node.kind in MATMUL_KINDS and not node.is_cast]
    return {
        "model": path.name, "low": low, "nodes": len(made.capture.graph), "seconds_with_checks": round(seconds, 2),
        "worst": float(f"{max(float(o.max() / max(s.max(), 1e-30)) for o, s in zip(off, size, strict=True)):.3g}"),
        "mean": float(f"{max(float(o.mean() / max(s.mean(), 1e-30)) for o, s in zip(off, size, strict=True)):.3g}"),
        "matmul_class_low": sum(node.precision == low for node in matmuls), "matmul_class": len(matmuls),
    }  # fmt: skip


def chain(count: int) -> onnx.ModelProto:
    nodes: list[Any] = []
    weights: list[Any] = []
    value = "x"
    for i in range(count // 5):
        weights += [numpy_helper.from_array(np.full((8, 8), 0.1, np.float32), f"w{i}")]
        weights += [numpy_helper.from_array(np.zeros(8, np.float32), f"b{i}")]
        steps = [("MatMul", [f"w{i}"]), ("Add", [f"b{i}"]), ("Gelu", []), ("Softmax", []), ("Exp", [])]
        for op, more in steps:
            nodes.append(helper.make_node(op, [value, *more], [f"{op}_{i}"], name=f"{op}{i}"))
            value = f"{op}_{i}"
    ends = [helper.make_tensor_value_info(name, 1, ["n", 8]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def split(count: int, clock: Any = time.process_time) -> dict[str, float]:
    """Milliseconds of processor time per 1,000 nodes, for each part of a conversion."""
    model, took = chain(count), {}

    def timed(name: str, act: Any) -> Any:
        start = clock()
        result = act()
        took[name] = (clock() - start) / count * 1e6
        return result

    policy, options = onnx_policy("fp16"), Options()
    with no_garbage_collection():
        capture = timed("read", lambda: read(model, "fp16", provider="cuda"))
    made = timed("decide", lambda: plan(policy, options, capture))
    proto = timed("write", lambda: made.model)
    took["ours"] = took["read"] + took["decide"] + took["write"]
    timed("checker and strict inference", lambda: onnx.checker.check_model(proto, full_check=True))
    timed("all checks", made.check)
    took["whole"] = took["ours"] + took["all checks"]
    return took


def speed_row(count: int, repeat: int) -> dict[str, Any]:
    """Of `repeat` runs, the one in which our part was fastest: other work on the machine only adds."""
    best = min((split(count) for _ in range(repeat)), key=lambda row: row["ours"])
    return {"nodes": count, **{name: round(value, 1) for name, value in best.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    split(100)  # imports and caches
    rows = [speed_row(count, repeat) for count, repeat in ((1000, 12), (10000, 5), (50000, 3))]
    result: dict[str, Any] = {"unit": "ms of processor time per 1,000 nodes", "speed": rows, "models": []}
    for row in result["speed"]:
        print(row, flush=True)
    for path in sorted(Path(args.folder).rglob("*.onnx")) if args.folder else ():
        for low in ("fp16", "bf16"):
            try:
                row = model_row(path, low)
            except Exception as error:  # a row says what failed; the run goes on
                row = {"model": path.name, "low": low, "error": f"{type(error).__name__}: {str(error)[:200]}"}
            result["models"].append(row)
            print(row, flush=True)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
