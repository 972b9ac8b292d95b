"""Models whose parameters are no plain tensors of this process: spread over several, or quantised.

They are known by what torch made of them; gathered ones run, others are refused.

FSDP2 (`fully_shard`) fills a parameter anew before each forward that reads it, without a version that rises: a shadow kept
for it would be stale.  Such parameters get none: what reads them low casts them in its graph, or they are gathered low
already (FSDP2's own `MixedPrecisionPolicy`).
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any

import torch
from torch import nn

from mpcompile.errors import CaptureError, TrainingError

log = logging.getLogger("mpcompile")
# Models whose weights a training step has shared out among the ranks: they hold none between its calls.
SHARED_OUT: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_KNOWN = ("torch.distributed.", "torch.nested.", "torch._subclasses.")


def is_gathered(model: nn.Module) -> bool:
    """Whether FSDP2 fills parameters of `model` anew at each forward."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in model.modules())


def refuse_shared_out(model: nn.Module) -> None:
    """Refuse to read weights that are not there.

    Raises:
      TrainingError: MP549.
    """
    if model in SHARED_OUT:
        raise TrainingError("MP549", "the model's weights are shared out among the ranks", where=type(model).__name__,
                            why="shard='full': a rank holds a share of each, and nothing whole, between the step's calls",
                            try_="`with step.full_masters(): ...` on all ranks, around what reads weights")  # fmt: skip


def refuse_sharded(model: nn.Module) -> None:
    """Parameters that are no plain tensors of this process's own while the forward reads them.

    Raises:
      CaptureError: MP107; MP108 for quantised ones.
    """
    for name, one in (*model.named_parameters(), *model.named_buffers()):
        if _is_wrapped(one):
            raise _wrapped(name, one)
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


def refuse_wrapped_inputs(inputs: list[Any]) -> None:
    """What FSDP2 gathered may still be a DTensor, whose products are collectives; a weight may be quantised.

    Raises:
      CaptureError: MP107, MP108.
    """
    for one in inputs:
        if _is_wrapped(one):
            raise _wrapped("an input of the compiled graph", one)
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


def _is_wrapped(tensor: Any) -> bool:
    """Made of other tensors, by the protocol of torch's traceable subclasses; distributed and nested ones are known."""
    kind = type(tensor)
    return hasattr(kind, "__tensor_flatten__") and not kind.__module__.startswith(_KNOWN)


def _wrapped(where: str, tensor: torch.Tensor) -> CaptureError:
    return CaptureError(
        "MP108", f"a weight is a {type(tensor).__module__.partition('.')[0]} {type(tensor).__name__}", where=where,
        why="its operations run other kernels than those that the plan chooses among",
        try_="a base in BF16 or FP16, frozen; or torch.compile with autocast, without mpcompile",
    )  # fmt: skip


def _refused(where: str, why: str) -> CaptureError:
    return CaptureError(
        "MP107", "the model's parameters are sharded", where=where, why=why,
        try_="DDP(mpcompile(model)); or fully_shard and the drop-in: mp(x), loss.backward(), optimizer.step()",
    )  # fmt: skip
