"""FP8 on one GPU: what its copies and products take, a Llama's step beside its peers, and whether training converges.

python benchmarks/fp8.py copies
python benchmarks/fp8.py layers
python benchmarks/fp8.py looks
python benchmarks/fp8.py train --models llama-by-hand --rounds 5 --profile --out fp8-llama.json
python benchmarks/fp8.py train --models llama-3b --apart --seconds 280 --out fp8-llama-3b.json
python benchmarks/fp8.py converge --steps 1000 --seconds 290 --out fp8-converge.json

`--tiny` runs each in a minute on a CPU, to see that it runs. `train` and `converge` write their file after each
candidate, and begin none for which the seconds left are fewer than the longest took; what was predicted stands beside.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fp8_training import RECIPES, SHAPES, WAYS, converge, train
from torch import Tensor

from mpcompile import fp8
from mpcompile.devices import pinned
from mpcompile.runtime.fp8_linear import copies_of, copies_of_input, multiply
from mpcompile.runtime.quantise import quantise
from mpcompile.tools import bench_run
from mpcompile.tools.measure import Clock

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


def copies(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
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
        yield found


def _fp8_layer(passes: Sequence[str], x: Tensor, w: Tensor, grad: Tensor) -> None:
    of_x = copies_of(x, "output" in passes, "grad_weight" in passes, "tensorwise")
    of_w = copies_of(w, "output" in passes, "grad_input" in passes, "tensorwise")
    torch.autograd.grad(multiply(x, w, None, of_x, of_w, passes, "tensorwise"), (x, w), grad)


def _low_layer(x: Tensor, w: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(F.linear(x, w), (x, w), grad)


def layers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
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
        yield found


def looks(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What makes an operand, compiled with its copies: the largest number found by the maker, or by a kernel of its own.

    Predicted on an H200: a norm of 8192 x 2048 8 us less, a SwiGLU of 8192 x 8192 32 us less (2 bytes an element).
    """
    found: dict[str, Any] = {}
    rows, width = (64, 128) if args.tiny else (8192, 2048)
    weight = torch.ones(width, device=DEVICE)
    makers: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
        "norm": (lambda x: F.rms_norm(x.float(), (width,), weight).bfloat16(), width),
        "swiglu": (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], 8 * width),
        "swiglu's gradient": (lambda x: torch.cat([x * x.sigmoid(), x + 1], -1), 4 * width),
    }
    for name, (maker, columns) in makers.items():
        x, row = torch.randn(rows, columns, device=DEVICE).bfloat16(), dict[str, float]()
        for way, take in (("apart_us", copies_of), ("fused_us", copies_of_input)):
            call = _one(maker, take)
            with torch.no_grad():
                row[way] = least(call if args.tiny else torch.compile(call), x) * 1e6
        found[name] = row
        print(f"{name:20} " + "  ".join(f"{k} {v:8.2f}" for k, v in row.items()), flush=True)
        yield found


def _one(maker: Callable[[Tensor], Tensor], take: Callable[..., Any]) -> Callable[[Tensor], Any]:
    return lambda x: take(maker(x), True, True, "tensorwise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["copies", "layers", "looks", "train", "converge"])
    parser.add_argument("--tiny", action="store_true", help="small, for a CPU")
    parser.add_argument("--row", default="h200", help="row of devices.toml whose prices are printed beside")
    parser.add_argument("--pin", action="store_true", help="plan for that row")
    parser.add_argument("--models", default="llama-by-hand", help="train: of `mpcompile bench`, or llama-3b")
    parser.add_argument("--profile", action="store_true", help="train: kernels of one step by name, after the rounds")
    parser.add_argument("--ways", default=",".join(list(WAYS)[:4]))
    parser.add_argument(
        "--apart", action="store_true", help="one way after the other, each freed: where memory is short"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="converge: the second is the yardstick")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gpt-124m", help="converge: the model")
    parser.add_argument("--recipes", nargs="+", default=["bf16", "fp8", "torchao"], choices=sorted(RECIPES))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="train, converge: as long in all")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    runs = {"copies": copies, "layers": layers, "looks": looks, "train": train, "converge": converge}
    begun = time.monotonic()
    found: dict[str, Any] = {"versions": bench_run.versions(DEVICE)}
    for result in runs[args.what](args):
        found[args.what] = result
        found["seconds"] = round(time.monotonic() - begun, 1)
        if args.out:
            Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
