"""`mpcompile demo`: train a byte-level GPT on the standard library's text, FP32 against mpcompile.

Both sides are compiled by torch.compile (Inductor), start from the same weights, see the same batches in the same
order and use the same fused AdamW. Their steps alternate, so that a busy machine slows both. A third run, FP32 from
another seed, says how much the loss moves for no reason at all: mpcompile has to stay within that.

Where the policy "auto" stays FP32 there would be nothing to see: a smaller model is trained in BF16 then, for its
losses and bytes, not for its speed.
"""

from __future__ import annotations

import json as jsonlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcompile.tools import options

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from mpcompile import Policy

# The rate rises over WARM steps: without that, a spike of the loss in one run and not in the other decides the comparison.
BATCH, LR, WARM = 8, 6e-4, 20


@dataclass(frozen=True)
class Size:
    """What is trained: the model's width, blocks, heads and context (bytes), and for how many steps."""

    width: int
    layers: int
    heads: int
    context: int
    steps: int


FULL = Size(width=256, layers=4, heads=4, context=256, steps=120)
# Without BF16 in hardware a product takes some ten times FP32's time: a 25th of the work, two minutes in all.
SMALL = Size(width=128, layers=2, heads=4, context=128, steps=60)


@dataclass
class Run:
    """One training run: its losses, in nats per byte, and the seconds of each step (the first compiles)."""

    name: str
    step: Callable[[Tensor], float] = field(repr=False)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def take(self, batch: Tensor) -> None:
        start = time.perf_counter()
        self.losses.append(self.step(batch))
        self.seconds.append(time.perf_counter() - start)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[3:] or self.seconds)


@dataclass(frozen=True)
class Outcome:
    """What the demo found. Bytes are of one step; `distance` and `noise` are RMS differences of smoothed losses.

    `slow`: low products are slower than FP32's here, so the seconds say nothing about where they are not.
    """

    policy: str
    steps: int
    loss_fp32: float
    loss_mp: float
    distance: float
    noise: float
    agree: bool
    seconds_fp32: float
    seconds_mp: float
    speedup: float
    saved_fp32: int
    saved_mp: int
    casts: int
    shadows: int
    compile_seconds: float
    slow: bool = False
    picture: str = ""


