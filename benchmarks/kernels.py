"""Where a step's time goes on a GPU: kernels by name, for each way to train.

python benchmarks/kernels.py --models bert --out kernels.json
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from mpcompile import Policy
from mpcompile.tools import bench_run
from mpcompile.tools.bench_loops import CANDIDATES, Job, Loop
from mpcompile.tools.bench_models import WORKLOADS
from mpcompile.tools.measure import Clock

WARM, STEPS = 6, 5


def profiled(loop: Loop) -> dict[str, Any]:
    """Milliseconds of one step: by the clock, of all kernels, and of each kernel by name."""
    for _ in range(WARM):
        loop.step()
    torch.cuda.synchronize()
    clock = Clock("cuda")

    def several() -> None:
        for _ in range(STEPS):
            loop.step()

    wall = min(clock.seconds(several) for _ in range(5)) / STEPS
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        several()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profile.key_averages():
        spent[event.key][0] += event.self_device_time_total / 1e3 / STEPS
        spent[event.key][1] += event.count / STEPS
    names = sorted((name for name, (time, _) in spent.items() if time), key=lambda name: -spent[name][0])
    return {
        "wall": wall * 1e3,
        "kernels": sum(spent[name][0] for name in names),
        "launches": sum(spent[name][1] for name in names),
        "by_name": {name: [round(value, 4) for value in spent[name]] for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bert")
    parser.add_argument("--candidates", default="compile+autocast,mpcompile,mpcompile step")
    parser.add_argument("--policy", default="bf16")
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--top", type=int, default=18)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    found: dict[str, Any] = {"versions": bench_run.versions("cuda"), "models": {}}
    for model in args.models.split(","):
        workload = WORKLOADS[model](True)
        job = Job(workload, "cuda", Policy.parse(args.policy), workload.rows // args.micro, args.micro)
        rows = found["models"].setdefault(model, {})
        for name in args.candidates.split(","):
            bench_run.fresh()
            row = rows[name] = profiled(CANDIDATES[name](job))
            print(
                f"{model} {name}: {row['wall']:.2f} ms, kernels {row['kernels']:.2f} ms, {row['launches']:.0f} launches"
            )
            for kernel in list(row["by_name"])[: args.top]:
                time, count = row["by_name"][kernel]
                print(f"  {time:8.3f} ms {count:6.0f} x {kernel[:110]}", flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
