"""What `benchmarks/fp8.py` trains: a Llama's step beside its peers, and a small model's losses by each recipe."""

from __future__ import annotations

import argparse
import functools
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile import Policy, mpcompile
from mpcompile.tools import bench_run
from mpcompile.tools.bench_by_hand import GPT2, Llama
from mpcompile.tools.bench_loops import CANDIDATES, Job, Loop, Plain, Step, compiled
from mpcompile.tools.bench_models import WORKLOADS, Workload
from mpcompile.tools.measure import Clock, peak_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _torchao(model: nn.Module, wanted: Sequence[str]) -> nn.Module:
    """The model with torchao's tensorwise recipe in linear layers under the wanted names. ImportError: it is not here."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and f"{name}.".startswith(tuple(f"{one}." for one in wanted))

    config = replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=DEVICE == "cpu")
    return convert_to_float8_training(model, module_filter_fn=chosen, config=config)  # type: ignore[no-any-return]


def _torchao_loop(job: Job) -> Loop:
    model = _torchao(job.model(), ["blocks"])
    return Plain(job, model, compiled(model), autocast="bf16")


WAYS: dict[str, tuple[str, Callable[[Job], Loop]]] = {
    "compile+autocast": ("bf16", CANDIDATES["compile+autocast"]),
    "step bf16": ("bf16", CANDIDATES["mpcompile step"]),
    "step fp8": ("fp8", CANDIDATES["mpcompile step"]),
    "torchao": ("bf16", _torchao_loop),
    "mpcompile bf16": ("bf16", CANDIDATES["mpcompile"]),
    "mpcompile fp8": ("fp8", CANDIDATES["mpcompile"]),
}
# Milliseconds of a step and peaks, written down before the run. Llama 1.2B: the peer, the BF16 step and torchao as they
# ran before; FP8 saves what its layers did alone (0.09 + 0.83 + 0.44 ms in each of 14 blocks), in a step 0.7 of it as
# before. llama-3b: products as Llama 8B's layers ran, attention, update and the rest as Llama 1.2B's by their sizes.
PREDICTED: dict[str, dict[str, dict[str, float]]] = {
    "llama-by-hand": {
        "compile+autocast": {"ms": 132.0, "peak": 1.0},
        "step bf16": {"ms": 127.4, "peak": 0.79},
        "step fp8": {"ms": 114.0, "peak": 0.76},
        "torchao": {"ms": 114.4, "peak": 0.82},
    },
    "llama-3b": {
        "compile+autocast": {"ms": 283.0, "peak": 1.0},
        "step bf16": {"ms": 272.0, "peak": 0.80},
        "step fp8": {"ms": 222.0, "peak": 0.75},
        "torchao": {"ms": 230.0, "peak": 0.82},
    },
}


def _llama_3b() -> Workload:
    """3.1 billion parameters in twelve layers of Llama 3 8B: what one GPU holds with FP32 masters and moments."""
    build = functools.partial(Llama, 128256, 2048, 4096, 14336, 32, 8, 12)
    return replace(WORKLOADS["llama-by-hand"](True), build=build)


def _tiny() -> Workload:
    ids = torch.zeros(2, 64, dtype=torch.int64)
    return Workload(
        functools.partial(Llama, 256, 64, 64, 128, 4, 2, 3), lambda rows: {"input_ids": ids, "labels": ids}, 2, 64
    )


@dataclass
class Budget:
    """Seconds for several candidates; each takes about as long as the longest before it."""

    seconds: float
    begun: float
    last: float = 0.0
    longest: float = 0.0

    @classmethod
    def of(cls, seconds: float) -> Budget:
        return cls(seconds, time.monotonic())

    def left(self, name: str) -> bool:
        now = time.monotonic()
        self.longest = max(self.longest, now - self.last if self.last else 0.0)
        self.last = now
        if now - self.begun + self.longest <= self.seconds:
            return True
        print(f"{name}: not begun, {self.seconds - now + self.begun:.0f} s are left", flush=True)
        return False


def train(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds and peak bytes of a step, the ways in turn in each round."""
    found: dict[str, Any] = {}
    budget = Budget.of(args.seconds)
    for model in args.models.split(","):
        loops: dict[str, Loop] = {}
        rows = found[model] = {"predicted": PREDICTED.get(model, {}), "ways": {}, "failed": {}}
        for name in args.ways.split(","):
            if not budget.left(f"{model} {name}"):
                continue
            try:
                loops[name] = _made(model, name, args)
                rows["ways"][name] = _checked(f"{model} {name}", loops[name])
            except Exception as error:  # one candidate must not end the others
                loops.pop(name, None)
                rows["failed"][name] = f"{type(error).__name__}: {error}"[:500]
                print(f"{model} {name}: {rows['failed'][name]}", flush=True)
            if args.apart:
                _rounds(loops, rows, args)
                loops.clear()
                bench_run.fresh()
            yield found
        _rounds(loops, rows, args)
        _table(model, rows)
        yield found
        loops.clear()
        bench_run.fresh()


