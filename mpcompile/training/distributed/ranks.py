"""The processes that train one model together: found from the model or from what the caller gives, or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.groups import has_communication_hook


@dataclass(frozen=True)
class Ranks:
    """The ranks that average their gradients.

    Fields:
      group: torch's process group; name: what graphs call it.
      size: how many; rank: which of them this process is.
    """

    group: Any
    name: str
    size: int
    rank: int

    def first(self) -> int:
        """The global number of the group's first rank."""
        return dist.get_global_rank(self.group, 0)


def find_ranks(model: nn.Module, process_group: Any, mesh: Any, device: torch.device) -> Ranks | None:
    """The ranks that train `model`; None where nobody said with whom. A group of one trains alone.

    Args:
      model: the model, or a DistributedDataParallel around it, whose group is taken.
      process_group, mesh: what the caller names; one of the two at most.

    Raises:
      TrainingError: MP535, MP541, MP547.
    """
    if process_group is not None and mesh is not None:
        raise TrainingError("MP541", "train_step was given both process_group= and mesh=", try_="one of the two")
    group = process_group
    if mesh is not None:
        if mesh.ndim != 1:
            raise TrainingError("MP547", f"the mesh has {mesh.ndim} dimensions", try_="one of them: mesh['data']")
        group = mesh.get_group()
    if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
        group = model.process_group
    if group is None:
        return None
    _refuse_hook(model)
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise TrainingError("MP547", "this process is not in the group", why=f"process_group is {group!r:.80}")
    _refuse_backend(group, device)
    return Ranks(group, str(group.group_name), group.size(), group.rank())


def _refuse_hook(model: nn.Module) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel) and has_communication_hook(model):
        raise TrainingError(
            "MP535",
            "the DistributedDataParallel has a communication hook",
            why="the step sends the gradients itself: the hook would never run",
            try_="the policy's reduce=low sends low gradients as they are; or the drop-in way, under which hooks run",
        )


def _refuse_backend(group: Any, device: torch.device) -> None:
    backends = dist.get_backend_config(group)
    kinds = dict(one.split(":") for one in backends.split(","))
    backend = kinds.get(device.type)
    # gloo of a group made for all devices works on a GPU by way of the host, and not in a graph.
    if backend is None or (device.type == "cuda" and backend == "gloo"):
        raise TrainingError("MP547", f"the process group has no backend for the model's device, {device}",
                            why=f"it has {backends}", try_="init_process_group('cpu:gloo,cuda:nccl')")  # fmt: skip


def plain(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel, or `model`: the step sends the gradients itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def refuse_alone(ranks: Ranks | None) -> None:
    """Refuse to train one of several ranks apart from the others.

    Raises:
      TrainingError: MP535; MP547, where the process group has ended.
    """
    if ranks is not None and ranks.size > 1 and not dist.is_initialized():
        raise TrainingError("MP547", "the process group of the step has ended", why="destroy_process_group was called",
                            try_="join ranks anew, and make another step with process_group=")  # fmt: skip
    if ranks is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise TrainingError(
            "MP535",
            f"the training step was called in a process group of {dist.get_world_size()} ranks",
            why="it was not told to train with them: the ranks' weights would drift apart",
            try_="mp.train_step(..., process_group=torch.distributed.group.WORLD), or mpcompile(DDP(model)).train_step(...)",
        )


__all__ = ["Ranks", "find_ranks", "plain", "refuse_alone"]
