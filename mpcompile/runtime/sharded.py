"""Models whose parameters are spread over processes: known by what torch made of them; gathered ones run, others are refused.

FSDP2 (`fully_shard`) fills a parameter anew before each forward that reads it, without a version that rises: a shadow kept
for it would be stale.  Such parameters get none: what reads them low casts them in its graph, or they are gathered low
already (FSDP2's own `MixedPrecisionPolicy`).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from mpcompile.errors import CaptureError

log = logging.getLogger("mpcompile")


def is_gathered(model: nn.Module) -> bool:
    """Whether FSDP2 fills parameters of `model` anew at each forward."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in model.modules())


def refuse_sharded(model: nn.Module) -> None:
    """Parameters that are no tensors of this process's own while the forward reads them.

    Raises:
      CaptureError: MP107.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    known = {id(p) for m in model.modules() if isinstance(m, FSDPModule) for p in m.parameters()}
    found = [name for name, m in model.named_modules() if isinstance(m, FullyShardedDataParallel)]
    found += [name for name, p in model.named_parameters() if isinstance(p, DTensor) and id(p) not in known]
    if found:
        raise _refused(
            found[-1] or type(model).__name__, "it would be read as a DTensor, or as a view of a flat parameter"
        )


def refuse_tensor_parallel(inputs: list[Any]) -> None:
    """What FSDP2 gathered is still a DTensor: a product of it is a collective.

    Raises:
      CaptureError: MP107.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor

    if any(isinstance(one, DTensor) for one in inputs):
        raise _refused(
            "an input of the compiled graph", "it is a DTensor (tensor parallelism): its products are collectives"
        )


def refuse_gathered(model: nn.Module) -> None:
    """For the training step, which reads shadows of whole parameters.

    Raises:
      CaptureError: MP107.
    """
    if is_gathered(model):
        raise _refused(
            type(model).__name__,
            "the training step updates whole parameters, and fully_shard left this rank a part of each",
        )


@functools.cache
def say_gathered() -> None:
    """Once a process: what a sharded model gives up, and how to have it."""
    log.info(
        "mpcompile: parameters of fully_shard are read fresh at each forward, without shadows; gathered low they need no casts "
        "either: fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))"
    )


def _refused(where: str, why: str) -> CaptureError:
    return CaptureError(
        "MP107", "the model's parameters are sharded", where=where, why=why,
        try_="DDP(mpcompile(model)); or fully_shard and the drop-in: mp(x), loss.backward(), optimizer.step()",
    )  # fmt: skip
