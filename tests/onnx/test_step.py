"""The training step in ONNX: the backward decompositions against autograd, and whole steps against torch's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile import mpcompile
from mpcompile.errors import OnnxError, RuntimeFailure
from mpcompile.onnx.export import pooling as onnx_pool
from mpcompile.onnx.export.decompositions import avg_pool2d_backward, convolution_backward, where
from mpcompile.onnx.export.dropout import Counter, P
from mpcompile.onnx.run.session import session
from mpcompile.training.loss_scale.scale import LossScale

aten = torch.ops.aten


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_backward_is_autograds(dims: int, transposed: bool) -> None:
    torch.manual_seed(0)
    for groups, stride, pad, dilation, extra, size in itertools.product(
        (1, 2, 4), (1, 2), (0, 1), (1, 2), (0, 1), (9, 10)
    ):
        if extra and (not transposed or stride == 1):
            continue
        x = torch.randn([3, 4] + [size] * dims, dtype=torch.double)
        w = torch.randn(([4, 8 // groups] if transposed else [8, 4 // groups]) + [3] * dims, dtype=torch.double)
        rest = ([stride] * dims, [pad] * dims, [dilation] * dims, transposed, [extra] * dims, groups)
        grad = torch.randn_like(aten.convolution(x, w, None, *rest))
        want = aten.convolution_backward(grad, x, w, [8], *rest, [True] * 3)
        got = convolution_backward(grad, x, w, [8], *rest, [True] * 3)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("counted", [True, False])
def test_avg_pool_backward_is_autograds(kernel: int, stride: int, counted: bool) -> None:
    for pad, ceil, divisor in itertools.product((0, 1), (False, True), (None, 3)):
        x = torch.randn(2, 3, 9, 10, dtype=torch.double)
        grad = torch.randn_like(F.avg_pool2d(x, kernel, stride, pad, ceil, counted))
        rest = ([kernel] * 2, [stride] * 2, [pad] * 2, ceil, counted, divisor)
        want = aten.avg_pool2d_backward(grad, x, *rest)
        torch.testing.assert_close(avg_pool2d_backward(grad, x, *rest), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(9, 10, 3, 4), (7, 5, 2, 5), (4, 6, 6, 3), (5, 5, 1, 1)])
def test_adaptive_pools_are_torchs(sizes: tuple[int, int, int, int]) -> None:
    height, width, *out = sizes
    x = torch.randn(2, 3, height, width)
    grad = torch.randn(2, 3, *out)
    torch.testing.assert_close(onnx_pool.adaptive_avg_pool2d(x, out), F.adaptive_avg_pool2d(x, out))
    want = aten._adaptive_avg_pool2d_backward(grad, x)
    torch.testing.assert_close(onnx_pool.adaptive_avg_pool2d_backward(grad, x), want)
    values, places = onnx_pool.adaptive_max_pool2d(x, out)
    want, at = aten.adaptive_max_pool2d(x, out)
    torch.testing.assert_close(values, want)
    assert torch.equal(places, at)
    want = aten.adaptive_max_pool2d_backward(grad, x, at)
    torch.testing.assert_close(onnx_pool.adaptive_max_pool2d_backward(grad, x, places), want)


def test_where_of_bools() -> None:
    c, a, b = (torch.tensor(v) for v in ([True, False], [True, True], [False, False]))
    assert where(c, a, b).tolist() == [True, False]
    assert where(c, torch.ones(2), torch.zeros(2)) is NotImplemented


def test_random_numbers_are_uniform_and_follow_from_the_counter() -> None:
    random, state = Counter(), torch.tensor(7)
    random.begin(state)
    first, second = (random.draw((64, 3000), torch.device("cpu")) for _ in range(2))
    random.begin(state)
    assert torch.equal(random.draw((64, 3000), torch.device("cpu")), first)
    random.begin(state + 1)
    other = random.draw((64, 3000), torch.device("cpu"))
    held = [(part.double() / P - 0.5) * 12**0.5 for part in (first, second, other)]
    for part in held:
        assert part.mean().abs() < 0.01
        torch.testing.assert_close(part.square().mean(), torch.tensor(1.0, dtype=torch.double), rtol=0.01, atol=0)
        counts = torch.histc(part, 16, -(3**0.5), 3**0.5)
        assert ((counts / counts.mean() - 1).abs() < 0.05).all()
        for near in (part.roll(1, 0), part.roll(1, 1), part.flip(1)):  # neighbours know nothing of each other
            assert (part * near).mean().abs() < 0.01
    assert (held[0] * held[1]).mean().abs() < 0.01
    assert (held[0] * held[2]).mean().abs() < 0.01


def test_dropout_scales_what_it_keeps() -> None:
    random = Counter()
    random.begin(torch.tensor(3))
    x = torch.ones(100, 200)
    out, mask = random.native_dropout(x, 0.25, True)
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(mask.float().mean().item() - 0.75) < 0.02
    torch.testing.assert_close(out, x * mask * (4 / 3))
    assert random.native_dropout(x, 0.25, False)[0] is x
    assert random.uniform((50, 50), torch.float32, x.device).max() < 1
    assert random.bernoulli(x, 1.0).all()
    assert not random.bernoulli(x, 0.0).any()


class Net(nn.Module):
    """Embedding, layer norm, GELU and a loss with targets that do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc, self.norm = nn.Embedding(20, 16), nn.Linear(16, 32), nn.LayerNorm(32)
        self.head = nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.fc(self.emb(x)))))


