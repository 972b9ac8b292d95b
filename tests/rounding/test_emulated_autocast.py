"""The yardstick itself: the emulation gives CUDA autocast's dtypes, and the numbers of tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import CUDA, cuda_autocast
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from rounding.emulated_autocast import emulated_autocast

CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul-of-results": lambda x, w: F.linear(x, w) @ F.linear(x, w).T,
    "einsum": lambda x, w: torch.einsum("ab,cb->ac", x, w),
    "conv": lambda x, w: F.conv1d(x.unsqueeze(0), w.unsqueeze(2)),
    "softmax": lambda x, w: F.linear(x, w).softmax(-1),
    "layer-norm": lambda x, w: F.layer_norm(F.linear(x, w), (8,)),
    "sum": lambda x, w: F.linear(x, w).sum(),
    "norm": lambda x, w: F.linear(x, w).norm(),
    "cat": lambda x, w: torch.cat([F.linear(x, w), x]),
    "add": lambda x, w: F.linear(x, w) + x,
    "gelu": lambda x, w: F.gelu(F.linear(x, w)),
    "exp": lambda x, w: torch.exp(F.linear(x, w)),
    "pow": lambda x, w: F.linear(x, w) ** 2,
    "mse": lambda x, w: F.mse_loss(F.linear(x, w), x),
    "cross-entropy": lambda x, w: F.cross_entropy(F.linear(x, w), torch.zeros(8, dtype=torch.long, device=x.device)),
    "cosine": lambda x, w: F.cosine_similarity(F.linear(x, w), x),
    "cumsum": lambda x, w: F.linear(x, w).cumsum(0),
    "dot": lambda x, w: torch.dot(x.select(0, 0), w.select(0, 0)),
    "gather": lambda x, w: F.linear(x, w).gather(0, torch.zeros(3, 8, dtype=torch.long, device=x.device)),
    "prelu": lambda x, w: F.prelu(x, w.select(0, 0)),
    "attention": lambda x, w: F.scaled_dot_product_attention(*[x.view(1, 1, 8, 8)] * 3),
    "baddbmm": lambda x, w: torch.baddbmm(*[x.unsqueeze(0), x.unsqueeze(0), w.unsqueeze(0)]),
    "addcmul": lambda x, w: torch.addcmul(x, F.linear(x, w), F.linear(x, w)),
}


@pytest.mark.parametrize("name", CALLS)
def test_dtypes_are_those_of_autocast_on_cuda(name: str) -> None:
    x, w = torch.randn(8, 8), torch.randn(8, 8)
    with cuda_autocast() as mode:
        fakes = [torch.empty(8, 8, device=CUDA) for _ in range(2)]
        wanted = pytree.tree_map(lambda v: v.dtype, CALLS[name](*fakes))
    del mode
    with emulated_autocast(torch.bfloat16):
        assert pytree.tree_map(lambda v: v.dtype, CALLS[name](x, w)) == wanted


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_product_rounds_its_operands_and_its_result_and_sums_in_fp32(low: torch.dtype) -> None:
    layer, x = nn.Linear(64, 8), torch.randn(16, 64)
    with emulated_autocast(low) as emulation:
        got = layer(x)
    weight, bias = layer.weight.to(low).float(), layer.bias.to(low).float()
    assert got.dtype == low
    assert torch.equal(got, F.linear(x.to(low).float(), weight, bias).to(low))
    got.float().square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.weight.grad, layer.weight.grad.to(low).float()), (
        "the product's gradient is low, as on CUDA"
    )
    assert emulation.ran == {"aten.linear.default": 1}


def test_torch_s_own_autocast_is_back_afterwards() -> None:
    x = torch.randn(4, 4)
    with emulated_autocast(torch.float16):
        pass
    assert (x @ x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16


def test_a_weight_is_cast_once_in_a_region() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with emulated_autocast(torch.bfloat16) as emulation:
        layer(layer(x))
    assert len(emulation._casts) == 2
