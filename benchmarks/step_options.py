"""What the options of the training step cost on a CPU: a dynamic loss scale, clipping, split masters.

    python benchmarks/step_options.py [--model gpt2] [--rounds 7] [--output FILE]

One process, one thread, CPU time, rounds alternating; ratios are medians of the rounds' own ratios.  "held" is what
lives between steps: parameters as the model holds them, shadows, low halves, optimizer state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpcompile import LossScale, mpcompile
from mpcompile.tools.bench_models import WORKLOADS
from mpcompile.tools.bench_run import versions
from mpcompile.tools.measure import peak_bytes

OPTIONS: dict[str, dict[str, Any]] = {
    "no scale": {},
    "dynamic scale": {"scale": LossScale.dynamic()},
    "clipping": {"max_grad_norm": 1.0},
    "split masters": {"masters": "split"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt2", choices=sorted(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    workload = WORKLOADS[given.model](False)
    torch.manual_seed(1)
    batch = workload.sample(workload.rows)
    steps = {name: prepared(workload, options) for name, options in OPTIONS.items()}
    found: dict[str, Any] = {name: {"held": held(), "times": []} for name, (_, held) in steps.items()}
    for name, (step, held) in steps.items():
        for _ in range(3):
            step(**batch)
        found[name].update(held=held(), peak=peak_bytes(lambda step=step: step(**batch), "cpu"))  # type: ignore[misc]
    names = list(steps)
    for number in range(given.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            steps[name][0](**batch)
            found[name]["times"].append(time.process_time() - start)
    plain = found["no scale"]["times"]
    print(f"{given.model}: BF16, one thread\n{'':16s} ms/step   time ratio   peak MB   held MB")
    for name, one in found.items():
        one["ratio"] = statistics.median(a / b for a, b in zip(one["times"], plain, strict=True))
        print(f"{name:16s} {1e3 * statistics.median(one['times']):7.1f} {one['ratio']:12.3f} {one['peak'] / 1e6:9.1f} "
              f"{one['held'] / 1e6:9.1f}")  # fmt: skip
    if given.output:
        text = json.dumps({"model": given.model, "options": found, "versions": versions("cpu")}, indent=1)
        given.output.write_text(text + "\n", encoding="utf-8")


def prepared(workload: Any, options: dict[str, Any]) -> tuple[Callable[..., Any], Callable[[], int]]:
    """(the step, bytes that it, its model and its optimizer hold)."""
    torch.manual_seed(0)
    model = workload.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step = mpcompile(model, "bf16").train_step(optimizer, **options)

    def held() -> int:
        tensors = [*model.parameters(), *model.buffers(), *step.context.shadows.shadows]
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        if step.context.split is not None:
            tensors += [low for p in model.parameters() if (low := step.context.split.low_of(p)) is not None]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    return step, held


if __name__ == "__main__":
    main()
