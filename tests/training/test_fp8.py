"""Linear layers that read FP8, in the drop-in and in the step: emulated on a CPU, against FP32 and BF16."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpcompile import mpcompile
from mpcompile.errors import MPCompileError

WIDTH = 64


class Block(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.norm, self.checkpointed = nn.LayerNorm(WIDTH), checkpointed
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def inner(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.out(torch.sigmoid(self.a(h)) * self.b(h))

    def forward(self, x: Tensor) -> Tensor:
        mixed = checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)
        return x + mixed


class Model(nn.Module):
    def __init__(self, checkpointed: bool = False, blocks: int = 4) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.ModuleList(Block(checkpointed) for _ in range(blocks))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), y.flatten())


def made(checkpointed: bool = False, blocks: int = 4) -> tuple[Model, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Model(checkpointed, blocks)
    return model, (torch.randn(4, 16, WIDTH), torch.randint(0, 10, (4, 16)))


def gradients(call: Any, model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[float, list[Tensor]]:
    loss = call(*batch)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return loss.item(), grads  # type: ignore[return-value]


def off(got: list[Tensor], right: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, right, strict=True))


def reading(mp: Any) -> set[str]:
    return {node.module for plan in mp.plans for node in plan.graph if node.fp8}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("policy", ["bf16", "bf16,fp8=rowwise"])
def test_gradients_are_those_of_fp32_to_fp8_s_rounding(policy: str, checkpointed: bool) -> None:
    model, batch = made(checkpointed)
    exact, right = gradients(model, model, batch)
    plain = mpcompile(model, policy, backend="eager")
    near = off(gradients(plain, model, batch)[1], right)
    mp = mpcompile(model, policy, fp8=["blocks"], backend="eager")
    loss, grads = gradients(mp, model, batch)
    assert reading(mp) == {f"blocks.{i}.{name}" for i in range(4) for name in ("a", "b", "out")}
    assert loss == pytest.approx(exact, abs=0.01)
    assert near < 0.02 < off(grads, right) < 0.2


def test_what_reads_one_value_shares_its_copies() -> None:
    model, batch = made(blocks=1)
    mp = mpcompile(model, "bf16", fp8=["blocks"], backend="eager")
    graph = mp.graph(*batch)
    calls = [node for node in graph.graph.nodes if getattr(node.target, "__name__", "").startswith("copies_of")]
    assert len(calls) == 2 + 3  # the inputs of a and b (one) and out; three weights


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_trains_as_the_drop_in_does(accumulate: int) -> None:
    model, batch = made(blocks=1)
    twin = copy.deepcopy(model)
    options: dict[str, Any] = {"fp8": ["blocks"], "backend": "eager"}
    mp, optimizer = mpcompile(model, "bf16", **options), torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = mp(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.item()] * accumulate
    step = mpcompile(twin, "bf16", **options).train_step(
        torch.optim.SGD(twin.parameters(), lr=0.1), accumulate=accumulate
    )
    found = [step(*batch).loss.item() for _ in range(4 * accumulate)]
    assert found == pytest.approx(losses, rel=2e-3)
    assert losses[-1] < losses[0] - 0.1


def test_an_overflow_skips_the_step() -> None:
    model, (x, y) = made(blocks=1)
    before = copy.deepcopy(model.state_dict())
    step = mpcompile(model, "bf16", fp8=["blocks"], backend="eager").train_step(
        torch.optim.SGD(model.parameters(), lr=0.1)
    )
    x[0, 0, 0] = float("inf")
    assert not step(x, y).stepped.item()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_evaluation_makes_no_transposed_copies() -> None:
    model, batch = made()
    mp = mpcompile(model, "bf16", fp8=["blocks"], backend="eager")
    with torch.no_grad():
        value = mp(*batch).item()
    assert value == pytest.approx(model(*batch).item(), abs=0.02)
    assert reading(mp)


def test_a_device_without_fp8_says_so_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = made()
    with caplog.at_level(logging.INFO, logger="mpcompile"):
        mpcompile(model, "fp8", backend="eager")(*batch)
    assert "no FP8: the device cpu has no FP8 products, they stay BF16" in caplog.text


def test_the_line_counts_what_reads_fp8(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = made()
    with caplog.at_level(logging.INFO, logger="mpcompile"):
        mpcompile(model, "bf16", fp8=["blocks.1"], backend="eager")(*batch)
    assert "FP8 in 9 products of 3 of 14 linear layers" in caplog.text


def test_overrides_are_checked() -> None:
    model, batch = made()
    with pytest.raises(MPCompileError, match="MP203"):
        mpcompile(model, "bf16", fp8=["blocsk"])
    with pytest.raises(MPCompileError, match="MP203"):
        mpcompile(model, "bf16", fp8=["blocks"], keep_fp32=["blocks"])
    with pytest.raises(MPCompileError, match="MP201"):
        mpcompile(model, "fp16", fp8=["blocks"])
    kept = mpcompile(model, "bf16", fp8=["blocks"], keep_fp32=["blocks.1"], backend="eager")
    kept(*batch)
    assert not any(name.startswith("blocks.1") for name in reading(kept))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_as_op_by_op(checkpointed: bool) -> None:
    model, batch = made(checkpointed, blocks=1)
    found = [
        gradients(mpcompile(model, "bf16", fp8=["blocks"], backend=b), model, batch) for b in ("eager", "inductor")
    ]
    assert found[1][0] == pytest.approx(found[0][0], abs=5e-3)
    assert off(found[1][1], found[0][1]) < 0.1
    twin = copy.deepcopy(model)
    losses = []
    for one, backend in ((model, "eager"), (twin, "inductor")):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        step = mpcompile(one, "bf16", fp8=["blocks"], backend=backend).train_step(optimizer)
        losses.append([step(*batch).loss.item() for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_onnx_refuses_fp8_by_name(tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    model, batch = made(blocks=1)
    with pytest.raises(MPCompileError, match="MP612"):
        mpcompile(model, "bf16", fp8=["blocks"]).export_onnx(tmp_path / "a.onnx", *batch)
    assert not list(tmp_path.iterdir())


def test_onnx_models_take_no_fp8() -> None:
    onnx = pytest.importorskip("onnx")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "x"], ["y"])], "g", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    options: tuple[dict[str, Any], ...] = ({"policy": "fp8"}, {"policy": "bf16", "fp8": ["*"]})
    for given in options:
        with pytest.raises(MPCompileError, match="MP612"):
            mpcompile(model, **given)
