"""Training on several GPUs of one host: ways to do it, in turn, in one job.

    torchrun --nproc-per-node 2 benchmarks/distributed.py --model gpt2 --out gpt2.json
    torchrun --nproc-per-node 2 benchmarks/distributed.py --model llama --only ddp,step,step-low --out llama.json
    torchrun --nproc-per-node 2 benchmarks/distributed.py --model gpt2 --only ddp,step-low --profile step-low
    torchrun --nproc-per-node 2 benchmarks/distributed.py --tiny            # a dry run, on a CPU

Each way trains its own copy of one model, written by hand (causal flag, aligned vocabulary), on the same batches, with
fused AdamW.  A round times every way once, another one first each time; seconds are the slowest rank's, and ratios are
medians of the rounds' own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mpcompile import mpcompile
from mpcompile.tools.bench_by_hand import GPT2, Llama

# name -> (model, batch, tokens): what one GPU is given.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "gpt2": (lambda: GPT2(50304, 1024, 768, 12, 12), 16, 1024),
    "llama": (lambda: Llama(128256, 2048, 2048, 8192, 32, 8, 16), 4, 2048),
    "tiny": (lambda: GPT2(256, 32, 64, 4, 2), 2, 32),
}
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Way:
    """One way to train, prepared, and what it did.

    Fields:
      step: (tokens, labels) -> loss; one whole optimizer step.
      held: bytes between steps, beyond those of all ways before it; peak: most bytes that the allocator has taken from the
        device during a step, likewise (what a CUDA graph works in is taken once, and allocated by nobody while it replays).
    """

    name: str
    step: Step | None = None
    first: float = 0.0
    losses: list[float] = field(default_factory=list)
    held: int = 0
    peak: int = 0
    times: list[float] = field(default_factory=list)
    error: str = ""


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)


def loop(call: nn.Module, model: nn.Module, around: Callable[[], Any] = contextlib.nullcontext) -> Step:
    """The loop that people write."""
    optimizer = optimizer_of(model)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with around():
            loss: Tensor = call(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def ddp(model: nn.Module, hook: bool = False) -> DistributedDataParallel:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    made = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=not hook)
    if hook:
        made.register_comm_hook(None, bf16_compress_hook)
    return made


def peer_ddp(model: nn.Module, device: str, hook: bool = False) -> Step:
    return loop(torch.compile(ddp(model, hook)), model, lambda: torch.autocast(device, torch.bfloat16))


def peer_alone(model: nn.Module, device: str) -> Step:
    return loop(torch.compile(model), model, lambda: torch.autocast(device, torch.bfloat16))


def peer_fsdp(model: Any, device: str) -> Step:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        block.compile()
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return loop(model, model)


def drop_in(model: nn.Module, device: str) -> Step:
    return loop(ddp(mpcompile(model, "bf16")), model)


def whole(policy: str, group: Any, **options: Any) -> Callable[[nn.Module, str], Step]:
    def make(model: nn.Module, device: str) -> Step:
        given = {"process_group": group(), "cuda_graph": CUDA_GRAPH[0], **options}
        made = mpcompile(model, policy).train_step(optimizer_of(model), **given)
        return lambda x, y: made(x, y).loss  # type: ignore[no-any-return]

    return make


WAYS: dict[str, Callable[[nn.Module, str], Step]] = {
    "ddp": peer_ddp,
    "ddp-hook": lambda model, device: peer_ddp(model, device, hook=True),
    "fsdp2": peer_fsdp,
    "drop-in": drop_in,
    "step": whole("bf16", lambda: dist.group.WORLD),
    "step-low": whole("bf16,reduce=low", lambda: dist.group.WORLD),
    "step-shard": whole("bf16,reduce=low", lambda: dist.group.WORLD, shard="update"),
    "step-full": whole("bf16,reduce=low", lambda: dist.group.WORLD, shard="full"),
    "ddp-alone": peer_alone,
    "step-alone": whole("bf16", lambda: _alone()),
}
_OWN: list[Any] = []
CUDA_GRAPH: list[Any] = ["auto"]


def _alone() -> Any:
    """A group of this rank alone; all ranks make all of them."""
    if not _OWN:
        _OWN.append([dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()])
    return _OWN[0]


class Bench:
    """What all ways are given."""

    def __init__(self, model: str, device: str, steps: int) -> None:
        make, self.batch, self.tokens = MODELS[model]
        torch.manual_seed(0)
        self.model = make()
        self.device, self.steps, self.rank = device, steps, dist.get_rank()
        self.vocabulary = next(m for m in self.model.modules() if isinstance(m, nn.Embedding)).num_embeddings
        generator = torch.Generator().manual_seed(1 + self.rank)
        self.data = [
            torch.randint(0, self.vocabulary, (self.batch, self.tokens), generator=generator).to(device)
            for _ in range(2)
        ]

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def held(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def taken(self) -> int:
        """Bytes taken from the device, what lies free given back first; the most of them counts from here on."""
        if self.device != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()

    def prepare(self, name: str) -> Way:
        way, before, taken, start = Way(name), self.held(), self.taken(), time.perf_counter()
        try:
            step = WAYS[name](copy.deepcopy(self.model).to(self.device), self.device)
            for number in range(8):
                if number == 6:
                    self.taken()
                way.losses.append(float(step(self.data[0], self.data[1])))
                way.first = way.first or time.perf_counter() - start
            way.step, way.held = step, self.held() - before
            if self.device == "cuda":
                way.peak = torch.cuda.max_memory_reserved() - taken
        except Exception as error:  # one way must not end the others; a rank alone in it would hang, and time out
            way.error = f"{type(error).__name__}: {error}"[:1500]
        gc.collect()
        return way

    def time(self, way: Way) -> float:
        """Seconds of a step, of the slowest rank."""
        assert way.step is not None
        dist.barrier()
        self.sync()
        start = time.perf_counter()
        for _ in range(self.steps):
            way.step(self.data[0], self.data[1])
        self.sync()
        seconds = torch.tensor((time.perf_counter() - start) / self.steps, device=self.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    def rounds(self, ways: list[Way], count: int) -> None:
        ready = [way for way in ways if way.step is not None]
        for number in range(count):
            shift = number % max(1, len(ready))
            for way in ready[shift:] + ready[:shift]:
                way.times.append(self.time(way))

    def profile(self, way: Way, folder: Path) -> dict[str, float]:
        """Milliseconds of a step's kernels, of its communication, and of that beside computation; writes a trace."""
        from torch.profiler import ProfilerActivity, profile

        assert way.step is not None
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            for _ in range(3):
                way.step(self.data[0], self.data[1])
            self.sync()
        if self.rank == 0:
            found.export_chrome_trace(str(folder / f"{way.name}.trace.json"))
        kernels = [e for e in found.events() if "cuda" in str(e.device_type).lower() and e.time_range.elapsed_us() > 0]
        sent = [(e.time_range.start, e.time_range.end) for e in kernels if "nccl" in e.name.lower()]
        rest = [(e.time_range.start, e.time_range.end) for e in kernels if "nccl" not in e.name.lower()]
        both = _length(sent) + _length(rest) - _length(sent + rest)
        scale = 1e-3 / 3
        return {
            "computing": _length(rest) * scale,
            "communicating": _length(sent) * scale,
            "communicating beside computation": both * scale,
        }


