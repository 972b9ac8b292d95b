"""The update kernels at the sizes of GPT-2 124M and Llama 1.24B: right first, then bytes per second.

PYTHONPATH=. python3 benchmarks/update_kernel.py --out results [--quick | --tiny]

Every value is compared with FP64 arithmetic before anything is timed.  Allowed is one unit in the last place of the
numbers that a result is a sum of, and for a master four of what its change is a sum of: among 1.2 billion elements some
p - lr * u cancel to a billionth of either, and the last place of what is left says nothing of the arithmetic.  Then the
update is timed as a replayed CUDA graph, beside ATen's fused AdamW alone and beside today's whole update (look, copies
to FP32, norms, clip, fused kernel, shadows), against the copy rate that this device reaches in the same run.

Predictions, written before the first run (H200, copies at 4.3 TB/s measured earlier; 85 % of it is the goal):

| | bytes a parameter | GB | at 85 % of 4.3 TB/s | at 92 % |
|---|---|---|---|---|
| GPT-2, all gradients BF16 | 30 | 3.73 | 1.02 ms | 0.94 ms |
| GPT-2, the tied weight with an FP32 gradient beside its BF16 one | 30; 38 of the tied | 4.04 | 1.11 ms | 1.02 ms |
| Llama, all gradients BF16 | 30 | 37.1 | 10.1 ms | 9.4 ms |
| Llama, tied weight as above | 30; 38 of the tied | 39.2 | 10.7 ms | 9.9 ms |
| Llama, split masters | 28 | 34.6 | 9.5 ms | 8.7 ms |
| ATen's fused AdamW alone, FP32 gradients (Llama) | 28 | 34.6 | | 8.9 ms (measured in a step) |
| today's whole update (Llama) | 46 | 56.9 | | 18 ms (8.9 + 9 measured in a step) |

The first pass (2 bytes of 30) should take 0.65 ms of Llama's; the scalars' kernel 10 us; FP64 between load and store
should cost nothing (its rate is half that of FP32 here, 13 conversions an element are 55 % of their pipe): if FP32
arithmetic (`wide=False`) is more than 3 % faster, that is wrong.  A skipped step should take the first pass and
2.4 million programs that return at once: under 2.5 ms (Llama).

The first run said: GPT-2 1.14 ms in FP64 and 0.95 in FP32 (chunks of 1024), so the last prediction was wrong, and FP32
is what runs; 2.36 ms for today's whole update, 1.30 for ATen's fused AdamW alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor

from mpcompile.runtime.kernels.table import Rows
from mpcompile.runtime.kernels.update import Rule, Scale, Shape, UpdateKernel, adam_numbers
from mpcompile.training.loss_scale.scale import LossScale

say = functools.partial(print, flush=True)
LOW = torch.bfloat16
NUMBERS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gpt2(tiny: bool) -> list[tuple[int, ...]]:
    width, layers, vocabulary, context = (16, 1, 24, 8) if tiny else (768, 12, 50304, 1024)
    norm = [(width,), (width,)]
    linear = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *[*norm, *linear, *norm, *mlp] * layers, *norm]


def llama(tiny: bool) -> list[tuple[int, ...]]:
    width, layers, vocabulary, keys, inner = (16, 1, 24, 8, 32) if tiny else (2048, 16, 128256, 512, 8192)
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    mlp = [(inner, width), (inner, width), (width, inner)]
    return [(vocabulary, width), *[*attention, *mlp, (width,), (width,)] * layers, (width,)]


@dataclass
class State:
    """Parameters in the middle of training; one gradient each, and a second FP32 one of the first (tied) where asked."""

    params: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]
    shadows: list[Tensor | None]
    grads: list[Tensor]
    parts: list[tuple[int, ...]]

    @classmethod
    def make(cls, shapes: Sequence[tuple[int, ...]], device: str, tied: bool) -> State:
        torch.manual_seed(1)
        params = [torch.randn(shape, device=device) * 0.02 for shape in shapes]
        grads = [torch.randn(shape, device=device, dtype=LOW).mul_(1e-3) for shape in shapes]
        parts: list[tuple[int, ...]] = [(i,) for i in range(len(shapes))]
        if tied:
            grads.append(torch.randn(shapes[0], device=device).mul_(1e-3))
            parts[0] = (0, len(shapes))
        first = [torch.randn_like(p).mul_(1e-3) for p in params]
        second = [torch.rand_like(p).mul_(1e-6) for p in params]
        base = torch.full((len(params),), 9.0, device=device)
        shadows: list[Tensor | None] = [p.to(LOW) for p in params]
        return cls(params, first, second, list(base.unbind()), shadows, grads, parts)

    def rows(self) -> Rows:
        none: list[Any] = [None] * len(self.params)
        return Rows(self.params, [*self.first], [*self.second], self.shadows, none, [*self.steps], [0] * len(none))

    def split(self) -> Rows:
        from mpcompile.training.optimizer.split import split

        halves = [split(p) for p in self.params]
        none: list[Any] = [None] * len(halves)
        return replace(
            self.rows(), masters=[high for high, _ in halves], lowers=[low for _, low in halves], shadows=none
        )

    def bytes(self) -> int:
        """What the two passes must move with whole masters."""
        read = sum(self.grads[i].numel() * self.grads[i].element_size() for part in self.parts for i in part)
        return 2 * read + 26 * sum(p.numel() for p in self.params)


def kernel_of(state: State, rows: Rows | None = None, shape: Shape | None = None) -> tuple[UpdateKernel, Any]:
    scale = LossScale.static(1.0).initial(state.params[0].device)
    kernel = UpdateKernel(
        rows or state.rows(), state.parts, state.grads, adam=True, groups=[adam_numbers(NUMBERS, True)], low=LOW,
        max_norm=1.0, rule=Rule(off=True), scale=Scale(*scale, scale.scale.clone()), shape=shape,
    )  # fmt: skip
    return kernel, scale


def low_moments(state: State, kind: str, rows: Rows) -> Rows:
    """The same rows with their moments in BF16 or in codes."""
    from mpcompile.training.optimizer.low_states import encode

    firsts = [encode(m, True, kind) for m in state.first]
    seconds = [encode(v, False, kind) for v in state.second]
    return replace(
        rows, firsts=[m for m, _ in firsts], seconds=[v for v, _ in seconds],
        first_scales=[s for _, s in firsts], second_scales=[s for _, s in seconds],
    )  # fmt: skip


Before = tuple[Tensor, Tensor, Tensor]


def exact(state: State, number: int, before: Before, step: float, factor: float, wide: bool) -> tuple[Tensor, ...]:
    """Master and moments of a parameter after the step, in FP64, and the size of what the change is a sum of.

    The gradient's own rounding is part of FP32's way.
    """
    grad = functools.reduce(torch.add, [state.grads[i].float() for i in state.parts[number]])
    grad = grad.double() * factor if wide else (grad * factor).double()
    master, first, second = (t.double() for t in before)
    (b1, b2), lr = NUMBERS["betas"], NUMBERS["lr"]
    terms = first.abs() * b1 + grad.abs() * (1 - b1)
    first = first * b1 + grad * (1 - b1)
    second = second * b2 + grad * grad * (1 - b2)
    below = (second / (1 - b2**step)).sqrt() + NUMBERS["eps"]
    size = lr / (1 - b1**step)
    after = master * (1 - lr * NUMBERS["weight_decay"]) - size * first / below
    return after, first, second, size * terms / below


def step_at(value: Tensor) -> Tensor:
    near = value.abs().float()
    return (torch.nextafter(near, torch.full_like(near, math.inf)) - near).double()


def off(got: Tensor, want: Tensor, before: Tensor, change: Tensor | None) -> float:
    """The worst distance, as a part of what is allowed: a unit of the terms, four of those of the change."""
    allowed = step_at(want.abs() + before.abs().double())
    allowed += 0.0 if change is None else 4.0 * step_at(change)
    return float(((got.double() - want).abs() / allowed).max())


def check(state: State, shape: Shape | None = None) -> dict[str, float]:
    """The worst distances from FP64, as parts of what is allowed; the norm's relative error; shadows that differ."""
    kernel, _ = kernel_of(state, shape=shape)
    sums = [functools.reduce(torch.add, [state.grads[i].float() for i in part]) for part in state.parts]
    norm = math.sqrt(sum(float(each.double().square().sum()) for each in sums))
    del sums
    wide, worst = kernel.shape.wide, dict.fromkeys(("master", "first", "second"), 0.0)
    befores = [
        (p.clone(), m.clone(), v.clone()) for p, m, v in zip(state.params, state.first, state.second, strict=True)
    ]
    step = float(state.steps[0]) + 1
    found = kernel(state.grads)
    factor = float(kernel._factors[0])
    # One at a time: FP64 copies of all would not fit beside the rest.
    for i, before in enumerate(befores):
        now = state.params[i], state.first[i], state.second[i]
        *want, terms = exact(state, i, before, step, factor, wide)
        for key, got, one, old in zip(worst, now, want, before, strict=True):
            worst[key] = max(worst[key], off(got, one, old, None if wide or key != "master" else terms))
    pairs = [(s, p) for s, p in zip(state.shadows, state.params, strict=True) if s is not None]
    differ = sum(int((s != p.to(LOW)).sum()) for s, p in pairs) if state.params[0].is_cuda else 0
    return {**worst, "norm": abs(float(found.norm) / norm - 1), "shadows that differ": differ, "factor": factor}


