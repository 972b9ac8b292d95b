"""Inputs for a model that came without samples, and runs of it that end: in bounded time and memory, or not at all.

The inputs are seeded and of the declared shapes: normal and uniform floats, small integers, both bools.  They say less
than real samples do (`mpcompile.passes.measured_hazards` leaves room for that), but a model whose values overflow FP16
on them overflows on others, too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import onnxruntime as ort

from mpcompile.onnx.capture import OnnxCapture

SEED = 0
# Sizes that are tried in place of unknown dimensions, the first of a rank taken for the batch's.
SIZES = (16, 64, 224)
BATCH = 1
# Seconds that all runs of one model may take, and floating-point operations of one run that are worth starting.
SECONDS = 60.0
FLOPS = 2e12
# Bytes of inputs and of one value, beyond which nothing is run.
LARGE = 1 << 31
NUMPY = {
    "fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp64": np.float64, "int64": np.int64,
    "int32": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32,
    "uint64": np.uint64, "bool": np.bool_, "string": np.str_,
}  # fmt: skip

Feeds = Mapping[str, Any]
T = TypeVar("T")


class NotRun(Exception):
    """Why a model was not run on generated inputs."""


class Bounds:
    """Time and memory of some runs: what they share is stopped when `seconds` are over."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.options = ort.RunOptions()
        self.options.log_severity_level = 4
        self.options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.seconds, self.over = seconds, False

    def stop(self) -> None:
        self.over = self.options.terminate = True

    @contextmanager
    def running(self) -> Iterator[Bounds]:
        timer = threading.Timer(self.seconds, self.stop)
        timer.daemon = True
        timer.start()
        try:
            yield self
        finally:
            timer.cancel()

    def session_options(self) -> Any:
        """Options of a session whose memory is bounded, and which computes nothing before it runs."""
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if _bound_memory():
            options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        return options


@cache
def _bound_memory() -> bool:
    """Let sessions that ask for it share memory of at most half of what is free; whether that worked."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(info, ort.OrtArenaCfg({"max_mem": free // 2, "arena_extend_strategy": 1}))
    except (ValueError, OSError, RuntimeError, ort.capi.onnxruntime_pybind11_state.Fail):  # registered by somebody else
        return False
    return True


def on_generated(capture: OnnxCapture, act: Callable[[list[Feeds], Bounds], T],
                 samples: int = 2) -> tuple[str, T]:  # fmt: skip
    """Find inputs with which `act` does not fail, normal floats in one and uniform ones in the next.

    Returns:
      The inputs, in words, and what `act` gave.

    Raises:
      NotRun: when there are none.
    """
    _refuse_large(capture)
    why = ""
    with Bounds(SECONDS).running() as bounds:
        for size in SIZES if _is_open(capture) else SIZES[:1]:
            for most in (2, 1):  # indices of a short table, then the first alone
                try:
                    feeds = [_feeds(capture, size, most, number) for number in range(samples)]
                    given = act(feeds, bounds)
                    return _described(feeds) + (
                        f", in part: it ran {bounds.seconds:.0f} s" if bounds.over else ""
                    ), given
                except NotRun:
                    raise
                except Exception as error:  # ONNX Runtime has a class for each of its codes, and no base of them
                    why = " ".join(str(error).split())[:160]
                if bounds.over:
                    raise NotRun(f"it takes more than {bounds.seconds:.0f} seconds")
    raise NotRun(f"it does not run on them: {why}")


def _described(feeds: Sequence[Feeds]) -> str:
    inputs = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feeds[0].items())
    return f"{len(feeds)} generated inputs (seed {SEED}: {inputs})"


def _refuse_large(capture: OnnxCapture) -> None:
    graph = capture.graph
    if sum(node.flops for node in graph) > FLOPS:
        raise NotRun("a run takes too long")
    if any(value.numel * 4 > LARGE for value in graph.values.values()):
        raise NotRun("one of its values is too large")
    weights = sum(graph.values[name].numel * 4 for name in capture.tensors)
    if weights > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4:
        raise NotRun("its weights are too large for the memory that is free")


def _inputs(capture: OnnxCapture) -> list[str]:
    return [name for name in capture.graph.inputs if name not in capture.tensors]


def _is_open(capture: OnnxCapture) -> bool:
    shapes = [capture.graph.values[name].shape for name in _inputs(capture)]
    return any(not isinstance(dim, int) for shape in shapes for dim in shape[1:])


def _feeds(capture: OnnxCapture, size: int, most: int, number: int) -> Feeds:
    """Sample `number`; unknown dimensions are `size` long, and integers are below `most`."""
    random = np.random.default_rng([SEED, number])
    feeds: dict[str, Any] = {}
    for name in _inputs(capture):
        value = capture.graph.values[name]
        dtype = NUMPY.get(value.dtype)
        if dtype is None:
            raise NotRun(f"the input {capture.own(name)!r} is of type {value.dtype}")
        shape = [dim if isinstance(dim, int) else size if axis else BATCH for axis, dim in enumerate(value.shape)]
        feeds[capture.own(name)] = _array(random, shape, dtype, most, uniform=bool(number % 2))
    return feeds


def _array(random: Any, shape: Sequence[int], dtype: Any, most: int, *, uniform: bool) -> Any:
    kind = "f" if dtype is ml_dtypes.bfloat16 else np.dtype(dtype).kind
    if kind == "f":
        made = random.random(shape) if uniform else random.standard_normal(shape)
        return np.asarray(made).astype(dtype)
    if kind == "b":
        return np.asarray(random.integers(0, 2, shape)).astype(dtype) if most > 1 else np.ones(shape, dtype)
    if kind == "U":
        return np.full(shape, "a")
    return np.asarray(random.integers(0, most, shape) if most > 1 else np.ones(shape)).astype(dtype)


__all__ = ["Bounds", "NotRun", "on_generated"]
