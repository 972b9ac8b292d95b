"""FP8 on one GPU: what its copies and products take, a Llama's step beside its peers, and whether training converges.

python benchmarks/fp8.py copies
python benchmarks/fp8.py layers
python benchmarks/fp8.py train --models llama-by-hand --rounds 5 --out fp8-llama.json
python benchmarks/fp8.py converge --steps 1000 --out fp8-converge.json

`--tiny` runs each in a minute on a CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile import Policy, fp8, mpcompile
from mpcompile.devices import pinned
from mpcompile.runtime.fp8_linear import copies_of, multiply
from mpcompile.runtime.quantise import quantise
from mpcompile.tools import bench_run
from mpcompile.tools.bench_by_hand import GPT2
from mpcompile.tools.bench_loops import CANDIDATES, Job, Loop, Plain, compiled
from mpcompile.tools.bench_models import WORKLOADS
from mpcompile.tools.measure import Clock, peak_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (rows, inner, outer) of a linear layer.
LAYERS = {
    "gpt2 proj": (16384, 768, 768),
    "gpt2 up": (16384, 768, 3072),
    "gpt2 down": (16384, 3072, 768),
    "llama1b kv": (8192, 2048, 512),
    "llama1b qkv": (8192, 2048, 3072),
    "llama1b out": (8192, 2048, 2048),
    "llama1b up": (8192, 2048, 8192),
    "llama1b gate+up": (8192, 2048, 16384),
    "llama1b down": (8192, 8192, 2048),
    "llama8b qkv": (8192, 4096, 6144),
    "llama8b up": (8192, 4096, 14336),
    "llama8b down": (8192, 14336, 4096),
}
TINY = {"tiny": (64, 128, 256)}


def least(call: Callable[..., Any], *given: Any, times: int = 20) -> float:
    """Seconds of one of `times` calls in a row, the least of five such rows; on a GPU replayed, so no launch is waited for."""
    clock = Clock(DEVICE)

    def several() -> None:
        for _ in range(times):
            call(*given)

    run: Callable[[], Any] = several
    if DEVICE == "cuda":
        stream: Any = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call(*given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            several()
        run = graph.replay
    run()
    return min(clock.seconds(run) for _ in range(5)) / times


def copies(args: argparse.Namespace) -> dict[str, Any]:
    """The rate at which copies are made, beside that of a plain copy of as many bytes."""
    found: dict[str, Any] = {}
    shapes = [(8192, 2048), (8192, 8192), (8192, 16384), (16384, 768), (16384, 3072)]
    for rows, columns in [(64, 128)] if args.tiny else shapes:
        x = torch.randn(rows, columns, device=DEVICE).bfloat16()
        row: dict[str, float] = {"copy_tb_s": 4 * x.numel() / least(torch.empty_like(x).copy_, x) / 1e12}
        for name, lies, turned in (("lies", True, False), ("turned", False, True), ("both", True, True)):
            seconds = least(quantise, x, "float8_e4m3fn", lies, turned)
            row[f"{name}_us"] = seconds * 1e6
            row[f"{name}_tb_s"] = (4 + lies + turned) * x.numel() / seconds / 1e12
        found[f"{rows}x{columns}"] = row
        print(f"{rows:6} x {columns:6}  " + "  ".join(f"{k} {v:8.2f}" for k, v in row.items()), flush=True)
    return found


def _fp8_layer(passes: Sequence[str], x: Tensor, w: Tensor, grad: Tensor) -> None:
    of_x = copies_of(x, "output" in passes, "grad_weight" in passes, "tensorwise")
    of_w = copies_of(w, "output" in passes, "grad_input" in passes, "tensorwise")
    torch.autograd.grad(multiply(x, w, None, of_x, of_w, passes, "tensorwise"), (x, w), grad)


def _low_layer(x: Tensor, w: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(F.linear(x, w), (x, w), grad)


def layers(args: argparse.Namespace) -> dict[str, Any]:
    """A linear layer's three products in BF16 and in FP8 with all copies, measured and as the plan's prices have them."""
    found: dict[str, Any] = {}
    row = pinned(args.row)
    for name, (rows, inner, outer) in (TINY if args.tiny else LAYERS).items():
        x = torch.randn(rows, inner, device=DEVICE).bfloat16().requires_grad_()
        w = torch.randn(outer, inner, device=DEVICE).bfloat16().requires_grad_()
        grad = torch.randn(rows, outer, device=DEVICE).bfloat16()
        low, fast = least(_low_layer, x, w, grad), least(_fp8_layer, fp8.PASSES, x, w, grad)
        work = 2.0 * rows * inner * outer
        elements = x.numel() + w.numel() + grad.numel()
        copying = 6 * elements / (row.quantise or row.bandwidth) + 3 * fp8.KERNELS * row.launch
        found[name] = {
            "bf16_us": low * 1e6,
            "fp8_us": fast * 1e6,
            "ratio": low / fast,
            "predicted_bf16_us": 3e6 * work / row.bf16,
            "predicted_fp8_us": 1e6 * (3 * work / row.fp8["tensorwise"] + copying),
        }
        for step in fp8.PASSES:
            found[name][f"{step}_us"] = least(_fp8_layer, (step,), x, w, grad) * 1e6
        print(f"{name:16} " + "  ".join(f"{k} {v:9.2f}" for k, v in found[name].items()), flush=True)
    return found


def _torchao(job: Job) -> Loop:
    """torchao's tensorwise recipe on the blocks, compiled, under autocast. Raises ImportError where it is not there."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = job.model()
    names = {id(module): name for name, module in model.named_modules()}

    def chosen(module: nn.Module, name: str) -> bool:
        return "blocks." in (name or names.get(id(module), "")) and isinstance(module, nn.Linear)

    convert_to_float8_training(model, module_filter_fn=chosen, config=Float8LinearConfig.from_recipe_name("tensorwise"))
    return Plain(job, model, compiled(model), autocast="bf16")


