"""Measures one model: prepares every candidate, then times them in turn, round after round, in one process."""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mpcompile.shadows.table import SHADOWS
from mpcompile.tools.bench_loops import CANDIDATES, Job, Loop
from mpcompile.tools.measure import Clock, peak_bytes, saved_for_backward

REFERENCE = "eager FP32"
SLOT_SECONDS = 0.3


@dataclass
class Result:
    """What one candidate did. Seconds are of one optimizer step; bytes are of one step beyond what it starts with.

    Fields:
      first: seconds of the first step, compilation included; `ours` of them are mpcompile's own.
      loss: after `BenchSettings.check` steps from the same weights; `difference` is relative to eager FP32's.
      saved, saved_fp32: bytes kept for the backward of one microbatch, parameters and shadows apart.
      peak: most bytes held during the second step beyond those held before it.
      state: bytes held between steps: parameters, optimizer state, shadows (CUDA only).
      casts: weights cast to the low type outside the compiled graphs, per step.
      seconds: median over the rounds.
      versus: how many times as fast as each other candidate: the median of the rounds' own ratios, which a machine
        that slows down and recovers between rounds does not bend (candidates timed together only).
    """

    candidate: str
    times: list[float] = field(default_factory=list)
    first: float = 0.0
    ours: float | None = None
    loss: float | None = None
    difference: float | None = None
    saved: int | None = None
    saved_fp32: int | None = None
    peak: int | None = None
    state: int | None = None
    casts: float | None = None
    seconds: float | None = None
    rate: float | None = None
    mfu: float | None = None
    versus: dict[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class BenchSettings:
    """How to measure: rounds, steps before the loss is compared, and the seconds that one model may take."""

    rounds: int = 7
    check: int = 5
    max_seconds: float = 600.0
    wall: bool = False


@dataclass
class Prepared:
    """A candidate that runs."""

    result: Result
    loop: Loop
    repeat: int = 1


def measure(job: Job, names: list[str], plan: BenchSettings, say: Callable[[str], None]) -> list[Result]:
    """One result per candidate, in the order of `names`; one that fails carries its error, and the rest go on."""
    end = time.monotonic() + plan.max_seconds
    together = _fit_together(job, len(names))
    ready: list[Prepared] = []
    results = []
    for name in names:
        say(f"{name}: compiling and checking" if name != "eager FP32" else name)
        prepared = _prepare(name, job, plan, end)
        results.append(prepared.result)
        if prepared.result.error:
            say(f"{name}: {prepared.result.error.splitlines()[0]}")
            _free()
            continue
        if together:
            ready.append(prepared)
        else:
            _rounds([prepared], job, plan, end)
        del prepared
        _free()
    _rounds(ready, job, plan, end)
    _finish(results, job)
    return results


def _rounds(ready: list[Prepared], job: Job, plan: BenchSettings, end: float) -> None:
    """Every candidate in turn, starting with another one each round."""
    clock = Clock(job.device, wall=plan.wall)
    for number in range(plan.rounds):
        if number >= 2 and time.monotonic() > end:
            return
        shift = number % max(1, len(ready))
        for one in ready[shift:] + ready[:shift]:
            one.result.times.append(clock.seconds(lambda one=one: _repeat(one)) / one.repeat)  # type: ignore[misc]


def _repeat(one: Prepared) -> None:
    for _ in range(one.repeat):
        one.loop.step()


def _prepare(name: str, job: Job, plan: BenchSettings, end: float) -> Prepared:
    result = Result(name)
    if time.monotonic() > end:
        result.error = "not run: out of time (--max-seconds)"
        return Prepared(result, None)  # type: ignore[arg-type]
    try:
        return _prepared(result, job, plan)
    except Exception as error:  # one candidate must not end the others
        result.error = f"{type(error).__name__}: {error}".strip()[:2000]
        return Prepared(result, None)  # type: ignore[arg-type]


def _prepared(result: Result, job: Job, plan: BenchSettings) -> Prepared:
    before = _allocated(job)
    loop = CANDIDATES[result.candidate](job)
    start = time.perf_counter()
    losses = [loop.step().item()]
    result.first, result.ours = time.perf_counter() - start, loop.ours()

    losses.append(_held(result, loop, job.device))
    rest = max(1, plan.check - len(losses))
    start = time.perf_counter()
    losses += [loop.step().item() for _ in range(rest)]
    typical = (time.perf_counter() - start) / rest
    result.loss = losses[plan.check - 1]
    result.state = _allocated(job) - before if job.device == "cuda" else None
    _saved(result, loop)
    return Prepared(result, loop, max(1, min(50, round(SLOT_SECONDS / max(typical, 1e-6)))))


def _held(result: Result, loop: Loop, device: str) -> float:
    """The second step's bytes, casts and loss: the optimizer's state is there by then, and no CUDA graph yet, whose
    replays allocate nothing that could be counted.
    """
    losses, casts = [], SHADOWS.casts
    result.peak = peak_bytes(lambda: losses.append(loop.step().item()), device)
    result.casts = SHADOWS.casts - casts
    return losses[0]


def _saved(result: Result, loop: Loop) -> None:
    if loop.forward is not None:
        kept = saved_for_backward(loop.forward)
        loop.optimizer.zero_grad(set_to_none=True)
        result.saved, result.saved_fp32 = kept.total, kept.fp32
    elif (known := loop.kept()) is not None:
        result.saved, result.saved_fp32 = known


def _finish(results: list[Result], job: Job) -> None:
    reference = next((r.loss for r in results if r.candidate == REFERENCE and not r.error), None)
    flops = None
    with contextlib.suppress(Exception):  # a count is no reason to lose a measurement
        flops = flops_of(job)
    for one in results:
        if not one.times:
            continue
        one.seconds = statistics.median(one.times)
        one.rate = job.units / one.seconds
        one.versus = {other.candidate: _ratio(other, one) for other in results if other.times}
        if flops and job.device == "cuda":
            one.mfu = flops / one.seconds / ceilings()[0]
        if reference is not None and one.loss is not None:
            one.difference = (one.loss - reference) / abs(reference)


def _ratio(other: Result, one: Result) -> float:
    return statistics.median(theirs / mine for theirs, mine in zip(other.times, one.times, strict=False))


def flops_of(job: Job) -> int:
    """Floating-point operations of one step's matrix work: the forward's, three times (no recomputation)."""
    batch = {name: tensor[:1] for name, tensor in job.data[0].items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        job.model()(**batch)
    return int(counter.get_total_flops()) * 3 * job.rows * job.micro


@functools.cache
def ceilings() -> tuple[float, float]:
    """(operations a second of a dense BF16 product, bytes a second read and written by a copy), measured on the GPU."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    clock = Clock("cuda")
    for _ in range(3):
        torch.mm(a, b)
        target.copy_(source)
    product = statistics.median(clock.seconds(lambda: torch.mm(a, b)) for _ in range(10))
    copy = statistics.median(clock.seconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * 8192**3 / product, 2 * source.numel() / copy


def floor_seconds(job: Job) -> float:
    """The least a step could take on this GPU: its matrix work at the measured BF16 rate, and AdamW's traffic
    (masters, gradients and both moments read, masters, moments and shadows written) at the measured copy rate.
    """
    parameters = sum(p.numel() for p in job.model().parameters())
    rate, copy = ceilings()
    return flops_of(job) / rate + parameters * 30 / copy


def _fit_together(job: Job, candidates: int) -> bool:
    """Whether all candidates' masters, moments and shadows fit on the device beside one step's activations."""
    if job.device != "cuda":
        return True
    parameters = sum(p.numel() for p in job.model().parameters())
    _free()
    return parameters * 18 * candidates < 0.5 * torch.cuda.mem_get_info()[0]


def _allocated(job: Job) -> int:
    return torch.cuda.memory_allocated() if job.device == "cuda" else 0


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch's own for the length of the context (0: as they are)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fresh() -> None:
    """Forget what was compiled for the model before."""
    torch.compiler.reset()
    _free()


def versions(device: str) -> dict[str, Any]:
    """Device, packages and threads, for the record."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "triton", "mpcompile"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    found["capability"] = (
        torch.cuda.get_device_capability() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    )
    found["threads"] = torch.get_num_threads()
    if device == "cuda":
        found["matmul_flops"], found["copy_bytes"] = ceilings()
    return found