def token_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=3)


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(seed))
    return x, x.roll(-1, 1)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def pair(model: nn.Module, low: str, loss: Callable, make: Callable, **options):
    """The same step in torch and on ONNX Runtime, of equal models."""
    twin = copy.deepcopy(model)
    names = ["aten.linear"] if not any(isinstance(m, nn.Conv2d) for m in model.modules()) else ["aten.conv2d"]
    steps = []
    for one, backend in ((model, "eager"), (twin, "onnxruntime")):
        mp = mpcompile(one, low, low=names, backend="eager")
        steps.append(mp.train_step(make(one), loss, backend=backend, **options))
    return twin, steps


def run_both(steps, batches, rtol: float) -> list[float]:
    losses = []
    for batch in batches:
        ours, torchs = steps[1](*batch), steps[0](*batch)
        np.testing.assert_allclose(ours.loss.item(), torchs.loss.item(), rtol=rtol)
        assert ours.finite.item() == torchs.finite.item()
        assert ours.scale.item() == torchs.scale.item()
        losses.append(ours.loss.item())
    return losses


def test_steps_overflow_and_state(tmp_path: Path) -> None:
    """Losses as torch's; an overflow is skipped and lowers the scale; state comes back; edits are taken in."""
    torch.manual_seed(0)
    model = Net()
    rule = LossScale.dynamic(init=2.0**30, cap=2.0**31)
    twin, steps = pair(model, "fp16", token_loss, adamw, scale=rule, max_grad_norm=1.0)
    before = copy.deepcopy(twin.state_dict())
    overflowed = steps[1](*tokens(0))
    assert not overflowed.finite.item()
    assert overflowed.scale.item() == 2.0**29
    steps[1].sync()
    for name, value in before.items():
        assert torch.equal(twin.state_dict()[name], value)
    with torch.no_grad():
        twin.head.bias.add_(1.0)
    changed = steps[1](*tokens(0)).loss.item()
    assert abs(changed - overflowed.loss.item()) < 1e-3  # softmax does not see a shift of all logits
    with torch.no_grad():
        twin.head.bias[0] += 5.0
    assert steps[1](*tokens(0)).loss.item() > changed + 0.5


