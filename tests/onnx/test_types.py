"""A node is low only where its schema takes the type and the provider has a kernel: asked of the real model."""

from __future__ import annotations

import itertools
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import noise, parse

from mpcompile import mpcompile
from mpcompile.formats import LOW
from mpcompile.onnx.convert import convert
from mpcompile.onnx.export.sequences import plain_splits
from mpcompile.onnx.run.session import run, session
from mpcompile.onnx.schema import FLOATS, find_schema, kernels, signature

CASES = runpy.run_path(str(Path(__file__).parent / "test_cases.py"))["CASES"]
SCHEMAS = sorted({(s.domain, s.name) for s in onnx.defs.get_all_schemas_with_history() if not s.domain})
VERSIONS = range(11, onnx.defs.onnx_opset_version() + 1)
MOVES_ALONE = {"Cast", "CastLike", "If", "Loop", "Scan", "Constant", "Identity"}


def has_kernel(op: str, low: str, provider: str) -> bool:
    """The table, read anew."""
    row = kernels()[provider]
    refused = op in row.get("none", ()) or op in row.get(f"no_{low}", ())
    return not refused and (low != "bf16" or "bf16" not in row or op in row["bf16"])


@given(st.sampled_from(SCHEMAS), st.sampled_from(VERSIONS), st.sampled_from(["", *kernels()]))
def test_what_a_signature_allows_schema_and_kernels_have(named: tuple[str, str], version: int, provider: str) -> None:
    schema = find_schema(*named, version)
    found = signature(*named, version, provider)
    if schema is None:
        assert not found.allowed
        return
    taken = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    for variable, allowed in found.allowed.items():
        types = {FLOATS[t] for t in taken.get(variable, {variable}) if t in FLOATS}
        if named[1] != "LinearAttention":  # two variables of one type
            assert allowed <= types
        for low in allowed & set(LOW):
            assert not provider or has_kernel(named[1], low, provider)


def low_nodes(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Nodes of the real model that read or give a low type, by strict inference."""
    names = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)

    def walk(graph: onnx.GraphProto, outer: dict[str, int]) -> Iterator[tuple[onnx.NodeProto, str]]:
        infos = itertools.chain(graph.input, graph.output, graph.value_info)
        here = outer | {i.name: i.type.tensor_type.elem_type for i in infos}
        here |= {t.name: t.data_type for t in graph.initializer}
        for node in graph.node:
            for low in {names[here[n]] for n in (*node.input, *node.output) if here.get(n) in names}:
                yield node, low
            for attr in node.attribute:
                if attr.type == onnx.AttributeProto.GRAPH:
                    yield from walk(attr.g, here)

    yield from walk(inferred.graph, {})


@pytest.mark.parametrize("provider", sorted(kernels()))
@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_low_nodes_have_kernels(low: str, provider: str) -> None:
    lowest = 0
    for text, weights, _, options in CASES.values():
        given_model = parse(text, **options, **weights)
        before = {n.SerializeToString() for n, _ in low_nodes(given_model)} if "16" in text else set()
        for node, found in low_nodes(convert(given_model, low, provider=provider, ranges=False).model):
            lowest += found == low
            if node.domain or node.op_type in MOVES_ALONE or node.SerializeToString() in before or found != low:
                continue
            assert has_kernel(node.op_type, found, provider) or "16" in text, node.op_type
    # The CPU provider moves BF16 and computes nothing in it.
    assert lowest > 20 if (provider, low) != ("cpu", "bf16") else lowest == 0


class Splits(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.wide(x).split(16, dim=-1)
        c, d = self.narrow(x).chunk(2, -1)
        e, f = (q * k + v).split([4, 12], -1)
        return torch.cat([e, f.tanh(), torch.floor(c), d.clamp(-1, 1)], -1).float().square().mean()


@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_the_steps_real_model_is_legal_and_splits_are_splits(low: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Splits()
    step = mpcompile(model, low, low=["*"], backend="onnxruntime").train_step(torch.optim.SGD(model.parameters(), 0.1))
    x = torch.randn(4, 16)
    losses = [float(step(x).loss) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    step.export_onnx(tmp_path / "step.onnx")
    made = onnx.load(tmp_path / "step.onnx")
    onnx.checker.check_model(made, full_check=True)
    found = {node.op_type for node in made.graph.node}
    assert "Split" in found
    assert not any("Sequence" in op for op in found)
    nodes = list(low_nodes(made))
    # On a CPU torch computes FP16 products in FP32 and rounds.
    assert any(node.op_type in ("MatMul", "Gemm") for node, _ in nodes) or low == "fp16"
    lacking = [n.op_type for n, one in nodes if n.op_type not in MOVES_ALONE and not has_kernel(n.op_type, one, "cuda")]
    assert lacking == []


@pytest.mark.parametrize(
    ("sizes", "pick", "goes"),
    [(np.int64(3), (0, 2), True), (np.array([1, 5, 2]), (1, 1), True), (np.array([1, 5, 2]), (-1, -3), True)],
)
def test_splits_compute_the_same(sizes: np.ndarray, pick: tuple[int, int], goes: bool) -> None:
    given_model = parse(
        "g (float[2, 8] x) => (float[2, a] y, float[2, b] z) { s = SplitToSequence<axis = 1>(x, n)\n"
        " y = SequenceAt(s, i)\n h = SequenceAt(s, j)\n z = Relu(h) }",
        n=sizes, i=np.int64(pick[0]), j=np.int64(pick[1]),
    )  # fmt: skip
    made = ir.from_proto(given_model)
    assert plain_splits(made) == goes
    feeds = {"x": noise(2, 8)}
    want, got = run(session(given_model), feeds), run(session(ir.to_proto(made)), feeds)
    assert list(want) == list(got)
    for name in want:
        np.testing.assert_array_equal(want[name], got[name])


def test_lists_that_are_used_otherwise_stay() -> None:
    given_model = parse(
        "g (float[2, 8] x, int64 i) => (float[2, a] y, int64 l) { s = SplitToSequence<axis = 1>(x, n)\n"
        " y = SequenceAt(s, i)\n l = SequenceLength(s) }",
        n=np.int64(3),
    )  # fmt: skip
    assert plain_splits(ir.from_proto(given_model)) == 0
