"""What all ranks of a step must have alike, compared once, before the first step, and named where it differs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpcompile.errors import TrainingError
from mpcompile.training.distributed.ranks import Ranks

Facts = list[tuple[str, Any]]
# Elements whose bits are held as int64 at once: a table of a large vocabulary would take 24 bytes for each.
PART = 1 << 22


def checksum(tensor: Tensor) -> Tensor:
    """A 0-dim int64 of all bits of a tensor, without waiting for its device: equal tensors have equal ones."""
    flat = tensor.detach().contiguous().reshape(-1)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}.get(flat.element_size())
    if bits is None or flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
        bits = {8: torch.int64, 4: torch.int32}[flat.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), PART):
        words = flat[start : start + PART].view(bits).long()
        # Numbered, so that the same numbers in another order are told apart.
        total += (words * (torch.arange(start, start + words.numel(), device=words.device) * 2 + 1)).sum()
    return total


def tensors_as_facts(named: Iterable[tuple[str, Tensor]]) -> Facts:
    """(name, shape and dtype, bits) of each tensor. Waits for the device once."""
    pairs = list(named)
    if not pairs:
        return []
    with torch.no_grad():
        sums = torch.stack([checksum(tensor).to(pairs[0][1].device) for _, tensor in pairs]).tolist()
    return [(name, (str(t.dtype), tuple(t.shape), bits)) for (name, t), bits in zip(pairs, sums, strict=True)]


def agree(ranks: Ranks, facts: Facts) -> None:
    """Compare facts over the ranks; a collective.

    Raises:
      TrainingError: MP546, on every rank, with the first fact that differs from the first rank's.
    """
    every: list[Facts | None] = [None] * ranks.size
    dist.all_gather_object(every, facts, group=ranks.group)
    first: Any = every[0]
    for rank, other in enumerate(every[1:], 1):
        found = _difference(first, other or [])
        if found is not None:
            name, ours, theirs = found
            raise TrainingError("MP546", f"rank {rank} of the step has another {name} than rank 0", where=name,
                                why=f"rank 0: {ours!r:.300}; rank {rank}: {theirs!r:.300}",
                                try_="make them alike: the same seed, or the same checkpoint, on all ranks")  # fmt: skip


def _difference(ours: Facts, theirs: Facts) -> tuple[str, Any, Any] | None:
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            return one[0], one, other
    if len(ours) != len(theirs):
        longer: Sequence[Any] = max(ours, theirs, key=len)
        return str(longer[min(len(ours), len(theirs))][0]), f"{len(ours)} things", f"{len(theirs)} things"
    return None


__all__ = ["Facts", "agree", "tensors_as_facts"]
