"""Replay a whole step as one CUDA graph: forward, backward and update in one launch.

With a window of several batches there are three: the first batch's, which replaces the sums, a later batch's, which adds
to them, and the update's.  A run is recorded once its signature has run `WARM` times (kernels are tuned by then), over
copies of the batch at fixed addresses.  What a schedule changes (learning rates) lies in device tensors, which
`Updater.holds` refreshes before the replay; the loss scale grows and backs off inside the graph, branch-free.  A
parameter that moved, another signature or another updater asks for another recording.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.groups import before_groups_end
from mpcompile.torch_internals.tensors import foreach_copy

log = logging.getLogger("mpcompile")

WARM = 3


class Recording(Protocol):
    """What was recorded; `torch.cuda.CUDAGraph` is one."""

    def replay(self) -> None: ...


Run = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
Record = Callable[[Callable[[], tuple[Tensor, ...]]], tuple[Recording, tuple[Tensor, ...]]]


class CudaRecorder:
    """Records in CUDA graphs that share their memory: what one of them leaves behind is copied before another runs."""

    def __init__(self) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Recording, tuple[Tensor, ...]]:
        """The graph of `run`, and the tensors that hold its results after each replay."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self.pool):
            results = run()
        return graph, results


@dataclass
class _RecordedStep:
    """One recorded step: what to copy the batch into, what to replay, and where the results lie."""

    batch: list[Tensor]
    recording: Recording
    results: tuple[Tensor, ...]
    addresses: list[int]

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if tensors:
            foreach_copy(self.batch, list(tensors))
        self.recording.replay()
        # The next replay writes the same memory.
        return tuple(result.clone() for result in self.results)


class _BeforeGroupsEnd:
    """Lets go of recordings that hold a process group's collectives before the group ends.

    NCCL's communicator waits, when it is destroyed, for every CUDA graph that has captured an operation of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: weakref.WeakSet[Replays] = weakref.WeakSet()
        self._undo: Callable[[], None] | None = None

    def hold(self, replays: Replays) -> None:
        with self._lock:
            self._held.add(replays)
            self._undo = self._undo or before_groups_end(self._end)

    def drop(self, replays: Replays) -> None:
        """It has no recordings any more; the last one leaves torch as it was."""
        with self._lock:
            self._held.discard(replays)
            undo, self._undo = (None, self._undo) if self._held else (self._undo, None)
        if undo is not None:
            undo()

    def _end(self, group: Any) -> None:
        for replays in [one for one in self._held if one.group == group]:
            if replays.device.type == "cuda":
                torch.cuda.synchronize(replays.device)
            replays.clear()


_BEFORE = _BeforeGroupsEnd()


class Recorded:
    """The part of a training step that lets go of what it recorded."""

    # The step's `UpdateCache`, which holds its recordings.
    updates: Any

    def close(self) -> None:
        """Let go of the recorded CUDA graphs and their memory. A later call of the step records anew.

        A process group waits for graphs with its collectives: `destroy_process_group` closes the steps of its ranks by itself.
        """
        self.updates.replays.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Replays:
    """The recorded steps of one `TrainStep`.

    Args:
      wanted: "auto", True (an error where it cannot be), or False.
      device: where the model lives.
      record: how a run is recorded; None for a CUDA graph.
      group: the process group whose collectives a run has; before it ends, what was recorded is let go.
    """

    def __init__(
        self, wanted: Literal["auto"] | bool, device: torch.device, record: Record | None = None, group: Any = None
    ) -> None:
        self.group = group
        self.wanted, self.device, self._given, self._record = wanted, device, record, record
        self.on = wanted is not False and (device.type == "cuda" or record is not None)
        if wanted is True and not self.on:
            raise TrainingError("MP543", f"cuda_graph=True, and the model is on {device.type}")
        self._runs: dict[Any, int] = {}
        self._steps: dict[Any, _RecordedStep] = {}

    def clear(self) -> None:
        """What was recorded is void; keys may come again for other work."""
        self._runs.clear()
        self._steps.clear()
        # With the recordings their memory goes; the next ones share another.
        self._record = self._given
        _BEFORE.drop(self)

    def forget(self, part: int) -> None:
        """What has this id in its key is void: the object goes, and another one may get its id."""
        for table in (self._runs, self._steps):
            for key in [key for key in table if part in key]:
                del table[key]

    def find(self, key: Any, run: Run, tensors: Sequence[Tensor], fixed: Callable[[], Sequence[Tensor]]) -> Run:
        """What to call with the batch: `run` itself, or its replay.

        Args:
          key: the step's signature: the same key, the same work on tensors of the same sizes.  The objects whose ids it
            names must live on, until `clear` or `forget`.
          run: the results of a batch, everything else in place.
          tensors: the batch.
          fixed: gives the tensors that `run` reads and writes besides, whose addresses a recording holds.
        """
        if not self.on or any(t.device != self.device for t in tensors):
            return run
        count = self._runs[key] = self._runs.get(key, 0) + 1
        if count <= WARM:
            return run
        step = self._steps.get(key)
        if step is not None and step.addresses == _addresses(fixed()):
            return step
        return self._recorded(key, run, tensors, fixed) or run

    def _recorded(
        self, key: Any, run: Run, tensors: Sequence[Tensor], fixed: Callable[[], Sequence[Tensor]]
    ) -> _RecordedStep | None:
        batch = [t.clone() for t in tensors]
        self._record = self._record or CudaRecorder()
        try:
            recording, results = self._record(lambda: run(batch))
        except RuntimeError as error:
            if self.wanted is True:
                raise TrainingError("MP543", "the step cannot be captured", why=str(error).splitlines()[0]) from error
            log.warning("mpcompile: no CUDA graph for the step (%s); it runs without", str(error).splitlines()[0])
            self.on = False
            return None
        if self.group is not None:
            _BEFORE.hold(self)
        self._steps[key] = _RecordedStep(batch, recording, results, _addresses(fixed()))
        return self._steps[key]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))