def seconds(run: Callable[[], Any], device: str, rounds: int = 7) -> float:
    """Median seconds of a run, as a replayed CUDA graph where there is a device."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(3):
            captured.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 3e3)
    return statistics.median(times)


def host_seconds(run: Callable[[], Any], device: str) -> float:
    """Seconds that the host spends in a call, the device's work apart."""
    times = []
    for _ in range(50 if device == "cuda" else 1):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_rates(device: str, tiny: bool) -> dict[str, float]:
    """Bytes per second that a copy reads and writes: the driver's own, and one by a kernel. 4 GiB, warmed up."""
    source = torch.randn(1 << (12 if tiny else 30), device=device)
    target = torch.empty_like(source)
    for _ in range(0 if tiny else 100):
        torch.mul(source, 1.0, out=target)
    copies = {"driver": lambda: target.copy_(source), "kernel": lambda: torch.mul(source, 1.0, out=target)}
    return {key: 2 * source.numel() * 4 / seconds(run, device, 15) for key, run in copies.items()}


SHAPES = [
    Shape(wide=True), Shape(chunk=512), Shape(chunk=2048, warps=8), Shape(chunk=1024, warps=8), Shape(chunk=256, warps=2),
    Shape(chunk=512, wide=True), Shape(look_chunk=8192), Shape(look_chunk=2048, look_warps=4),
]  # fmt: skip


