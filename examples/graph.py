"""A graph network: messages along edges, summed at their targets by `index_add`, FP32 sums of low messages."""

from __future__ import annotations

from typing import Any

import torch
from curves import Wrap, both
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.update, self.norm = nn.Linear(2 * width, width), nn.LayerNorm(width)

    def forward(self, nodes: Tensor, source: Tensor, target: Tensor) -> Tensor:
        sent = self.message(torch.cat([nodes[source], nodes[target]], -1))
        heard = torch.zeros_like(nodes).index_add(0, target, sent)
        return nodes + self.update(torch.cat([self.norm(nodes), heard], -1))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))

    def forward(self, nodes: Tensor, source: Tensor, target: Tensor) -> Tensor:
        hidden = self.enter(nodes)
        for layer in self.layers:
            hidden = layer(hidden, source, target)
        return self.leave(hidden)  # type: ignore[no-any-return]


def loss_of(model: Any, nodes: Tensor, source: Tensor, target: Tensor, kinds: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(nodes, source, target), kinds)


def train(wrap: Wrap, steps: int) -> list[float]:
    model = Net()
    step = wrap(model).train_step(torch.optim.AdamW(model.parameters(), 5e-3), loss_of)
    nodes, edges, kinds = torch.randn(128, 4), torch.randint(0, 128, (2, 512)), torch.randint(0, 3, (128,))
    return [step(nodes, edges[0], edges[1], kinds).loss.item() for _ in range(steps)]


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float]]:
    return both(__doc__ or "", train, arguments, steps=60)


if __name__ == "__main__":
    main()
