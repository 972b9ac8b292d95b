"""Models whose parameters are spread over processes: known by what torch made of them, and refused."""

from __future__ import annotations

import torch
from torch import nn

from mpcompile.errors import CaptureError


def refuse_sharded(model: nn.Module) -> None:
    """Parameters that are filled anew at each forward, or whose products are collectives.

    Raises:
      CaptureError: MP107.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    found = [name for name, m in model.named_modules() if isinstance(m, (FSDPModule, FullyShardedDataParallel))]
    found += [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if found:
        raise CaptureError(
            "MP107", "the model's parameters are sharded", where=found[-1] or type(model).__name__,
            why="a sharded parameter is filled again at each forward, and its low copy would not follow",
            try_="DDP(mpcompile(model)); or, under FSDP, its own MixedPrecisionPolicy",
        )  # fmt: skip
