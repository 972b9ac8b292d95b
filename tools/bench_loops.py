"""The candidates that `mpcompile bench` compares: each is one way to train the same model on the same batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mpcompile import Policy, mpcompile
from mpcompile.tools.bench_by_hand import LINEAR_CROSS_ENTROPY, Written
from mpcompile.tools.bench_models import Batch, Workload

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Job:
    """One model in one regime: `micro` batches of `rows` rows are one optimizer step."""

    workload: Workload
    device: str
    policy: Policy
    rows: int
    micro: int
    data: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        for _ in range(self.micro):
            batch = self.workload.sample(self.rows)
            self.data.append({name: self._place(tensor) for name, tensor in batch.items()})

    def model(self) -> nn.Module:
        """The model, with the same weights every time."""
        torch.manual_seed(0)
        module = self.workload.build().to(self.device).train()
        return module.to(memory_format=torch.channels_last) if self.workload.channels_last else module  # type: ignore[call-overload]

    @property
    def units(self) -> int:
        """Tokens, images or rows in one step."""
        return self.rows * self.micro * self.workload.per_row

    def _place(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device)
        four = self.workload.channels_last and tensor.dim() == 4
        return tensor.to(memory_format=torch.channels_last) if four else tensor


class Loop(Protocol):
    """A way to train: `step` makes one optimizer step and returns its mean loss (0-dim, on the device)."""

    forward: Callable[[], Tensor] | None  # of one microbatch, with a graph; None where the step has none of its own
    optimizer: torch.optim.Optimizer

    def ours(self) -> float | None:
        """Seconds of the compilation that are mpcompile's own; None where it has no part."""

    def kept(self) -> tuple[int, int] | None:
        """(all, FP32) bytes kept for the backward, where the loop knows them itself."""

    def step(self) -> Tensor: ...


class Plain:
    """The loop that everybody writes, around any callable."""

    def __init__(self, job: Job, model: nn.Module, call: Callable[..., Tensor], *, autocast: str = "") -> None:
        self.job, self.call, self.autocast = job, call, autocast
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        self.data = [_as(batch, next(model.parameters()).dtype) for batch in job.data]
        self.scaler = torch.amp.GradScaler(job.device, enabled=False)
        self.forward: Callable[[], Tensor] | None = lambda: self._loss(self.data[0])

    def ours(self) -> float | None:
        return getattr(self.call, "compile_seconds", None)

    def kept(self) -> tuple[int, int] | None:
        return None

    def scaled(self) -> Plain:
        self.scaler = torch.amp.GradScaler(self.job.device)
        return self

    def _loss(self, batch: Batch) -> Tensor:
        if not self.autocast:
            return self.call(**batch)
        with torch.autocast(self.job.device, LOW[self.autocast]):
            return self.call(**batch)

    def step(self) -> Tensor:
        total = torch.zeros((), device=self.job.device)
        for batch in self.data:
            loss = self._loss(batch) / len(self.data)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total


class Precision(Plain):
    """The plain loop with FP32 matmuls rounded to TF32 inside."""

    def step(self) -> Tensor:
        with tf32(True):
            return super().step()


class Step:
    """`mp.train_step`."""

    def __init__(self, job: Job, model: nn.Module, **options: Any) -> None:
        self.job = job
        self.forward: Callable[[], Tensor] | None = None
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        self.run = mpcompile(model, job.policy).train_step(self.optimizer, accumulate=job.micro, **options)

    def step(self) -> Tensor:
        total = torch.zeros((), device=self.job.device)
        for batch in self.job.data:
            total += self.run(**batch).loss
        return total / self.job.micro

    def ours(self) -> float | None:
        return float(self.run.compile_seconds)

    def kept(self) -> tuple[int, int] | None:
        return self.run.saved_bytes  # type: ignore[no-any-return]