def demo(
    steps: Annotated[
        int | None,
        typer.Option(min=8, help="Training steps of each run: 120, or 60 of a smaller model where BF16 is slow."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the picture and the losses go.")] = Path("demo-out"),
    policy: options.Policy = "auto",
    json: options.Json = False,
) -> None:
    """Train a byte-level GPT in FP32 and with mpcompile. Exit code 1 when the losses disagree."""
    from mpcompile import Policy

    Policy.parse(policy)
    if not out.is_dir():
        options.place(out)
        out.mkdir()
    outcome = _run(steps, seed, policy, out)
    options.print_json(asdict(outcome)) if json else _show(outcome)
    if not outcome.agree:
        raise typer.Exit(1)


def _run(steps: int | None, seed: int, policy: str, out: Path) -> Outcome:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from mpcompile import mpcompile
    from mpcompile.tools.corpus import stdlib_bytes
    from mpcompile.tools.measure import saved_for_backward

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shown, slow = _shown(policy, device)
    size = SMALL if slow else FULL
    steps = steps or size.steps
    text = stdlib_bytes().to(device)
    model, mixed, other = (_seeded(size, one).to(device) for one in (seed, seed, seed + 1))
    mp, single = mpcompile(mixed, shown), torch.compile(model)
    runs = [Run("FP32", _step(single, model)), Run("mpcompile", _step(mp, mixed))]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        _train(progress, "FP32 and mpcompile (the first step compiles)", runs, _data(text, size, seed), steps)
        # The weights of another seed in the model that is compiled already.
        model.load_state_dict(other.state_dict())
        runs.append(Run("FP32, another seed", _step(single, model)))
        _train(progress, runs[2].name, runs[2:], _data(text, size, seed), steps)
    batch = next(_data(text, size, seed))
    saved = [saved_for_backward(partial(call, batch)).total for call in (single, mp)]
    return _outcome(runs, saved, mp, _draw(runs, out), slow)


def _shown(policy: str, device: str) -> tuple[Policy, bool]:
    """The policy to show, and whether low products are slow here: BF16 where "auto" would stay FP32."""
    from mpcompile import Policy
    from mpcompile.hardware import auto_low

    parsed, slow = Policy.parse(policy), auto_low(device) == "fp32"
    return parsed.with_low("bf16") if slow and parsed.low == "auto" else parsed, slow


def _seeded(size: Size, seed: int) -> Any:
    import torch

    from mpcompile.tools.gpt import ByteGPT

    torch.manual_seed(seed)
    return ByteGPT(size.width, size.layers, size.heads, size.context)


def _data(text: Tensor, size: Size, seed: int) -> Iterator[Tensor]:
    from mpcompile.tools.corpus import batches

    return batches(text, BATCH, size.context + 1, seed)


def _step(call: Callable[[Tensor], Tensor], model: Any) -> Callable[[Tensor], float]:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: min(1.0, (number + 1) / WARM))

    def step(batch: Tensor) -> float:
        loss = call(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _train(progress: Progress, title: str, runs: Sequence[Run], data: Iterator[Tensor], steps: int) -> None:
    task = progress.add_task(title, total=steps)
    for _ in range(steps):
        batch = next(data)
        for run in runs:
            run.take(batch)
        losses = ", ".join(f"{run.losses[-1]:.3f}" for run in runs)
        progress.update(task, advance=1, description=f"{title.partition(' (')[0]}: loss {losses}")


def _outcome(runs: Sequence[Run], saved: Sequence[int], mp: Any, picture: str, slow: bool) -> Outcome:
    single, mixed, other = runs
    distance, noise = _distance(single.losses, mixed.losses), _distance(single.losses, other.losses)
    report = mp.report()
    casts = report.casts
    return Outcome(
        policy=report.policy,
        steps=len(single.losses),
        loss_fp32=_final(single.losses),
        loss_mp=_final(mixed.losses),
        distance=distance,
        noise=noise,
        agree=distance <= noise,
        seconds_fp32=single.median,
        seconds_mp=mixed.median,
        speedup=single.median / mixed.median,
        saved_fp32=saved[0],
        saved_mp=saved[1],
        casts=sum(cast.origin == "inserted" for cast in casts),
        shadows=sum(cast.origin == "shadow" for cast in casts),
        compile_seconds=mixed.seconds[0],
        slow=slow,
        picture=picture,
    )


def _final(losses: Sequence[float]) -> float:
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Root mean square difference of two curves over their last half, each smoothed over up to ten steps."""
    window = max(1, min(10, len(a) // 8))
    smooth = [[statistics.fmean(one[max(0, i - window + 1) : i + 1]) for i in range(len(one))] for one in (a, b)]
    half = len(a) // 2
    return math.dist(smooth[0][half:], smooth[1][half:]) / math.sqrt(len(a) - half)


def _draw(runs: Sequence[Run], out: Path) -> str:
    """Write the losses as JSON and, with matplotlib, as a picture; returns the picture's path."""
    losses = {run.name: run.losses for run in runs}
    (out / "losses.json").write_text(jsonlib.dumps(losses), encoding="utf-8")
    try:
        import matplotlib as mpl
    except ImportError:
        return ""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for run, style in zip(runs, ("-", "--", ":"), strict=True):
        axes.plot(run.losses, style, label=run.name, linewidth=1.5)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="ByteGPT on Python's standard library")
    axes.legend()
    picture = (out / "losses.png").resolve()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return str(picture)


def _show(found: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "FP32", "mpcompile", "ratio", title=f"{found.steps} steps, both compiled")
    table.add_row("loss (last tenth)", f"{found.loss_fp32:.4f}", f"{found.loss_mp:.4f}", "")
    if not found.slow:
        rates = 1 / found.seconds_fp32, 1 / found.seconds_mp
        table.add_row("steps per second (median)", f"{rates[0]:.2f}", f"{rates[1]:.2f}", f"{found.speedup:.2f} times")
    sizes = found.saved_fp32 / 1e6, found.saved_mp / 1e6
    table.add_row("MB kept for the backward", f"{sizes[0]:.1f}", f"{sizes[1]:.1f}", f"{sizes[1] / sizes[0]:.2f}")
    table.add_row("casts per forward", "0", str(found.casts), "")
    table.add_row("weight casts per step", "0", str(found.shadows), "")
    Console().print(table)
    typer.echo(f"policy: {found.policy}")
    if found.slow:
        typer.echo("no BF16 in this processor (mpcompile doctor): see the losses and the bytes; the speed is not shown")
    elif found.speedup < 1:
        typer.echo(
            "low-precision products are slow on this processor (mpcompile doctor): memory is saved here, not time"
        )
    verdict = "agree" if found.agree else "DISAGREE"
    typer.echo(f"the losses {verdict}: they differ by {found.distance:.4f}; another seed differs by {found.noise:.4f}")
    typer.echo(f"picture: {found.picture}" if found.picture else "no picture: pip install 'mpcompile[demo]'")