WAYS: dict[str, tuple[str, Callable[[Job], Loop]]] = {
    "compile+autocast": ("bf16", CANDIDATES["compile+autocast"]),
    "mpcompile bf16": ("bf16", CANDIDATES["mpcompile"]),
    "mpcompile fp8": ("fp8", CANDIDATES["mpcompile"]),
    "step bf16": ("bf16", CANDIDATES["mpcompile step"]),
    "step fp8": ("fp8", CANDIDATES["mpcompile step"]),
    "torchao": ("bf16", _torchao),
}


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak bytes of a step, the ways in turn in each round."""
    found: dict[str, Any] = {}
    for model in args.models.split(","):
        workload = WORKLOADS[model](not args.tiny)
        loops: dict[str, Loop] = {}
        rows: dict[str, dict[str, Any]] = {}
        for name in args.ways.split(","):
            policy, make = WAYS[name]
            job = Job(
                workload, DEVICE, Policy.parse(policy + (f",device={args.row}" if args.pin else "")), workload.rows, 1
            )
            try:
                loops[name] = make(job)
            except ImportError as error:
                print(f"{model} {name}: not here ({error})", flush=True)
                continue
            losses = [loops[name].step().item() for _ in range(4)]
            peak = peak_bytes(loops[name].step, DEVICE)
            rows[name] = {"losses": losses, "peak": peak, "seconds": []}
            print(f"{model} {name}: losses {losses}, peak {peak / 2**30:.2f} GiB", flush=True)
            if args.apart:
                _time(loops[name], rows[name], args.rounds)
                loops.pop(name)
                bench_run.fresh()
        for _ in range(0 if args.apart else args.rounds):
            for name, loop in loops.items():
                _time(loop, rows[name], 1)
        base = rows.get("compile+autocast")
        for name, row in rows.items():
            row["median"] = statistics.median(row["seconds"])
            ratio = base["median"] / row["median"] if base else float("nan")
            less = row["peak"] / base["peak"] if base and base["peak"] else float("nan")
            print(
                f"{model:16} {name:18} {row['median'] * 1e3:9.2f} ms  {ratio:6.3f} times  peak {less:5.2f}", flush=True
            )
        found[model] = rows
        loops.clear()
        bench_run.fresh()
    return found


def _time(loop: Loop, row: dict[str, Any], rounds: int) -> None:
    clock, steps = Clock(DEVICE), 10 if DEVICE == "cuda" else 1

    def several() -> None:
        for _ in range(steps):
            loop.step()

    row["seconds"] += [clock.seconds(several) / steps for _ in range(rounds)]


def text(limit: int) -> Tensor:
    """The source of Python's standard library, as bytes: real text that every machine has. int64 [at most `limit`]."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if "site-packages" not in path.parts and "test" not in path.parts
    )
    data = bytearray()
    for path in files:
        data += path.read_bytes()
        if len(data) >= limit:
            break
    return torch.frombuffer(data[:limit], dtype=torch.uint8).long()


