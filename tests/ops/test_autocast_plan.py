"""plan="autocast" against torch.autocast on CUDA itself: the same dtype for every output of every node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import recorded
from torch import nn
from zoo import ARCHITECTURES, build

from mpcompile import Policy
from mpcompile.aten.capture import export
from mpcompile.aten.exported import inline_regions
from mpcompile.aten.read import read
from mpcompile.graph import PrecisionGraph
from mpcompile.pipeline import run
from mpcompile.recipes import fx_passes

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
QUICK = ("llama", "t5", "resnet", "segformer")


def differences(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> tuple[int, list[str]]:
    """How many outputs were compared, and the nodes whose outputs have another dtype than under CUDA autocast."""
    module = export(model, args, kwargs).module()
    inline_regions(module)
    capture = read(module)
    real = recorded(module)
    passes = fx_passes(Policy("bf16", plan="autocast", output="keep"), "cuda")
    # Up to the decisions: casts move through views afterwards, and take the views with them.
    plan, _ = run(capture.graph, passes[: [one.name for one in passes].index("assign") + 1])
    compared, wrong = 0, []
    for node in plan:
        ours = [plan.values[name].dtype for name in node.outputs]
        for got, wanted in zip(ours, real.get(node.id, []), strict=False):
            if got in ("fp32", "bf16"):
                compared += 1
                wrong += [_line(plan, node.id, got, NAMES[wanted])] if got != NAMES[wanted] else []
    return compared, wrong


def _line(plan: PrecisionGraph, node: str, got: str, wanted: str) -> str:
    made = plan.nodes[node]
    read_as = [plan.values[name].dtype for name in made.inputs]
    return f"{node} = {made.op}({', '.join(read_as)}): {got}, not {wanted}"


class Mixed(nn.Module):
    """Operations of every list, in one net."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch = nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8)
        self.norm, self.fc, self.gate = nn.GroupNorm(2, 8), nn.Linear(8, 16), nn.PReLU()
        self.table, self.layer = nn.Embedding(10, 16), nn.LayerNorm(16)
        self.act = nn.Softplus()

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(F.relu(self.batch(self.conv(x))), 2)
        y = F.interpolate(self.norm(y), scale_factor=2.0).mean((2, 3))
        y = self.gate(self.fc(y)) + self.table(words).sum(1)
        y = torch.cat([self.layer(y), y.sigmoid() * y], -1)
        y = torch.where(y > 0, y, self.act(y).cumsum(-1))
        y = torch.addcmul(y, y.bfloat16(), torch.softmax(y @ y.T, -1) @ y)
        return F.cross_entropy(y, words[:, 0]) + y.square().mean().sqrt() + torch.outer(y[0], y[1]).pow(2).std()


def test_a_net_with_operations_of_every_list() -> None:
    compared, wrong = differences(Mixed(), (torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4, 5))))
    assert compared > 30
    assert wrong == []


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES])
def test_an_architecture(name: str) -> None:
    model, inputs = build(name)
    compared, wrong = differences(model, (), inputs)
    assert compared > 20
    assert wrong == []
