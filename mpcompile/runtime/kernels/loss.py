"""Cross-entropy of rows of logits with its gradient, in one pass: `mpcompile::loss_rows`.

Log-softmax, negative log likelihood and their backward as torch has them read the logits three times and write them
once; here they are read twice, the second time from the cache, and the gradient is written.  The gradient that arrives
must be known beforehand, which it is in a training step (the loss scale over the number of rows that count).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpcompile.runtime.kernels.update import available

# Where the kernel serves; a test adds the CPU, by Triton's interpreter.
DEVICES = {"cuda"}
# Columns at once and warps of a program.
BLOCK, WARPS = 4096, 8


@torch.library.custom_op("mpcompile::loss_rows", mutates_args=())
def loss_rows(
    logits: Tensor, targets: Tensor, unit: Tensor, classes: int, ignore: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Losses of rows, and the gradient of the logits for `unit` arriving at each loss.

    Args:
      logits: [rows, width], of any float type, columns next to each other.
      targets: [rows] int64, each below `classes` or equal to `ignore`.
      unit: 0-dim FP32.
      classes: the columns that are classes; what follows is padding, whose gradient is 0.
      ignore: the target of a row that does not count: its loss and gradient are 0.
      smoothing: label smoothing, as `torch.nn.functional.cross_entropy` has it.

    Returns:
      FP32 losses [rows], and the gradient [rows, width] in the logits' type, contiguous.
    """
    if logits.device.type not in DEVICES or not available(logits.device.type):
        return in_atens(logits, targets, unit, classes, ignore, smoothing)
    from mpcompile.runtime.kernels import loss_triton

    rows, width = logits.shape
    gradient = torch.empty((rows, width), dtype=logits.dtype, device=logits.device)
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        launch: Any = loss_triton.loss_row[(rows,)]
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]  # Triton launches on the current one
            launch(logits, targets, unit, gradient, losses, logits.stride(0), classes, width, ignore, smoothing,
                   BLOCK=BLOCK, SMOOTH=smoothing != 0, num_warps=WARPS)  # fmt: skip
    return losses, gradient


@loss_rows.register_fake
def _(
    logits: Tensor, targets: Tensor, unit: Tensor, classes: int, ignore: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], dtype=torch.float32), torch.empty_like(
        logits, memory_format=torch.contiguous_format
    )


OPERATION: Any = torch.ops.mpcompile.loss_rows.default


def in_atens(
    logits: Tensor, targets: Tensor, unit: Tensor, classes: int, ignore: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """`loss_rows` in ATen's operations: what a graph that is read, exported or run elsewhere has in its place."""
    wide = logits[:, :classes].float()
    logs = F.log_softmax(wide, 1)
    counted = targets != ignore
    labels = torch.where(counted, targets, 0).unsqueeze(1)
    losses = -(1.0 - smoothing) * logs.gather(1, labels).squeeze(1)
    shares = logs.exp()
    if smoothing:
        losses = losses - (smoothing / classes) * logs.sum(1)
        shares = shares - smoothing / classes
    shares = shares.scatter_add(1, labels, torch.full_like(labels, smoothing - 1.0, dtype=shares.dtype))
    shares = torch.where(counted.unsqueeze(1), shares * unit, 0.0)
    gradient = F.pad(shares.to(logits.dtype), (0, logits.shape[1] - classes))
    return torch.where(counted, losses, 0.0), gradient.contiguous()


def serves(device: str) -> bool:
    """Whether steps on such a device take losses over a vocabulary by the kernel."""
    return device in DEVICES and available(device)