class Captured:
    """The loop that an expert writes on CUDA: compiled, autocast inside, a low stream, one CUDA graph around the step.

    Nothing of it waits for the host: a capturable fused optimizer, static batches, gradients kept where they are.
    FP16 has no such loop (`GradScaler` reads the device).
    """

    forward: Callable[[], Tensor] | None = None

    def __init__(self, job: Job, mode: str) -> None:
        model, low = job.model(), job.policy.low
        if isinstance(model, Written):
            model.stream, model.chunked = LOW[low], LINEAR_CROSS_ENTROPY is not None
        self.job, self.low = job, low
        self.call = compiled(model, mode=mode)
        self.parameters = list(model.parameters())
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, fused=True, capturable=True
        )
        self.total = torch.zeros((), device=job.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps = 0

    def ours(self) -> float | None:
        return None

    def kept(self) -> tuple[int, int] | None:
        return None

    def _whole(self) -> None:
        self.total.zero_()
        for batch in self.job.data:
            with torch.autocast(self.job.device, LOW[self.low], cache_enabled=False):
                loss = self.call(**batch) / len(self.job.data)
            loss.backward()  # type: ignore[no-untyped-call]
            self.total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> Tensor:
        if self.graph is not None:
            self.graph.replay()
        elif self.eager_steps < CAPTURE_AFTER:
            self.eager_steps += 1
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._whole()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._whole()
            graph.replay()
            self.graph = graph
        return self.total.clone()


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """FP32 matmuls and convolutions with or without TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def compiled(model: nn.Module, **options: Any) -> Callable[..., Tensor]:
    """torch.compile, with a cache of its own: candidates must not exhaust each other's recompile limit."""

    def call(**batch: Tensor) -> Tensor:
        return model(**batch)  # type: ignore[no-any-return]

    call.__code__ = call.__code__.replace()
    return torch.compile(call, **options)


def _as(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its floats in the model's dtype."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}


def _autocast(job: Job, wrap: Callable[[nn.Module], Callable[..., Tensor]]) -> Loop:
    model, low = job.model(), job.policy.low
    loop = Plain(job, model, wrap(model), autocast=low)
    return loop.scaled() if low == "fp16" else loop


def _plain(job: Job, wrap: Callable[[nn.Module], Callable[..., Tensor]], kind: type[Plain] = Plain) -> Loop:
    model = job.model()
    return kind(job, model, wrap(model))


def _pure(job: Job) -> Loop:
    model = job.model().to(torch.bfloat16)
    return Plain(job, model, compiled(model))


def _dropin(job: Job) -> Loop:
    model = job.model()
    # What autocast returns is what the last operation gave; the losses of these models are FP32 either way.
    loop = Plain(job, model, mpcompile(model, replace(job.policy, output="keep")))
    return loop.scaled() if job.policy.low == "fp16" else loop


def _same(model: nn.Module) -> Any:
    return model


def _reduce_overhead(job: Job) -> Loop:
    """torch.compile's own CUDA graphs."""
    return _autocast(job, lambda model: compiled(model, mode="reduce-overhead"))


CANDIDATES: dict[str, Callable[[Job], Loop]] = {
    "eager FP32": lambda job: _plain(job, _same),
    "eager TF32": lambda job: _plain(job, _same, Precision),
    "compile FP32": lambda job: _plain(job, compiled),
    "compile TF32": lambda job: _plain(job, compiled, Precision),
    "eager autocast": lambda job: _autocast(job, _same),
    "compile+autocast": lambda job: _autocast(job, compiled),
    "compile+autocast graphs": _reduce_overhead,
    "expert": lambda job: Captured(job, "max-autotune-no-cudagraphs"),
    "pure BF16": _pure,
    "mpcompile": _dropin,
    "mpcompile step": lambda job: Step(job, job.model()),
    "mpcompile step recompute": lambda job: Step(job, job.model(), recompute=True),
}
# What says nothing on a CPU: there is no TF32, and the step makes cheap chains again as it is.
_CUDA_ONLY = ("eager TF32", "compile TF32", "compile+autocast graphs", "expert", "mpcompile step recompute")
# Steps that `Captured` runs before it captures one: compilation, and the optimizer's state.
CAPTURE_AFTER = 3


def candidates_for(device: str) -> list[str]:
    """The candidates that mean something on the device."""
    return [name for name in CANDIDATES if device == "cuda" or name not in _CUDA_ONLY]
