"""What a training step costs: bytes kept for the backward, peak bytes, seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mpcompile.torch_internals.tensors import storage_key


@dataclass(frozen=True)
class Saved:
    """Bytes that the forward keeps for the backward, parameters and their shadows apart; `fp32` of them are FP32."""

    total: int
    fp32: int


def saved_for_backward(forward: Callable[[], Tensor]) -> Saved:
    """Run a forward and its backward, and count what the backward set free.

    A storage counts once however many tensors show it. What is still alive when the graph is gone (parameters, their
    shadows, the batch, buffers) was not kept *for* the backward.
    """
    kept: dict[int, tuple[Any, int, bool]] = {}

    weak: Any = StorageWeakRef

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage_key(tensor), (weak(storage), storage.nbytes(), tensor.dtype == torch.float32))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    loss.backward()  # type: ignore[no-untyped-call]
    del loss
    freed = [(size, single) for ref, size, single in kept.values() if ref.expired()]
    return Saved(sum(size for size, _ in freed), sum(size for size, single in freed if single))


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most bytes that one step holds beyond what is held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Clock:
    """Seconds of a step: CPU time of this process on a CPU (one thread), the device's own events on CUDA."""

    def __init__(self, device: str, wall: bool = False) -> None:
        self.device, self.now = device, time.perf_counter if wall else time.process_time

    def seconds(self, step: Callable[[], Any]) -> float:
        if self.device != "cuda":
            start = self.now()
            step()
            return self.now() - start
        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        step()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1e3
