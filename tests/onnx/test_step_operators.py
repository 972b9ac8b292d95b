"""Every operator that a training step may meet, forward and backward: on ONNX Runtime as in torch, three steps each.

Slow: a translation takes seconds.  What each decomposition does alone is tested against autograd in `test_step.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, loss_of
from torch import Tensor, nn

from mpcompile import mpcompile

pytestmark = pytest.mark.slow

Modules = nn.ModuleDict
Forward = Callable[..., Tensor]
CASES: dict[str, tuple[dict[str, nn.Module], Forward, tuple[Tensor, ...]]] = {}
# Operations that run low, whatever the plan would say of tensors this small.
LOW = ("linear", "matmul", "bmm", "conv", "attention", "mm", "einsum", "gelu", "norm", "softmax", "pool", "relu", "mul")


def case(name: str, modules: dict[str, nn.Module], forward: Forward, *inputs: Tensor) -> None:
    CASES[name] = (modules, forward, inputs)


def attend(m: Modules, x: Tensor, keys: str = "q", **options: Any) -> Tensor:
    q, k = (m[one](x).unflatten(-1, (-1, 8)).transpose(1, 2) for one in ("q", keys))
    return F.scaled_dot_product_attention(q, k, k, **options)


torch.manual_seed(0)
X, IMAGE, SEQUENCE = torch.randn(4, 16), torch.randn(2, 4, 9, 10), torch.randn(2, 6, 16)
ROWS = torch.tensor([0, 2, 2, 1])


def line() -> dict[str, nn.Module]:
    return {"a": nn.Linear(16, 16)}


def conv() -> dict[str, nn.Module]:
    return {"c": nn.Conv2d(4, 8, 3)}


def wave() -> dict[str, nn.Module]:
    return {"c": nn.Conv1d(6, 8, 3)}


case("linear", {**line(), "b": nn.Linear(16, 16)}, lambda m, x: m["b"](torch.relu(m["a"](x))), X)
case("embedding", {**line(), "e": nn.Embedding(12, 16, padding_idx=0)}, lambda m, i: m["a"](m["e"](i)),
     torch.randint(0, 12, (4, 5)))  # fmt: skip
for _name, _norm in (
    ("layer norm", nn.LayerNorm(16)),
    ("rms norm", nn.RMSNorm(16)),
    ("batch norm 1d", nn.BatchNorm1d(16)),
):
    case(_name, {**line(), "n": _norm}, lambda m, x: m["n"](m["a"](x)), X)
for _name, _norm in (("group norm", nn.GroupNorm(2, 8)), ("instance norm", nn.InstanceNorm2d(8, affine=True)),
                     ("batch norm 2d", nn.BatchNorm2d(8))):  # fmt: skip
    case(_name, {**conv(), "n": _norm}, lambda m, x: m["n"](m["c"](x)), IMAGE)
case("conv1d", {"c": nn.Conv1d(6, 8, 3, stride=2, padding=1, dilation=2, groups=2)}, lambda m, x: m["c"](x), SEQUENCE)
case("conv2d", {"a": nn.Conv2d(4, 4, 3), "c": nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2)},
     lambda m, x: m["c"](m["a"](x)), IMAGE)  # fmt: skip
case("conv2d depthwise", {"a": nn.Conv2d(4, 4, 3, padding="same", groups=4), "c": nn.Conv2d(4, 6, 1)},
     lambda m, x: m["c"](F.relu(m["a"](x))), IMAGE)  # fmt: skip
case("conv3d", {"c": nn.Conv3d(2, 4, 3)}, lambda m, x: m["c"](x), torch.randn(1, 2, 5, 5, 5))
case(
    "conv transpose 1d",
    {"c": nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1)},
    lambda m, x: m["c"](x),
    SEQUENCE,
)
case("conv transpose 2d", {"a": nn.Conv2d(4, 4, 3), "c": nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)},
     lambda m, x: m["c"](m["a"](x)), IMAGE)  # fmt: skip

IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "average pool": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average pool, ceil_mode": lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True),
    "adaptive average pool to one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive average pool": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, (3, 2)),
    "upsample nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "upsample bilinear": lambda x: F.interpolate(x, size=(11, 13), mode="bilinear"),
    "upsample bilinear, corners": lambda x: F.interpolate(x, size=(11, 13), mode="bilinear", align_corners=True),
    "upsample bicubic": lambda x: F.interpolate(x, size=(11, 13), mode="bicubic"),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 2),
}
WAVES: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool 1d": lambda x: F.max_pool1d(x, 2),
    "average pool 1d": lambda x: F.avg_pool1d(x, 2),
    "adaptive average pool 1d": lambda x: F.adaptive_avg_pool1d(x, 3),
    "upsample linear": lambda x: F.interpolate(x, size=11, mode="linear"),
}
LINES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "elu": F.elu,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "leaky relu": F.leaky_relu,
    "glu": lambda x: F.glu(x, -1),
    "softmax": lambda x: F.softmax(x, -1),
    "log softmax": lambda x: F.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "index": lambda x: x[ROWS],
    "index of two": lambda x: x[ROWS, ROWS + 1],
    "gather": lambda x: x.gather(1, torch.arange(20).reshape(4, 5) % 16),
    "scatter": lambda x: torch.zeros(4, 20).scatter(1, torch.arange(64).reshape(4, 16) % 20, x.float()),
    "scatter add": lambda x: torch.zeros(4, 20).scatter_add(1, torch.arange(64).reshape(4, 16) % 7, x.float()),
    "index select": lambda x: x.index_select(1, ROWS),
    "index add": lambda x: torch.zeros(6, 16).index_add(0, ROWS, x.float()),
    "index put": lambda x: torch.zeros(6, 16).index_put((ROWS,), x.float(), accumulate=True),
    "where and masked fill": lambda x: torch.where(X > 0, x, x.masked_fill(X < 0, -1e4).clamp(min=-5)),
    "cumsum": lambda x: x.cumsum(-1),
    "pad, slice and cat": lambda x: torch.cat([F.pad(x, (1, 2)), x[:, 2:9]], -1),
    "max, min and topk": lambda x: x.max(-1).values + x.amin(-1) + x.topk(3, -1).values.sum(-1),
    "var, std and norm": lambda x: x.var(-1) + x.std(-1) + x.norm(dim=-1),
    "sort": lambda x: x.sort(-1).values * torch.arange(16.0),
    "roll and flip": lambda x: x.roll(2, -1) * x.flip(-1),
    "powers": lambda x: x.exp().log1p() + x.abs().add(0.1).pow(1.5) + x.abs().add(0.1).rsqrt(),
}
for _name, _f in IMAGES.items():
    case(_name, conv(), lambda m, x, f=_f: f(m["c"](x)), IMAGE)
for _name, _f in WAVES.items():
    case(_name, wave(), lambda m, x, f=_f: f(m["c"](x)), SEQUENCE)
for _name, _f in LINES.items():
    case(_name, line(), lambda m, x, f=_f: f(m["a"](x)), X)
case(
    "cross entropy, ignore_index",
    line(),
    lambda m, x, t: F.cross_entropy(m["a"](x), t),
    X,
    torch.tensor([1, -100, 3, 2]),
)
case("cross entropy, weights and smoothing", line(), lambda m, x, t: F.cross_entropy(
    m["a"](x), t, weight=torch.ones(16), label_smoothing=0.1, ignore_index=3), X, torch.tensor([1, 5, 3, 2]))  # fmt: skip
case(
    "cross entropy of images",
    conv(),
    lambda m, x, t: F.cross_entropy(m["c"](x), t),
    IMAGE,
    torch.randint(0, 5, (2, 7, 8)),
)
case(
    "binary cross entropy",
    line(),
    lambda m, x, t: F.binary_cross_entropy_with_logits(m["a"](x), t),
    X,
    torch.rand(4, 16),
)
case("other losses", line(), lambda m, x, t: F.mse_loss(m["a"](x), t) + F.l1_loss(m["a"](x), t)
     + F.smooth_l1_loss(m["a"](x), t), X, torch.rand(4, 16))  # fmt: skip
_HEADS = {"q": nn.Linear(16, 16), "k": nn.Linear(16, 8)}
case("attention", _HEADS, lambda m, x: attend(m, x), SEQUENCE)
case("causal attention", _HEADS, lambda m, x: attend(m, x, is_causal=True), SEQUENCE)
case(
    "attention with a mask", _HEADS, lambda m, x, k: attend(m, x, attn_mask=k), SEQUENCE, torch.ones(6, 6).tril().bool()
)
case("attention with a bias", _HEADS, lambda m, x, k: attend(m, x, attn_mask=k), SEQUENCE, torch.randn(6, 6))
case("grouped attention", _HEADS, lambda m, x: attend(m, x, "k", enable_gqa=True), SEQUENCE)
case("multi-head attention", {"q": nn.MultiheadAttention(16, 2, batch_first=True)},
     lambda m, x: m["q"](x, x, x, need_weights=False)[0], SEQUENCE)  # fmt: skip
case("einsum", line(), lambda m, x: torch.einsum("bij,bkj->bik", m["a"](x), m["a"](x)), SEQUENCE)
case("prelu", {**line(), "p": nn.PReLU()}, lambda m, x: m["p"](m["a"](x)), X)
case("gru", {"r": nn.GRU(16, 8, batch_first=True)}, lambda m, x: m["r"](x)[0], SEQUENCE)


class Held(nn.Module):
    def __init__(self, modules: dict[str, nn.Module], forward: Forward) -> None:
        super().__init__()
        self.held, self.act = nn.ModuleDict(modules), forward

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.act(self.held, *inputs).float()
        return out if out.dim() == 0 else (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum()


def both(
    model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer], loss: Any
) -> tuple[nn.Module, list[Any]]:
    """A copy of the model, and the step in torch of the one and on ONNX Runtime of the other."""
    twin, steps = copy.deepcopy(model), []
    for one, backend in ((model, "eager"), (twin, "onnxruntime")):
        mp = mpcompile(one, "fp16", low=[lambda node: any(name in node.op for name in LOW)], backend="eager")
        steps.append(mp.train_step(make(one), loss, backend=backend, scale=256.0))
    return twin, steps


@pytest.mark.parametrize("name", list(CASES))
def test_three_steps_are_torchs(name: str) -> None:
    modules, forward, inputs = CASES[name]
    torch.manual_seed(1)
    model = Held(copy.deepcopy(modules), forward)
    twin, steps = both(model, lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9), lambda m, *a: m(*a))
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        theirs, ours = (step(*inputs).loss.item() for step in steps)
        assert abs(ours - theirs) <= 1e-2 * max(1.0, abs(theirs))
    steps[1].sync()
    assert any(not torch.equal(before[key], value) for key, value in twin.state_dict().items())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", ["gpt2", "bert", "resnet", "vit", "convnext"])
def test_twenty_steps_of_an_architecture(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model, batch = ARCHITECTURES[name]()
        _, steps = both(
            model.train(), lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3), lambda m, **k: loss_of(m(**k))
        )
        losses = [[step(**batch).loss.item() for step in steps] for _ in range(20)]
    assert losses[-1][1] < losses[0][1] - 0.3
    for theirs, ours in losses:
        assert abs(ours - theirs) < 5e-3 * theirs