def _made(model: str, name: str, args: argparse.Namespace) -> Loop:
    workload = _llama_3b() if model == "llama-3b" else WORKLOADS[model](True)
    workload = _tiny() if args.tiny else workload
    policy, make = WAYS[name]
    pinned = f",device={args.row}" if args.pin else ""
    job = Job(workload, DEVICE, Policy.parse(policy + pinned), workload.rows, 1)
    if not args.tiny:
        return make(job)
    # Op by op: nothing is compiled for minutes.
    plain = _torchao(job.model(), ["blocks"]) if name == "torchao" else job.model()
    return Step(job, plain, backend="eager") if name.startswith("step") else Plain(job, plain, plain, autocast="bf16")


def _checked(name: str, loop: Loop) -> dict[str, Any]:
    """The first steps: losses, compilation, peak bytes of the second (a step that is replayed allocates nothing)."""
    begun, losses = time.monotonic(), [loop.step().item()]
    first, held = time.monotonic() - begun, []
    peak = peak_bytes(lambda: held.append(loop.step()), DEVICE)
    losses += [held[0].item(), *(loop.step().item() for _ in range(6 if DEVICE == "cuda" else 1))]
    print(f"{name}: first step {first:.0f} s, losses {losses}, peak {peak / 2**30:.2f} GiB", flush=True)
    return {"first_s": round(first, 1), "losses": losses, "peak": peak, "seconds": []}


def _rounds(loops: dict[str, Loop], rows: dict[str, Any], args: argparse.Namespace) -> None:
    for _ in range(args.rounds):
        for name, loop in loops.items():
            _time(loop, rows["ways"][name])
    for name, loop in loops.items():
        if args.profile and DEVICE == "cuda":
            rows["ways"][name]["kernels"] = _kernels(loop)
    for row in rows["ways"].values():
        row["median"] = statistics.median(row["seconds"]) if row["seconds"] else None


def _time(loop: Loop, row: dict[str, Any]) -> None:
    clock, steps = Clock(DEVICE), 10 if DEVICE == "cuda" else 1

    def several() -> None:
        for _ in range(steps):
            loop.step()

    row["seconds"].append(clock.seconds(several) / steps)


