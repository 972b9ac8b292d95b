"""The loss kernel on one GPU, beside what Inductor makes of torch's own cross-entropy and its backward.

    python benchmarks/loss_kernel.py --out results/          # on a GPU
    python benchmarks/loss_kernel.py --dry                   # sizes of a CPU, to see that it runs

GPT-2's loss at 16 x 1024 tokens reads and writes 16,384 x 50,304 BF16 logits once each: 3.3 GB, 0.9 ms at 3.7 TB/s.
Checked against FP64 before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpcompile.runtime.kernels import loss as kernel
from mpcompile.tools.measure import Clock

SHAPES = {"GPT-2, whole": (16384, 50304), "GPT-2, a chunk": (2432, 50304), "Llama, a chunk": (2048, 128256)}
CUTS = [(2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (4096, 16)]


def torchs(logits: Tensor, targets: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Losses summed, and the logits' gradient, as autograd has them."""
    leaf = logits.detach().requires_grad_()
    loss = F.cross_entropy(leaf.float(), targets, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, leaf, unit)[0]


def checked(device: str) -> float:
    """The largest error of a gradient, as a part of one rounding to BF16 beside FP32's own.

    Raises:
      AssertionError: the kernel is wrong.
    """
    torch.manual_seed(0)
    logits = (torch.randn(64, 50304, device=device) * 4).bfloat16()
    targets = torch.randint(0, 50304, (64,), device=device)
    losses, grad = kernel.loss_rows(logits, targets, torch.tensor(0.5, device=device), 50304, -100, 0.0)
    wide = logits.double().requires_grad_()
    exact = F.cross_entropy(wide, targets, reduction="none")
    (wanted,) = torch.autograd.grad(exact.sum() * 0.5, wide)
    assert torch.allclose(losses.double(), exact, rtol=4e-6, atol=4e-6)
    error = ((grad.double() - wanted).abs() / (wanted.abs() * 2**-8 + 1e-12)).max().item()
    assert error < 1.01, error
    return error


def timed(call: Callable[[], Any], clock: Clock, rounds: int) -> float:
    for _ in range(3):
        call()
    return statistics.median(clock.seconds(call) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.dry else "cuda"
    clock = Clock(device)
    found: dict[str, Any] = {"torch": torch.__version__, "error": checked(device), "shapes": {}}
    compiled = torch.compile(torchs)
    for name, (rows, classes) in SHAPES.items():
        rows, classes = (32, 512) if options.dry else (rows, classes)
        logits = torch.randn(rows, classes, device=device).bfloat16()
        targets, unit = torch.randint(0, classes, (rows,), device=device), torch.tensor(1.0, device=device)
        peer = functools.partial(compiled, logits, targets, unit)
        row: dict[str, float] = {"torch, compiled": timed(peer, clock, 10)}
        ours = functools.partial(kernel.loss_rows, logits, targets, unit, classes, -100, 0.0)
        for kernel.BLOCK, kernel.WARPS in CUTS:
            row[f"{kernel.BLOCK} columns, {kernel.WARPS} warps"] = timed(ours, clock, 10)
        found["shapes"][name] = row
        gigabytes = 4e-9 * rows * classes
        for what, seconds in row.items():
            print(f"{name:16} {what:26} {seconds * 1e3:8.3f} ms  {gigabytes / seconds:8.0f} GB/s")
    if options.out:
        (options.out / "loss_kernel.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
