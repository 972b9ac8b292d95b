"""How many of ONNX's own backend tests survive conversion, for our converter and two others, in one run.

A model counts when it has FP32 tensors and ONNX Runtime's CPU provider runs it and gives the expected outputs before
the conversion.  It passes when the converted model satisfies the full checker and strict shape inference, has the same
inputs and outputs, runs, and gives the expected outputs within the low type's tolerance.  Success alone says little (a
converter that does nothing passes everything), so coverage is counted beside it: the share of matmul- and
convolution-class nodes that compute in the low type.

Columns: ours as it is written (ONNX Runtime's CPU provider computes FP16 in FP32, and has no BF16 arithmetic: that one
runs as its simulation), ours simulated (true low numerics), onnxconverter-common, and onnxruntime.transformers; the
latter two are given names for all nodes, and their results are sorted, which they leave to their callers.

    python benchmarks/onnx_suite.py [--only SUBSTRING] [--out benchmarks/results/onnx_suite.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.backend.test.loader as loader
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, numpy_helper
from onnx_ir.passes import common

from mpcompile import __version__
from mpcompile.onnx.convert import OnnxMixedPrecision, convert

MATMUL_CLASS = frozenset({
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Attention", "FusedMatMul", "FusedConv", "FusedGemm",
    "MultiHeadAttention", "LinearAttention",
})  # fmt: skip
LOW_TYPES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
# Relative to the largest element of each output: a few roundings of the type.
TOLERANCE = {"fp16": 1e-2, "bf16": 6e-2}
Outputs = list[Any]


class Case:
    """One backend test: the model, and pairs of inputs and expected outputs."""

    def __init__(self, test: Any) -> None:
        self.name, self.rtol, self.atol = test.name, test.rtol, test.atol
        if test.model is not None:
            self.model, self.data = test.model, test.data_sets
        else:
            folder = Path(test.model_dir)
            self.model = onnx.load(folder / "model.onnx")
            self.data = [_data_set(self.model, one) for one in sorted(folder.glob("test_data_set_*"))]

    @property
    def has_subgraphs(self) -> bool:
        return any(attr.type in (5, 10) for node in self.model.graph.node for attr in node.attribute)


def _data_set(model: onnx.ModelProto, folder: Path) -> tuple[Outputs, Outputs]:
    def read(stem: str, infos: Any) -> Outputs:
        arrays = []
        for index, info in enumerate(infos):
            proto = onnx.SequenceProto() if info.type.WhichOneof("value") == "sequence_type" else TensorProto()
            proto.ParseFromString((folder / f"{stem}_{index}.pb").read_bytes())
            is_list = isinstance(proto, onnx.SequenceProto)
            arrays.append(numpy_helper.to_list(proto) if is_list else numpy_helper.to_array(proto))
        return arrays

    count = len(list(folder.glob("input_*.pb")))
    return read("input", list(model.graph.input)[:count]), read("output", model.graph.output)


def cases(only: str) -> Iterator[Case]:
    for kind in ("node", "simple", "pytorch-operator", "pytorch-converted"):
        for test in loader.load_model_tests(kind=kind):
            if only in test.name:
                yield Case(test)


def uses_fp32(model: onnx.ModelProto) -> bool:
    """True when a graph input, output, initializer or constant is FP32."""
    infos = (*model.graph.input, *model.graph.output)
    types = {info.type.tensor_type.elem_type for info in infos} | {t.data_type for t in model.graph.initializer}
    types |= {info.type.sequence_type.elem_type.tensor_type.elem_type for info in infos}
    types |= {a.t.data_type for node in model.graph.node for a in node.attribute if node.op_type == "Constant"}
    return TensorProto.FLOAT in types


def execute(model: onnx.ModelProto, inputs: Outputs) -> Outputs:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    held = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in held.get_inputs()]
    return list(held.run(None, dict(zip(names, inputs, strict=False))))


def matches(got: Any, want: Any, tolerance: float, floor: float = 0.0) -> bool:
    """Equal within `tolerance` of the largest element; integers and bools are equal."""
    if isinstance(want, list):
        return len(got) == len(want) and all(matches(g, w, tolerance, floor) for g, w in zip(got, want, strict=True))
    if want is None or got is None:
        return want is got
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if want.dtype.kind not in "fV" and want.dtype != ml_dtypes.bfloat16:
        return bool(np.array_equal(got, want))
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.abs(want[np.isfinite(want)])
    allowed = tolerance * max(float(finite.max(initial=0.0)), 1e-3) + floor
    return bool(np.allclose(got, want, rtol=tolerance, atol=allowed, equal_nan=True))


def same_ends(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    def ends(model: onnx.ModelProto) -> list[Any]:
        return [(i.name, i.type.tensor_type.elem_type) for i in (*model.graph.input, *model.graph.output)]

    return ends(one) == ends(other)


def coverage(model: onnx.ModelProto) -> tuple[int, int]:
    """(low, all) matmul- and convolution-class nodes, subgraphs included; a node is low when its result is."""
    inferred = onnx.shape_inference.infer_shapes(model)
    low = total = 0
    for graph in _graphs(inferred.graph):
        types = {i.name: i.type.tensor_type.elem_type for i in (*graph.input, *graph.output, *graph.value_info)}
        for node in graph.node:
            if node.op_type in MATMUL_CLASS:
                total += 1
                low += types.get(node.output[0]) in LOW_TYPES
    return low, total


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attr in node.attribute:
            for body in (*attr.graphs, *([attr.g] if attr.HasField("g") else [])):
                yield from _graphs(body)


# ---------------------------------------------------------------------------------------------------- the converters


def ours(low: str) -> Callable[[onnx.ModelProto], tuple[onnx.ModelProto, onnx.ModelProto]]:
    """A converter that returns what is written, and what is run."""

    def apply(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        made: OnnxMixedPrecision = convert(model, low)
        return made.model, made.model if low == "fp16" else made.simulated()

    return apply


def ours_simulated(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    made = convert(model, "fp16")
    return made.model, made.simulated()


def converter_common(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    from onnxconverter_common import float16

    made = _sorted(float16.convert_float_to_float16(_named(model), keep_io_types=True))
    return made, made


def ort_transformers(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    from onnxruntime.transformers import float16

    made = _sorted(float16.convert_float_to_float16(_named(model), keep_io_types=True))
    return made, made


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes all have names: the other two key by name."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for number, node in enumerate(node for graph in _graphs(twin.graph) for node in graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return twin


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The nodes in topological order: the other two leave that to their callers."""
    held = ir.from_proto(model)
    common.TopologicalSortPass()(held)
    return ir.to_proto(held)


