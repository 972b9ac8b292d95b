"""What torch was told of a custom op's precision is read; frozen low weights are used as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mpcompile import mpcompile
from mpcompile.torch_internals.operators import registered_dtype


@torch.library.custom_op("mptest::lowered", mutates_args=())
def lowered(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("mptest::raised", mutates_args=())
def raised(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("mptest::unsaid", mutates_args=())
def unsaid(x: Tensor) -> Tensor:
    return x * 2


LIBRARY = torch.library.Library("mptest", "FRAGMENT")
LIBRARY.define("by_library(Tensor x) -> Tensor")
LIBRARY.impl("by_library", lambda x: x * 2, "CompositeExplicitAutograd")

for op in (lowered, raised, unsaid):
    op.register_fake(lambda x: torch.empty_like(x))
    op.register_autograd(lambda ctx, grad: grad * 2)
torch.library.register_autocast("mptest::lowered", "cpu", torch.bfloat16)
torch.library.register_autocast("mptest::raised", "cpu", torch.float32)
torch.library.register_autocast("mptest::by_library", "cpu", torch.float16, lib=LIBRARY)


def test_the_registered_dtype_is_found_however_the_op_was_made() -> None:
    ops = torch.ops.mptest
    assert registered_dtype(ops.lowered.default, "cpu") is torch.bfloat16
    assert registered_dtype(ops.raised.default, "cpu") is torch.float32
    assert registered_dtype(ops.by_library.default, "cpu") is torch.float16
    assert registered_dtype(ops.lowered.default, "cuda") is None
    assert registered_dtype(ops.unsaid.default, "cpu") is None
    assert registered_dtype(torch.ops.aten.relu.default, "cpu") is None


class Adapted(nn.Module):
    """A frozen BF16 base with an FP32 adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64).bfloat16().requires_grad_(False)
        self.adapter = nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.adapter(self.table(tokens).float())


@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_a_frozen_low_table_is_never_cast(low: str) -> None:
    model, tokens = Adapted(), torch.randint(50, (2, 16))
    wrapped = mpcompile(model, low, backend="eager")
    plan = wrapped.plan(tokens)
    assert not [cast for cast in plan.graph.casts() if plan.graph.values[cast.inputs[0]].role == "parameter"
                and "table" in cast.inputs[0]]  # fmt: skip
    wrapped(tokens).sum().backward()
    torch.testing.assert_close(wrapped(tokens), model(tokens), rtol=0.05, atol=0.05)
