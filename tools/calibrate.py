"""`mpcompile calibrate`: the ranges of a model's values and gradients, for an FP16 plan that knows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from mpcompile.errors import UsageError
from mpcompile.tools import options, target

# What comes within four times of FP16's largest number is said.
LARGE = 65504 / 4


def calibrate(
    model: options.Target,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")] = Path("ranges.json"),
    batches: Annotated[int, typer.Option(help="How many batches: the factory is called for each.")] = 1,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="ONNX: sample inputs (.npz); by default generated ones.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure values and gradients on the factory's batches; give the file to mpcompile(model, "fp16", ranges=FILE).

    Of an .onnx file the values, on sample inputs.
    """
    if batches < 1:
        raise UsageError("MP811", f"--batches {batches}", try_="--batches 1")
    onnx = target.is_onnx(model)
    target.refuse_options(model, {"batches": onnx and batches > 1, "samples": not onnx and samples is not None})
    target.usable(model)
    options.place(out)
    if onnx:
        _onnx(model, out, samples, json)
    else:
        _torch(model, out, batches, json)


def _onnx(model: str, out: Path, samples: Path | None, json: bool) -> None:
    from mpcompile.onnx.ranges import measure

    found = measure(model, samples)
    found.save(out)
    large = {name: size for name, one in found.values.items() if (size := max(-one.least, one.most)) > LARGE}
    if json:
        options.print_json({"written": str(out), "on": found.on, "values": len(found.values), "large": large})
        return
    options.say(f"written: {out} ({len(found.values)} values, on {found.on or samples})")
    _say_large(large)
    if not large:
        options.say("all of it fits FP16")


def _say_large(large: Mapping[str, float]) -> None:
    for name, size in large.items():
        options.say(f"{name} reaches {size:.4g}; FP16 ends at 65504")


def _torch(model: str, out: Path, batches: int, json: bool) -> None:
    from mpcompile import mpcompile
    from mpcompile.ranges import Call, unfit_gradients

    made = target.load(model)
    given = [made, *target.more_batches(model, made, batches)]
    wrapped = mpcompile(made.model, "fp16")
    found = wrapped.calibrate([Call(one.args, one.kwargs) for one in given])
    found.save(out)
    large = {key: one.largest for key, one in found.values.items() if one.largest > LARGE}
    gradients = unfit_gradients(found.gradients, "fp16")
    if json:
        options.print_json({"written": str(out), "batches": found.batches, "values": len(found.values),
                            "large": large, "gradients": gradients})  # fmt: skip
        return
    count = f"{found.batches} batch{'es' * (found.batches > 1)}"
    options.say(f"written: {out} ({count}, {len(found.values)} values, {len(found.gradients)} gradients)")
    _say_large({_named(key): size for key, size in large.items()})
    for key, why in gradients.items():
        options.say(f"{_named(key)}: {why}")
    if not large and not gradients:
        options.say("all of it fits FP16")


def _named(key: str) -> str:
    module, op, number = key.split("|")[:3]
    return f"{module or '(top)'}: {op.removeprefix('aten.').removesuffix('.default')} {int(number) + 1}"
