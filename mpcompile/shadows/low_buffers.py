"""Buffers that a graph casts to FP16 itself: looked at again when they changed, for FP16 ends at 65,504.

The plan measured them when the graph was made; a checkpoint, or an edit, may bring larger numbers since.  Weights are
looked at where their shadows are cast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpcompile.formats import LARGEST
from mpcompile.shadows.table import refuse_infinite
from mpcompile.torch_internals.tensors import foreach_norm, version


class LowBuffers:
    """The look of one graph at the buffers that it casts to FP16.

    On a CPU their largest numbers are read at each call; elsewhere, where that waits for the device, when their version
    or their address is another one.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] | None = None

    def look(self, buffers: Sequence[Tensor]) -> None:
        """Called before the graph runs.

        Raises:
          RuntimeFailure: MP721, where FP16 cannot hold a finite number of one.
        """
        if not buffers or (not any(b.device.type == "cpu" for b in buffers) and _states(buffers) == self._seen):
            return
        with torch.inference_mode(False), torch.no_grad():
            sizes = [float(size) for size in foreach_norm([b.detach() for b in buffers], math.inf)]
            large = [b for b, size in zip(buffers, sizes, strict=True) if not size <= LARGEST["fp16"]]
            refuse_infinite([(b, b.to(torch.float16)) for b in large], "buffer")
        self.note(buffers)

    def note(self, buffers: Sequence[Tensor]) -> None:
        """Called after the graph ran: what it wrote to a buffer is no edit."""
        if buffers:
            self._seen = _states(buffers)


def _states(buffers: Sequence[Tensor]) -> list[tuple[int, int]]:
    # A tensor of inference mode has no version.
    return [(0 if b.is_inference() else version(b), b.data_ptr()) for b in buffers]


__all__ = ["LowBuffers"]
