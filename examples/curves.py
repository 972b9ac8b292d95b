"""What the examples share: the same training in FP32 and in mixed precision, and their curves side by side."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from mpcompile import mpcompile

Wrap = Callable[[Any], Any]
Train = Callable[[Wrap, int], list[float]]


def both(
    about: str, train: Train, arguments: list[str] | None = None, *, steps: int
) -> tuple[list[float], list[float]]:
    """Run `train(wrap, steps)` twice from one seed, with `wrap` for FP32 and for the policy; print and return both curves."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--policy", default="bf16")
    parser.add_argument("--tiny", action="store_true", help="a few steps, op by op: seconds on any machine")
    given = parser.parse_args(arguments)
    backend = "eager" if given.tiny else "inductor"
    curves = []
    for policy in ("fp32", given.policy):
        torch.manual_seed(0)

        def wrap(model: Any, policy: str = policy) -> Any:
            return mpcompile(model, policy, backend=backend)

        curves.append(train(wrap, 8 if given.tiny else steps))
    print(f"{'step':>5} {'fp32':>10} {given.policy:>10}")
    for turn, (full, mixed) in enumerate(zip(*curves, strict=True)):
        print(f"{turn:>5} {full:>10.4f} {mixed:>10.4f}")
    return curves[0], curves[1]