def _length(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def table(ways: list[Way], bench: Bench) -> list[dict[str, Any]]:
    rows = []
    for way in ways:
        row = asdict(way) | {"step": None}
        row.pop("step")
        if way.times:
            seconds = statistics.median(way.times)
            row |= {"seconds": seconds, "tokens a second of a GPU": bench.batch * bench.tokens / seconds}
            row["versus"] = {
                other.name: statistics.median(b / a for a, b in zip(way.times, other.times, strict=True))
                for other in ways
                if other.times and other is not way
            }
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["error"]:
            print(f"{row['name']:>11}  {row['error']}")
            continue
        versus = "  ".join(f"{name} {ratio:.3f}" for name, ratio in row["versus"].items())
        losses = " ".join(f"{one:.4f}" for one in row["losses"][:6])
        memory = f"held {row['held'] / 1e9:6.2f} GB  at most {row['peak'] / 1e9:6.2f} GB"
        print(f"{row['name']:>11}  {row['seconds'] * 1e3:8.2f} ms  {memory}  first {row['first']:5.1f} s")
        print(f"{'':>13}times as fast as: {versus}\n{'':>13}losses {losses}")


def keep(out: Path | None, model: str, device: str, rows: list[dict[str, Any]], profiles: dict[str, Any]) -> None:
    """Write what is known so far: a rank that hangs later must not cost it."""
    if out is None:
        return
    facts = {"model": model, "ranks": dist.get_world_size(), "torch": torch.__version__,
             "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}  # fmt: skip
    out.write_text(json.dumps({**facts, "ways": rows, "profiles": profiles}, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="gpt2")
    parser.add_argument("--only", help="names of ways, with commas", default=",".join(WAYS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="steps that a round times of each way")
    parser.add_argument("--profile", default="", help="names of ways whose kernels are looked at")
    parser.add_argument("--no-cuda-graph", action="store_true", help="run the whole steps kernel by kernel")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU: says only that it runs")
    parser.add_argument("--timeout", type=int, default=600, help="seconds after which a rank left waiting ends the job")
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args()
    device = "cpu" if given.tiny else "cuda"
    CUDA_GRAPH[0] = False if given.no_cuda_graph else "auto"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_float32_matmul_precision("high")
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=given.timeout))
    bench = Bench("tiny" if given.tiny else given.model, device, 2 if given.tiny else given.steps)
    ways = []
    for name in given.only.split(","):
        ways.append(bench.prepare(name))
        if bench.rank == 0:
            print(f"{name}: {ways[-1].error or f'first step in {ways[-1].first:.1f} s'}", flush=True)
            keep(given.out, given.model, device, table(ways, bench), {})
    bench.rounds(ways, 2 if given.tiny else given.rounds)
    if bench.rank == 0:
        keep(given.out, given.model, device, table(ways, bench), {})
    folder = given.out.parent if given.out else Path()
    profiles = {w.name: bench.profile(w, folder) for w in ways if w.step and w.name in given.profile.split(",")}
    rows = table(ways, bench)
    if bench.rank == 0:
        show(rows)
        for name, spans in profiles.items():
            print(name, {what: f"{ms:.2f} ms" for what, ms in spans.items()})
        keep(given.out, given.model, device, rows, profiles)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
