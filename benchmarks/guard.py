"""What it costs to compare model and optimizer before each call of a training step: `python benchmarks/guard.py`.

Times are processor time (other work on the machine does not count), the least of several runs, in milliseconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mpcompile.training.identity import ModelIdentity
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.monitor import OptimizerMonitor
from mpcompile.training.plain_values import PlainValues


def least(call: Callable[[], Any], runs: int = 30, each: int = 10) -> float:
    """Milliseconds of one call."""
    found = []
    for _ in range(runs):
        start = time.process_time()
        for _ in range(each):
            call()
        found.append((time.process_time() - start) / each * 1e3)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=84, help="transformer layers; 12 parameters and 10 modules each")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(given.layers))
    model = nn.Sequential(layers).to(given.device)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizers = Optimizers(optimizer)
    identity, watch = ModelIdentity([model], optimizers.params), OptimizerMonitor(optimizers)
    values = PlainValues(None)
    with values.capturing():
        layers_in_turn = torch.zeros(1, 2, 16, device=given.device)
        for layer in layers:
            layers_in_turn = layer(layers_in_turn)
    calls: dict[str, Callable[[], Any]] = {
        "modules, parameters, buffers": identity._same_tree,
        "hooks on modules": identity._same_hooks,
        "layouts, hooks on gradients": identity._same_layout,
        "modes": identity.modes,
        "Python values": values.number,
        "groups": watch.look,
        "state": watch.look_at_state,
    }
    print(f"{len(list(model.parameters()))} parameters, {len(identity.modules)} modules")
    total = 0.0
    for name, call in calls.items():
        taken = least(call)
        total += taken
        print(f"{name:32} {taken:.3f} ms")
    print(f"{'all':32} {total:.3f} ms")


if __name__ == "__main__":
    main()
