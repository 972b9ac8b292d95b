"""Text that every machine has: the source of Python's own standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

LIMIT = 4_000_000


def stdlib_bytes(limit: int = LIMIT) -> Tensor:
    """The first `limit` bytes of the library's modules, in order of name: uint8 [n]."""
    parts: list[bytes] = []
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= limit:
            break
    return torch.frombuffer(bytearray(b"\n".join(parts)[:limit]), dtype=torch.uint8)


def batches(text: Tensor, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Windows at random places: int64 [batch, length] for ever; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(length, device=text.device)
    while True:
        starts = torch.randint(len(text) - length, (batch, 1), generator=generator).to(text.device)
        yield text[starts + window].long()