def today(state: State) -> Callable[[], Any]:
    """The whole update as `train_step` ran it without the kernels: ATen's fused AdamW and what surrounds it."""
    from mpcompile.training.optimizer import fused_update as fused
    from mpcompile.training.optimizer.binding import bind
    from mpcompile.training.optimizer.hosts import Optimizers
    from mpcompile.training.optimizer.traced_update import Spec

    params = [p.detach().requires_grad_() for p in state.params]
    optimizer = torch.optim.AdamW(params, **NUMBERS, fused=True)
    binding = bind(Optimizers(optimizer), params)
    for p, m, v in zip(params, state.first, state.second, strict=True):
        optimizer.state[p].update(exp_avg=m, exp_avg_sq=v)
    binding.fused = True
    rule = LossScale.static(1.0)
    scale = rule.initial(params[0].device)
    shadows = [(i, s) for i, s in enumerate(state.shadows) if s is not None]
    spec = Spec(rule, tuple(state.parts), tuple((i, s.dtype) for i, s in shadows), 1.0)
    update = fused.build(spec, binding, scale, scale.scale.clone(), [s for _, s in shadows], state.grads, "eager")
    return lambda: update(state.grads)


def aten(state: State) -> Callable[[], Any]:
    """ATen's fused AdamW alone, on FP32 gradients that lie ready."""
    grads = [torch.randn_like(p).mul_(1e-3) for p in state.params]
    base = torch.zeros(len(grads), device=grads[0].device)
    (b1, b2), steps = NUMBERS["betas"], list(base.unbind())

    def run() -> None:
        torch._fused_adamw_(state.params, grads, state.first, state.second, [], steps, lr=NUMBERS["lr"], beta1=b1, beta2=b2,
                            weight_decay=NUMBERS["weight_decay"], eps=NUMBERS["eps"], amsgrad=False, maximize=False)  # fmt: skip

    return run


def parts(kernel: UpdateKernel, state: State, device: str) -> dict[str, float]:
    """Milliseconds of each launch, and of a skipped update."""
    grads = kernel._gather(state.grads)
    table = kernel._table.now(grads)
    found = {
        "look": seconds(lambda: kernel._look(table), device),
        "advance_scale": seconds(lambda: kernel._advance_scale(table, None, None), device),
        "move": seconds(lambda: kernel._move(table), device),
    }
    last = state.grads[-1].view(-1)[-1:]
    kept = last.clone()
    last.fill_(math.inf)
    found["skipped"] = seconds(lambda: kernel(state.grads), device)
    last.copy_(kept)
    return {key: value * 1e3 for key, value in found.items()}