@pytest.mark.slow
def test_twenty_steps_with_learning_rates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    twin, steps = pair(model, "fp16", token_loss, adamw, max_grad_norm=1.0)
    losses = []
    for i in range(20):
        for step in steps:
            (step.torch_step if hasattr(step, "torch_step") else step).optimizer.param_groups[0]["lr"] = 1e-2 / (
                1 + i % 3
            )
        losses += run_both(steps, [tokens(i % 4)], 3e-3)
    assert losses[-1] < losses[0] - 0.2
    steps[1].sync()
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-3)
    saved = steps[1].state_dict()
    assert saved["scale"] == steps[0].state_dict()["scale"]
    steps[1].export_onnx(tmp_path / "step.onnx")
    written = onnx.load(tmp_path / "step.onnx")
    onnx.checker.check_model(written, full_check=True)
    names = [o.name for o in written.graph.output]
    assert names[:4] == ["loss", "finite", "grad_norm", "scale"]
    assert {"fc.weight.next", "fc.weight.exp_avg.next"} <= set(names)
    session(written)
    steps[0].export_onnx(tmp_path / "other.onnx")
    assert [o.name for o in onnx.load(tmp_path / "other.onnx").graph.output] == names


def test_dropout_is_part_of_the_state(tmp_path: Path) -> None:
    """Each step drops others; a step that is run again from saved state drops the same."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(16, 400), nn.Dropout(0.4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    mp = mpcompile(net, "fp16", low=["aten.linear"])
    step = mp.train_step(optimizer, loss, backend="onnxruntime", scale=1.0)
    x = torch.randn(32, 16)
    saved = step.state_dict()
    assert saved["dropout_seed"] == 3
    losses = [step(x).loss.item() for _ in range(3)]
    assert len(set(losses)) == 3
    assert step.state_dict()["dropout_seed"] == 6
    step.load_state_dict(saved)
    assert [step(x).loss.item() for _ in range(3)] == losses
    whole = net[0](x).square().sum().item() / 0.6  # what the expectation of (x / 0.6)^2 with probability 0.6 is
    assert abs(np.mean(losses) / whole - 1) < 0.03
    step.export_onnx(tmp_path / "step.onnx")
    written = onnx.load(tmp_path / "step.onnx")
    assert not any(node.op_type.startswith(("Random", "Bernoulli")) for node in written.graph.node)
    assert {"dropout_seed"} <= {i.name for i in written.graph.input}
    assert {"dropout_seed.next"} <= {o.name for o in written.graph.output}


def test_what_the_step_cannot_do_is_refused() -> None:
    model = Net()
    with pytest.raises(RuntimeFailure, match="MP711"):
        mpcompile(model, "fp16").train_step(adamw(model), token_loss, backend="onnxruntime", accumulate=2)
    bag = nn.EmbeddingBag(10, 4, mode="sum")
    step = mpcompile(bag, "fp16").train_step(adamw(bag), lambda m, x: m(x).square().mean(), backend="onnxruntime")
    with pytest.raises(OnnxError, match=r"MP60[78]"):
        step(torch.zeros(2, 3, dtype=torch.long))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(16)
        self.c3, self.pool, self.fc = nn.Conv2d(8, 16, 1, stride=2), nn.MaxPool2d(2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.b1(self.c1(x))))
        x = F.relu(self.b2(self.c2(x))) + self.c3(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.slow
def test_a_residual_network_with_running_statistics() -> None:
    torch.manual_seed(0)
    model = Residual()
    twin, steps = pair(model, "fp16", lambda m, x, y: F.cross_entropy(m(x), y),
                       lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9))  # fmt: skip
    batches = [(torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))) for _ in range(8)]
    run_both(steps, batches, 5e-3)
    steps[1].sync()
    torch.testing.assert_close(twin.b1.running_var, model.b1.running_var, rtol=1e-2, atol=1e-3)
    assert twin.b1.num_batches_tracked.item() == 8


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.emb, self.norm = causal, nn.Embedding(20, 32), nn.LayerNorm(32)
        self.qkv, self.out, self.fc = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 20, bias=False)
        nn.init.normal_(self.emb.weight, std=0.1)
        self.fc.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(self.norm(h)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.fc(h + self.out(a.transpose(1, 2).flatten(2)))


@pytest.mark.slow
@pytest.mark.parametrize(("causal", "low"), [(True, "fp16"), (False, "bf16")])
def test_attention_with_tied_weights(causal: bool, low: str) -> None:
    torch.manual_seed(0)
    _, steps = pair(Attention(causal), low, token_loss, adamw, scale=256.0)
    run_both(steps, [tokens(i % 4) for i in range(20)], {"fp16": 1e-2, "bf16": 5e-2}[low])
