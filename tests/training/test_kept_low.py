"""What the plan keeps as it is: a normalization's low input, and grouped queries without repeated keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mpcompile import mpcompile

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class Grouped(nn.Module):
    """Four heads that read the keys of two."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (-1, 8)).transpose(1, 2) for one in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2)


def test_grouped_queries_read_their_keys_unrepeated() -> None:
    torch.manual_seed(0)
    model, x = Grouped(), torch.randn(2, 16, 32)
    graph = mpcompile(model, "low=bf16,device=h200", low=["*"], backend="eager").graph(x)
    (attention,) = graph.graph.find_nodes(op="call_function", target=ATTENTION)
    assert attention.kwargs.get("enable_gqa") is True
    names = {str(node.target) for node in graph.graph.nodes}
    assert not [name for name in names if "repeat" in name or "expand" in name]
    torch.testing.assert_close(graph(x).float(), model(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_normalization_reads_the_low_stream(norm: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), norm(64), nn.Linear(64, 64))
    plan = mpcompile(model, "low=bf16,device=h200", low=["0", "2"], backend="eager").plan(torch.randn(32, 64))
    (node,) = [node for node in plan.graph if node.kind == "normalization"]
    assert plan.graph.values[node.inputs[0]].dtype == "bf16"
    assert plan.graph.values[node.outputs[0]].dtype == "bf16"