CONVERTERS: dict[str, tuple[str, Callable[[onnx.ModelProto], tuple[onnx.ModelProto, onnx.ModelProto]]]] = {
    "mpcompile fp16": ("fp16", ours("fp16")),
    "mpcompile fp16, simulated": ("fp16", ours_simulated),
    "mpcompile bf16, simulated": ("bf16", ours("bf16")),
    "onnxconverter-common": ("fp16", converter_common),
    "onnxruntime.transformers": ("fp16", ort_transformers),
}


def judge(case: Case, low: str, converter: Callable[[onnx.ModelProto], Any]) -> tuple[str, tuple[int, int]]:
    """("pass" or what went wrong first, coverage)."""
    stage, covered = "convert", (0, 0)
    try:
        written, runnable = converter(case.model)
        stage = "check"
        onnx.checker.check_model(written, full_check=True)
        covered = coverage(written)
        stage = "ends"
        if not same_ends(case.model, written):
            return "ends", covered
        stage = "run"
        results = [execute(runnable, inputs) for inputs, _ in case.data]
    except Exception as error:  # every converter and checker has its own
        return f"{stage}: {type(error).__name__}: {str(error)[:160]}", covered
    good = all(matches(got, want, TOLERANCE[low], case.atol)
               for result, (_, wanted) in zip(results, case.data, strict=True)
               for got, want in zip(result, wanted, strict=True))  # fmt: skip
    return "pass" if good else "values", covered


def counts(case: Case) -> bool:
    """True when the model has FP32 tensors and gives what is expected before any conversion."""
    try:
        onnx.checker.check_model(case.model, full_check=True)
        return uses_fp32(case.model) and all(
            matches(got, want, max(case.rtol, 1e-3), case.atol)
            for inputs, wanted in case.data
            for got, want in zip(execute(case.model, inputs), wanted, strict=True)
        )
    except Exception:  # not a model that ONNX Runtime runs
        return False


def suite(only: str = "", names: list[str] | None = None) -> dict[str, Any]:
    """Run everything; see the module's docstring."""
    chosen = [case for case in cases(only) if counts(case)]
    inner_all = sum(case.has_subgraphs for case in chosen)
    result: dict[str, Any] = {"models": len(chosen), "with_subgraphs": inner_all, "converters": {}}
    for name, (low, converter) in CONVERTERS.items():
        if names and name not in names:
            continue
        failures: dict[str, str] = {}
        covered, inner, start = [0, 0], 0, time.perf_counter()
        for case in chosen:
            verdict, (low_nodes, all_nodes) = judge(case, low, converter)
            covered = [covered[0] + low_nodes, covered[1] + all_nodes]
            inner += case.has_subgraphs and verdict == "pass"
            if verdict != "pass":
                failures[case.name] = verdict
        passed = len(chosen) - len(failures)
        result["converters"][name] = {
            "passed": passed, "share": round(passed / max(1, len(chosen)), 4), "subgraphs_passed": inner,
            "matmul_class_low": covered[0], "matmul_class_all": covered[1],
            "coverage": round(covered[0] / max(1, covered[1]), 4), "seconds": round(time.perf_counter() - start, 1),
            "failed_at": dict(Counter(v.partition(":")[0] for v in failures.values())), "failures": failures,
        }  # fmt: skip
        print(f"{name:28} {passed:5}/{len(chosen)}  subgraphs {inner}/{result['with_subgraphs']}  "
              f"low {covered[0]}/{covered[1]}", flush=True)  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--converter", action="append")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    result = {"versions": {"mpcompile": __version__, "onnx": onnx.__version__, "onnxruntime": ort.__version__,
                           "python": platform.python_version()},
              "tolerance": TOLERANCE, **suite(args.only, args.converter)}  # fmt: skip
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