def _kernels(loop: Loop, steps: int = 3) -> dict[str, list[float]]:
    """Kernel -> milliseconds and launches of a step, the fifty that take longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            loop.step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda one: -one.self_device_time_total)
    return {one.key: [round(one.self_device_time_total / 1e3 / steps, 4), one.count / steps] for one in events[:50]}


def _table(model: str, rows: dict[str, Any]) -> None:
    base = rows["ways"].get("compile+autocast")
    for name, row in rows["ways"].items():
        if row["median"] is None:
            continue
        ratio = base["median"] / row["median"] if base else float("nan")
        less = row["peak"] / base["peak"] if base and base["peak"] else float("nan")
        was = rows["predicted"].get(name, {})
        print(f"{model:16} {name:18} {row['median'] * 1e3:9.2f} ms (predicted {was.get('ms')})  {ratio:6.3f} times  "
              f"peak {less:5.2f} (predicted {was.get('peak')})", flush=True)  # fmt: skip


def text(limit: int) -> Tensor:
    """The source of Python's standard library, then torch's own: real text that every machine has. uint8 [at most `limit`].

    Raises:
      RuntimeError: there is less than a megabyte of it.
    """
    data = bytearray()
    for root in (Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root).parts
            if len(data) < limit and not {"site-packages", "test", "testing"} & set(inside):
                data += path.read_bytes()
    if len(data) < min(limit, 1 << 20):
        raise RuntimeError(f"{len(data)} bytes of Python source here: too little to train on")
    return torch.frombuffer(data[:limit], dtype=torch.uint8)


@dataclass(frozen=True)
class Shape:
    """A model of bytes and its batches; `build` makes it, `blocks` of it are numbered."""

    build: Callable[[], nn.Module]
    blocks: int
    rows: int
    time: int


SHAPES = {
    "gpt-124m": Shape(functools.partial(GPT2, 256, 1024, 768, 12, 12), 12, 16, 1024),
    "llama-350m": Shape(functools.partial(Llama, 256, 1024, 1024, 4096, 16, 8, 24), 24, 8, 1024),
    "tiny": Shape(functools.partial(GPT2, 256, 64, 64, 4, 3), 3, 2, 64),
}
# How the inner blocks' linear layers read: policy and whether by an override; None: torchao's.
RECIPES: dict[str, Policy | None] = {
    "bf16": Policy("bf16"),
    "fp8": Policy("bf16"),
    "rowwise": replace(Policy("bf16"), fp8="rowwise"),
    "torchao": None,
}
# Before the run: FP8's mean loss within the distance of two seeds of BF16 (0.01 of about 1.2 at such a length).
EXPECTED = "last and held of fp8 and torchao within 0.015 of bf16 from the same seed"
EVERY, RATE, WARM = 10, 6e-4, 100


def converge(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Losses on bytes: BF16, FP8 forced in every block but the ends, torchao's there, from equal seeds and batches."""
    shape, steps = SHAPES["tiny" if args.tiny else args.shape], args.steps
    data = text(1 << 20 if args.tiny else 1 << 24).to(DEVICE)
    setting = {"shape": "tiny" if args.tiny else args.shape, "steps": steps, "rows": shape.rows, "time": shape.time,
               "bytes": len(data), "learning_rate": RATE, "every": EVERY}  # fmt: skip
    found: dict[str, Any] = {"setting": setting, "expected": EXPECTED, "runs": []}
    budget = Budget.of(args.seconds)
    for seed in args.seeds:
        for name in args.recipes:
            if not budget.left(f"{name} seed {seed}"):
                continue
            try:
                run = _trained(name, shape, data, seed, steps, args.tiny)
            except ImportError as error:
                print(f"{name}: not here ({error})", flush=True)
                continue
            found["runs"].append({"recipe": name, "seed": seed, **run})
            print(
                f"{name:8} seed {seed}: last {run['last']:.4f}, held-out {run['held']:.4f}, {run['seconds']:.0f} s",
                flush=True,
            )
            bench_run.fresh()
            yield found


def _trained(name: str, shape: Shape, data: Tensor, seed: int, steps: int, tiny: bool) -> dict[str, Any]:
    begun = time.monotonic()
    torch.manual_seed(seed)
    model = shape.build().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    step = _step(name, model, optimizer, [f"blocks.{i}" for i in range(1, shape.blocks - 1)], tiny)
    part, draw, losses = data[: len(data) * 9 // 10], torch.Generator().manual_seed(seed), []
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (number + 1) / WARM)
        losses.append(step(**_batch(part, shape, draw)))
    curve, held = torch.stack(losses).tolist(), _held(model, data[len(part) :], shape)
    thin = [round(statistics.fmean(curve[at : at + EVERY]), 5) for at in range(0, len(curve), EVERY)]
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "losses": thin,
        "last": statistics.fmean(curve[-50:]),
        "held": held,
    }


def _step(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, inner: list[str], tiny: bool
) -> Callable[..., Tensor]:
    """One step of training by a recipe: batch -> loss."""
    policy = RECIPES[name]
    if policy is not None:
        asked = inner if name != "bf16" else []
        ours = mpcompile(model, policy, fp8=asked, backend="eager" if tiny else "inductor")
        run = ours.train_step(optimizer, max_grad_norm=1.0)
        return lambda **batch: run(**batch).loss  # type: ignore[no-any-return]
    call = _torchao(model, inner) if tiny else compiled(_torchao(model, inner))

    def theirs(**batch: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss: Tensor = call(**batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return theirs


def _held(model: nn.Module, data: Tensor, shape: Shape) -> float:
    """The mean loss of the weights as they are, in BF16 whatever trained them, on text that no step saw."""
    draw = torch.Generator().manual_seed(1234)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        return statistics.fmean(model(**_batch(data, shape, draw)).item() for _ in range(20))


def _batch(data: Tensor, shape: Shape, draw: torch.Generator) -> dict[str, Tensor]:
    starts = torch.randint(0, len(data) - shape.time - 1, (shape.rows, 1), generator=draw).to(DEVICE)
    cut = data[starts + torch.arange(shape.time + 1, device=DEVICE)].long()
    return {"input_ids": cut[:, :-1].contiguous(), "labels": cut[:, 1:].contiguous()}