def converge(args: argparse.Namespace) -> dict[str, Any]:
    """Losses of a GPT of 124M parameters' size on bytes: BF16, FP8 forced in every block but the ends, from equal seeds."""
    shape = (256, 64, 64, 4, 4) if args.tiny else (256, 1024, 768, 12, 12)
    rows, steps = (2, 3) if args.tiny else (16, args.steps)
    data = text(1 << 16 if args.tiny else 1 << 24)
    train_part, held = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    time, layers_ = shape[1], shape[4]
    inner = [f"blocks.{i}" for i in range(1, layers_ - 1)]
    found: dict[str, Any] = {}
    for seed in args.seeds:
        for name, asked in (("bf16", []), ("fp8", inner), ("fp8 rowwise", inner))[: 2 + args.rowwise]:
            torch.manual_seed(seed)
            model = GPT2(*shape).to(DEVICE)
            optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
            policy = replace(Policy("bf16"), fp8="rowwise") if "rowwise" in name else Policy("bf16")
            mp = mpcompile(model, policy, fp8=asked, backend="eager" if args.tiny else "inductor")
            step = mp.train_step(optimizer, max_grad_norm=1.0)
            draw = torch.Generator().manual_seed(seed)
            losses = []
            for number in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = 6e-4 * min(1.0, (number + 1) / 100)
                losses.append(step(**_batch(train_part, rows, time, draw)).loss)
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
                draw = torch.Generator().manual_seed(1234)
                ends = [model(**_batch(held, rows, time, draw)).item() for _ in range(2 if args.tiny else 20)]
            curve = torch.stack(losses).tolist()
            found[f"{name} seed {seed}"] = {"losses": curve, "held": statistics.fmean(ends)}
            tail = statistics.fmean(curve[-50:])
            print(
                f"{name:12} seed {seed}: last 50 losses {tail:.4f}, held-out {statistics.fmean(ends):.4f}", flush=True
            )
            del step, model, mp, optimizer
            bench_run.fresh()
    return found


def _batch(data: Tensor, rows: int, time: int, draw: torch.Generator) -> dict[str, Tensor]:
    starts = torch.randint(0, len(data) - time - 1, (rows,), generator=draw)
    cut = torch.stack([data[at : at + time + 1] for at in starts.tolist()]).to(DEVICE)
    return {"input_ids": cut[:, :-1].contiguous(), "labels": cut[:, 1:].contiguous()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["copies", "layers", "train", "converge"])
    parser.add_argument("--tiny", action="store_true", help="small, for a CPU")
    parser.add_argument("--row", default="h200", help="row of devices.toml whose prices are printed beside")
    parser.add_argument("--pin", action="store_true", help="plan for that row")
    parser.add_argument("--models", default="llama-by-hand")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument(
        "--apart", action="store_true", help="one way after the other, each freed: where memory is short"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rowwise", action="store_true", help="converge: that recipe too")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    runs = {"copies": copies, "layers": layers, "train": train, "converge": converge}
    found = {"versions": bench_run.versions(DEVICE), args.what: runs[args.what](args)}
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
