"""Steps that take their loss by the kernel's operation: the same losses and gradients as by autograd's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcompile import mpcompile
from mpcompile.aten.rewrites import align
from mpcompile.aten.rewrites import chunked_loss as loss_region
from mpcompile.runtime.kernels import loss as loss_kernel
from mpcompile.training.gradients import compile as compiling
from mpcompile.training.gradients import specialization

CLASSES = 37


class Model(nn.Module):
    def __init__(self, bias: bool, smoothing: float) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(CLASSES, 16), nn.Linear(16, 16)
        self.head, self.smoothing = nn.Linear(16, CLASSES, bias=bias), smoothing
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(F.gelu(self.body(self.table(ids)))).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=self.smoothing)


@pytest.fixture
def op_by_op(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a compiler would be given, run op by op; the joint graphs."""
    joints: list[Any] = []

    def run(joint: Any, _backend: str, **how: bool) -> Any:
        joints.append(joint)
        return compiling.compile_joint(joint, "eager", **how)

    monkeypatch.setattr(loss_region, "WORTH_BYTES", 1)
    monkeypatch.setattr(specialization, "compile_joint", run)
    return joints


def calls(graph: torch.fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=loss_kernel.OPERATION))


@pytest.mark.parametrize(
    ("bias", "smoothing", "padded"), [(True, 0.0, True), (False, 0.1, True), (True, 0.1, False), (False, 0.0, False)]
)
def test_the_same_training(
    bias: bool, smoothing: float, padded: bool, op_by_op: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, ids, labels = Model(bias, smoothing), *torch.randint(0, CLASSES, (2, 4, 9))
    labels[0, 3:] = -100
    monkeypatch.setattr(align, "DEVICES", {"cpu"} if padded else set())
    monkeypatch.setattr(align, "WIDE", 8)
    curves, grads = [], []
    for serves in (True, False):
        monkeypatch.setattr(loss_kernel, "serves", lambda _device, serves=serves: serves)
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.5, momentum=0.9)
        step = mpcompile(twin, "low=bf16,device=free-low").train_step(optimizer, max_grad_norm=1.0)
        monkeypatch.setattr(
            "mpcompile.training.optimizer.build.run_update", lambda u, _b: compiling.run_update(u, "eager")
        )
        curves.append([step(ids, labels).loss.item() for _ in range(4)])
        grads.append([optimizer.state[p]["momentum_buffer"] for p in twin.parameters()])
        assert (calls(op_by_op[-1].module.graph) > 1) == serves
        assert {n.precision for n in step.report().nodes if n.kind == "matmul" and n.phase == "forward"} == {"bf16"}
        # What is read and exported has ATen's operations alone.
        assert not calls(step.graph.graph)
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)
    assert curves[0][-1] < curves[0][0]
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_logits_that_the_program_keeps_low_are_taken_as_it_says(
    op_by_op: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rounding that the user wrote between logits and loss is no FP32 loss of them."""
    torch.manual_seed(0)
    model, ids = Model(True, 0.0), torch.randint(0, CLASSES, (4, 9))
    monkeypatch.setattr(loss_kernel, "serves", lambda _device: True)
    monkeypatch.setattr("mpcompile.training.optimizer.build.run_update", lambda u, _b: compiling.run_update(u, "eager"))
    rounded = copy.deepcopy(model)
    rounded.head.register_forward_hook(lambda _m, _args, out: out.to(torch.bfloat16).to(torch.float32))
    step = mpcompile(rounded, "fp32").train_step(torch.optim.SGD(rounded.parameters(), lr=0.5))
    got = step(ids, ids).loss.item()
    assert not calls(op_by_op[-1].module.graph)
    with torch.no_grad():
        logits = model.head(F.gelu(model.body(model.table(ids)))).bfloat16().float()
    assert got == pytest.approx(F.cross_entropy(logits.flatten(0, 1), ids.flatten()).item(), rel=1e-6)