def measured(
    name: str, shapes: Sequence[tuple[int, ...]], device: str, tied: bool, rate: float, sweep: bool
) -> dict[str, Any]:
    state = State.make(shapes, device, tied)
    count, least = sum(p.numel() for p in state.params), state.bytes()
    found: dict[str, Any] = {"parameters": count, "bytes": least, "bytes a parameter": least / count}
    for kind, shape in (("check", Shape()), ("check in FP64", Shape(wide=True))):
        found[kind] = check(state, shape)
        say(f"{name}: {count:,} parameters; {kind}: {json.dumps(found[kind])}")
        # Of FP64's own: sums that cancel lose its last places too, and the root's second place is FP32.
        if max(found[kind][key] for key in ("master", "first", "second")) > 1 or found[kind]["shadows that differ"]:
            raise SystemExit(f"{name}: the update is wrong: {found[kind]}")

    def row(label: str, run: Callable[[], Any], bytes_: float) -> None:
        took = seconds(run, device)
        found[label] = {"ms": took * 1e3, "TB/s": bytes_ / took / 1e12, "of copy": bytes_ / took / rate}
        say(
            f"  {label}: {took * 1e3:.3f} ms, {bytes_ / took / 1e12:.2f} TB/s, {bytes_ / took / rate:.1%} of the copy rate"
        )

    kernel, _ = kernel_of(state)
    row("kernel", lambda: kernel(state.grads), least)
    found["host ms"] = host_seconds(lambda: kernel(state.grads), device) * 1e3
    found["host ms, addresses"] = host_seconds(lambda: kernel._table.now(kernel._gather(state.grads)), device) * 1e3
    found["parts"] = parts(kernel, state, device)
    launches = json.dumps({key: round(value, 4) for key, value in found["parts"].items()})
    say(
        f"  host {found['host ms']:.3f} ms a call, {found['host ms, addresses']:.3f} of it addresses; launches: {launches}"
    )
    for shape in SHAPES if sweep else SHAPES[:1]:
        other, _ = kernel_of(state, shape=shape)
        row(f"kernel {asdict(shape)}", functools.partial(other, state.grads), least)
    halved, _ = kernel_of(state, state.split())
    row("kernel, split masters", lambda: halved(state.grads), least - 2 * count)
    for kind, bytes_ in (("bf16", 8), ("8bit", 12)):
        for masters in ("whole", "split"):
            lower, _ = kernel_of(state, low_moments(state, kind, state.rows() if masters == "whole" else state.split()))
            saved = bytes_ * count + (2 * count if masters == "split" else 0)
            row(f"kernel, {kind} moments, {masters} masters", functools.partial(lower, state.grads), least - saved)
            del lower
    if device == "cuda":
        del halved
        row("ATen fused AdamW alone", aten(state), 28 * count)
        row("today's whole update", today(state), 46 * count)
    return found


def cases(tiny: bool) -> Iterator[tuple[str, list[tuple[int, ...]], bool, bool]]:
    yield "GPT-2, BF16 gradients", gpt2(tiny), False, True
    yield "GPT-2, tied", gpt2(tiny), True, False
    yield "Llama, BF16 gradients", llama(tiny), False, True
    yield "Llama, tied", llama(tiny), True, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="", help="directory for update_kernel.json")
    parser.add_argument("--quick", action="store_true", help="two cases, one shape each, beside FP64")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU by Triton's interpreter")
    args = parser.parse_args()
    device, begin = ("cpu" if args.tiny else "cuda"), time.perf_counter()
    rates = copy_rates(device, args.tiny)
    rate = max(rates.values())
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    say(f"{name}, torch {torch.__version__}: copies at {rate / 1e12:.2f} TB/s ({rates})")
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "copy": rates, "cases": {}}
    chosen = [
        case for case in cases(args.tiny) if not (args.quick and case[2]) and not (args.tiny and "Llama" in case[0])
    ]
    for label, shapes, tied, sweep in chosen:
        result["cases"][label] = measured(label, shapes, device, tied, rate, sweep and not args.tiny and not args.quick)
        result["seconds"] = time.perf_counter() - begin
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            Path(args.out, "update_kernel.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if device == "cuda":
            torch.cuda.empty_cache()
    say(f"{result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
