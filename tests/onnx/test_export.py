"""Export of torch models: the plan's casts, the annotations, and where other exporters are silently wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_models import types
from torch import nn

from mpcompile import mpcompile
from mpcompile.onnx.export.replacements import cross_entropy
from mpcompile.onnx.run.session import run, session

BOUND = {"fp16": 4e-3, "bf16": 3e-2}


class Block(nn.Module):
    """Linear -> LayerNorm -> attention with a mask -> BatchNorm -> times a 0-dim parameter -> softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.bn, self.gain = nn.BatchNorm1d(16), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.fc(x))
        q, k = self.out(h)[:, None], h[:, None]
        a = nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask[:, None])[:, 0]
        a = self.bn(a.transpose(1, 2)).transpose(1, 2)
        return torch.softmax(a * self.gain, -1)


def block() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = Block().eval()
    nn.init.normal_(model.bn.running_mean, std=0.1)
    return model, torch.randn(2, 8, 16), torch.ones(2, 8, 8, dtype=torch.bool).tril()


def feeds(model: onnx.ModelProto, *arrays: torch.Tensor) -> dict[str, np.ndarray]:
    return {i.name: a.numpy() for i, a in zip(model.graph.input, arrays, strict=True)}


def output(model: onnx.ModelProto, *arrays: torch.Tensor) -> np.ndarray:
    return next(iter(run(session(model), feeds(model, *arrays)).values()))


def props(node: onnx.NodeProto) -> dict[str, str]:
    return {p.key: p.value for p in node.metadata_props}


@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_a_block_in_low_precision(low: str, tmp_path: Path) -> None:
    model, x, mask = block()
    made = mpcompile(model, low, low=["*"]).export_onnx(tmp_path / "b.onnx", x, mask)
    written = onnx.load(tmp_path / "b.onnx")
    assert types(written)["val_1"] == {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[low]
    assert types(written)[written.graph.output[0].name] == "FLOAT"
    want = model(x, mask).detach().numpy()
    np.testing.assert_allclose(output(made.simulated(), x, mask), want, atol=BOUND[low])
    if low == "fp16":
        np.testing.assert_allclose(output(written, x, mask), want, atol=BOUND[low])


def test_the_casts_are_the_plans(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    mp = mpcompile(model, "fp16", keep_fp32=["aten.gelu"], low=["aten.linear"])
    made = mp.export_onnx(tmp_path / "m.onnx", torch.randn(4, 64))
    planned = [node for node in made.graph.casts() if node.origin != "shadow"]
    assert sum(node.op_type == "Cast" for node in made.model.graph.node) == len(planned) == 4
    assert made.notes == []


def test_annotations_survive_saving_and_loading(tmp_path: Path) -> None:
    model, x, mask = block()
    mpcompile(model, "bf16", low=["aten.linear"]).export_onnx(tmp_path / "b.onnx", x, mask)
    for again in (onnx.load(tmp_path / "b.onnx"), ir.to_proto(ir.load(tmp_path / "b.onnx"))):
        found = props(next(node for node in again.graph.node if node.op_type == "MatMul"))
        assert found["mpcompile.verdict"] == "low"
        assert found["mpcompile.precision"] == "bf16"
        assert found["mpcompile.reason"]
        assert found["mpcompile.module"] == "fc"
        assert found["mpcompile.source"].startswith("test_export.py:")
        model_props = {p.key: p.value for p in again.metadata_props}
        assert model_props["mpcompile.policy"].startswith("low=bf16")
        assert model_props["mpcompile.schema"] == "mpcompile.report/1"


def test_annotate_only_is_the_fp32_model(tmp_path: Path) -> None:
    model, x, mask = block()
    made = mpcompile(model, "bf16", low=["*"]).export_onnx(tmp_path / "b.onnx", x, mask, annotate_only=True)
    assert set(types(made.model).values()) <= {"FLOAT", "INT64", "BOOL"}
    np.testing.assert_allclose(output(made.model, x, mask), model(x, mask).detach().numpy(), atol=1e-6)
    matmul = next(node for node in made.model.graph.node if node.op_type == "MatMul")
    assert props(matmul)["mpcompile.precision"] == "bf16"


def test_dynamic_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    made = mpcompile(model, "fp16", low=["*"]).export_onnx(
        tmp_path / "m.onnx", torch.randn(4, 16), dynamic_shapes=shapes
    )
    x = torch.randn(7, 16)
    np.testing.assert_allclose(output(made.model, x), model(x).detach().numpy(), atol=4e-3)


class Tiny(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / ((x * 0.999999 - x).abs() + 1e-8)


def test_small_constants_are_not_folded_away(tmp_path: Path) -> None:
    """The exporter's own optimizer drops ``+ 1e-8`` and ``* 0.999999``."""
    x = torch.tensor([0.0, 1.0, 3.0])
    model = nn.Sequential(nn.Identity(), Tiny())
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    made = mpcompile(model, "fp32").export_onnx(tmp_path / "t.onnx", x)
    got = output(made.model, x)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-6)


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


def test_batch_norm_in_training_uses_the_batchs_statistics(tmp_path: Path) -> None:
    """torchlib silently translates a training BatchNorm as inference."""
    torch.manual_seed(0)
    model, x = Trained().train(), torch.randn(4, 3, 8, 8) * 3 + 1
    want = model(x).detach().numpy()
    made = mpcompile(model, "fp16", low=["aten.conv2d"]).export_onnx(tmp_path / "t.onnx", x)
    np.testing.assert_allclose(output(made.model, x), want, atol=2e-2)


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.fc(x), y, ignore_index=2)


def test_cross_entropy_is_the_mean_over_the_targets_that_count(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, y = Loss(), torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 2, 4])
    made = mpcompile(model, "fp16", low=["aten.linear"]).export_onnx(tmp_path / "l.onnx", x, y)
    np.testing.assert_allclose(output(made.model, x, y), model(x, y).detach().numpy(), rtol=2e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_in_elementary_operations_is_torchs(reduction: str, weighted: bool, smoothing: float) -> None:
    torch.manual_seed(0)
    weight = torch.rand(5) if weighted else None
    number = {"none": 0, "mean": 1, "sum": 2}[reduction]
    for shape in ((7, 5), (5,), (3, 5, 4, 2)):
        x = torch.randn(shape)
        target = torch.randint(0, 5, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())
        want = nn.functional.cross_entropy(
            x, target, weight, reduction=reduction, ignore_index=3, label_smoothing=smoothing
        )
        torch.testing.assert_close(cross_entropy(x, target, weight, number, 3, smoothing), want, equal_nan=True)
        shares = torch.softmax(torch.randn(shape), 1 if len(shape) > 1 else 0)
        want = nn.functional.cross_entropy(x, shares, weight, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(cross_entropy(x, shares, weight, number, -100, smoothing), want)


class Pooled(nn.Module):
    """A loss with weights and smoothing, which the exporter drops, behind a pool that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(24, 5)
        self.register_buffer("weight", torch.linspace(0.5, 2, 5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = nn.functional.adaptive_max_pool2d(self.conv(x), (3, 2)).flatten(1)
        return nn.functional.cross_entropy(self.fc(h), y, self.weight, label_smoothing=0.3)


def test_what_the_exporter_gets_wrong_is_replaced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, y = Pooled(), torch.randn(6, 3, 9, 10), torch.tensor([0, 1, 2, 3, 2, 4])
    made = mpcompile(model, "fp16", low=["aten.linear"]).export_onnx(tmp_path / "p.onnx", x, y)
    np.testing.assert_allclose(output(made.model, x, y), model(x, y).detach().numpy(), rtol=2e-3)
