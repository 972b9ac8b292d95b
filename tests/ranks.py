"""Several processes that meet in a gloo group and run one function."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, multiprocessing


def _enter(rank: int, size: int, folder: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        work(rank, *args)
    finally:
        distributed.destroy_process_group()


def together(work: Callable[..., None], *args: Any, size: int = 2) -> None:
    """Run ``work(rank, *args)`` in `size` processes; a failure in one of them is a failure here."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_enter, (size, folder, work, args), nprocs=size)


def of_all(tensor: torch.Tensor) -> list[torch.Tensor]:
    """`tensor` as each rank has it."""
    held = tensor.detach().contiguous()
    found = [torch.empty_like(held) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, held)
    return found


def same_everywhere(tensor: torch.Tensor) -> bool:
    """Whether all ranks have the same bits."""
    found = of_all(tensor)
    return all(torch.equal(found[0], one) for one in found[1:])


def own_part(batch: torch.Tensor, rank: int) -> torch.Tensor:
    """The rank's share of a batch."""
    return batch.chunk(distributed.get_world_size())[rank]


def in_own_process(work: Callable[..., None], *args: Any) -> None:
    """Run ``work(0, *args)`` in a group of one, and leave no group behind."""
    folder = tempfile.mkdtemp()
    distributed.init_process_group("gloo", init_method=f"file://{os.fspath(folder)}/meet", rank=0, world_size=1)
    try:
        work(0, *args)
    finally:
        distributed.destroy_process_group()
