"""`mpcompile bench`: mpcompile against torch.compile, torch.autocast and both, in alternating rounds."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcompile.errors import UsageError, suggest
from mpcompile.tools import options

if TYPE_CHECKING:
    from mpcompile.tools.bench_run import Result


MODELS = (
    *("gpt2", "bert", "vit", "resnet", "llama", "mlp"),
    *("gpt2-by-hand", "gpt2-by-hand-1x256", "llama-by-hand", "bert-by-hand", "vit-by-hand"),
)
# Those of a CPU and of a GPU; written down, since help must not wait for torch.
CANDIDATES = (
    *("eager FP32", "compile FP32", "eager autocast", "compile+autocast", "pure BF16", "mpcompile", "mpcompile step"),
    *("eager TF32", "compile TF32", "compile+autocast graphs", "expert", "mpcompile step recompute"),
)
PEER, DROP_IN, STEP = "compile+autocast", "mpcompile", "mpcompile step"


def bench(
    models: Annotated[
        str,
        typer.Option(
            help=f"Of {', '.join(MODELS)}; several with commas.",
            autocompletion=options.completed(MODELS, several=True),
        ),
    ] = "gpt2,bert,resnet",
    candidates: Annotated[
        str,
        typer.Option(
            help=f"Only these ways to train, several with commas: {', '.join(CANDIDATES)}; the last five on a GPU alone.",
            autocompletion=options.completed(CANDIDATES, several=True),
        ),
    ] = "",
    device: Annotated[
        str, typer.Option(help="cpu or cuda.", autocompletion=options.completed(("cpu", "cuda")))
    ] = "cpu",
    policy: options.Policy = "auto",
    size: Annotated[str, typer.Option(help="small (a CPU's) or full (GPT-2 124M, BERT-base… for a GPU).")] = "small",
    regime: Annotated[
        str, typer.Option(help="large: one batch a step; micro: the same rows as 8 microbatches.")
    ] = "large",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every candidate is timed once in each.")] = 7,
    check: Annotated[int, typer.Option(min=1, help="Steps after which losses are compared.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="Threads on a CPU: 1 counts CPU time, others wall time.")] = 1,
    max_seconds: Annotated[float, typer.Option(help="Time for one model; what does not fit is left out.")] = 900.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
    json: options.Json = False,
) -> None:
    """Measure step time, memory and loss beside its peers."""
    names = _picked(models, MODELS, "model")
    for word in _split(candidates):
        _one_of(word, CANDIDATES, "candidate")
    _one_of(device, ("cpu", "cuda"), "device")
    _one_of(size, ("small", "full"), "size")
    _one_of(regime, ("large", "micro"), "regime")
    options.place(output)
    from mpcompile import Policy

    Policy.parse(policy)
    from mpcompile.tools.bench_loops import candidates_for

    ways = _picked(candidates, candidates_for(device), "candidate") if candidates else candidates_for(device)
    settings = {"policy": policy, "size": size, "regime": regime, "rounds": rounds, "check": check, "threads": threads}
    found: dict[str, Any] = {"schema": "mpcompile.bench/1", "settings": settings, "models": {}}
    for name in names:
        found["models"][name] = _model(name, ways, device, settings, max_seconds, quiet=json)
        _record(found, device, output)
    if json:
        options.print_json(found)
    elif output:
        typer.echo(f"written: {output}")


def quiet_profiler() -> None:
    """Before torch is imported: its profiler's library, which counts a CPU's bytes, else writes two lines for each count."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def _model(
    name: str, ways: list[str], device: str, settings: dict[str, Any], max_seconds: float, *, quiet: bool
) -> dict[str, Any]:
    from mpcompile import Policy
    from mpcompile.hardware import resolve_policy
    from mpcompile.tools import bench_run
    from mpcompile.tools.bench_loops import Job
    from mpcompile.tools.bench_models import WORKLOADS

    settled = resolve_policy(Policy.parse(settings["policy"]), device)
    workload = WORKLOADS[name](settings["size"] == "full")
    micro = 8 if settings["regime"] == "micro" else 1
    bench_run.fresh()
    with bench_run.threads(settings["threads"] if device == "cpu" else 0):
        job = Job(workload, device, settled, max(1, workload.rows // micro), micro)
        wall = device == "cpu" and settings["threads"] != 1
        plan = bench_run.BenchSettings(settings["rounds"], settings["check"], max_seconds, wall)
        results = bench_run.measure(job, ways, plan, lambda text: typer.echo(f"{name}: {text}", err=True))
    facts = {"rows": job.rows, "microbatches": micro, "unit": workload.unit, "policy": str(settled)}
    if device == "cuda":
        facts["floor_seconds"] = bench_run.floor_seconds(job)
    if not quiet:
        _show(name, facts, results)
    return {**facts, "results": [asdict(one) for one in results]}


def _split(given: str) -> list[str]:
    return [word.strip() for word in given.split(",") if word.strip()]


def _picked(given: str, known: tuple[str, ...] | list[str], what: str) -> list[str]:
    names = _split(given)
    for name in names:
        _one_of(name, known, what)
    return names


def _one_of(word: str, known: tuple[str, ...] | list[str], what: str) -> None:
    if word not in known:
        near = suggest(word, known)
        raise UsageError("MP820", f"there is no {what} {word!r} here",
                         try_=f"did you mean {near}?" if near else ", ".join(known))  # fmt: skip


def _record(found: dict[str, Any], device: str, output: Path | None) -> None:
    """Written after each model: a run that is cut short keeps what it has."""
    import json

    from mpcompile.tools.bench_run import versions

    found["versions"] = versions(device)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _show(name: str, facts: dict[str, Any], results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{name}: {facts['microbatches']} x {facts['rows']} rows a step; {facts['policy']}"
    table = Table(title=title, title_justify="left")
    for column in ("", "ms/step", "x eager", f"x {PEER}", f"{facts['unit']}/s", "saved MB", "FP32 %", "peak MB",
                   "casts", "first s", "ours s", "loss diff", "MFU %"):  # fmt: skip
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for one in results:
        table.add_row(one.candidate, *(["failed"] if one.error else _cells(one)))
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)
    step = next((one for one in results if one.candidate == STEP), None)
    if step is not None and DROP_IN in step.versus:
        typer.echo(f"{STEP}: {step.versus[DROP_IN]:.2f} times as fast as {DROP_IN}")
    for one in results:
        if one.error:
            # Below the table: a message in a column would squeeze the figures out.
            typer.echo(f"{one.candidate}: {one.error.splitlines()[0]}")


def _cells(one: Result) -> list[str]:
    return [
        _number(one.seconds, 1e3, ".1f"),
        _number(one.versus.get("eager FP32"), 1, ".2f"),
        _number(one.versus.get(PEER), 1, ".2f"),
        _number(one.rate, 1, ",.0f"),
        _number(one.saved, 1e-6, ".1f"),
        _number(one.saved_fp32 / one.saved if one.saved and one.saved_fp32 is not None else None, 100, ".1f"),
        _number(one.peak, 1e-6, ".1f"),
        _number(one.casts, 1, ".0f"),
        _number(one.first, 1, ".1f"),
        _number(one.ours, 1, ".2f"),
        _number(one.difference, 1, "+.1e"),
        _number(one.mfu, 100, ".1f"),
    ]


def _number(value: float | None, scale: float, form: str) -> str:
    return "-" if value is None else format(value * scale, form)
