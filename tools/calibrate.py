"""`mpcompile calibrate`: the ranges of a model's values and gradients, for an FP16 plan that knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpcompile.errors import UsageError
from mpcompile.tools import options, target


def calibrate(
    model: options.Target,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")] = Path("ranges.json"),
    batches: Annotated[int, typer.Option(help="How many batches: the factory is called for each.")] = 1,
    json: options.Json = False,
) -> None:
    """Measure values and gradients on the factory's batches; give the file to mpcompile(model, "fp16", ranges=FILE)."""
    if target.is_onnx(model):
        raise UsageError("MP802", "calibrate is for models that train", why=f"{model} is an ONNX file",
                         try_=f"mpcompile convert {model} OUT --calibrate data.npz")  # fmt: skip
    if batches < 1:
        raise UsageError("MP811", f"--batches {batches}", try_="--batches 1")
    target.usable(model)
    options.place(out)
    from mpcompile import mpcompile
    from mpcompile.ranges import Call, unfit_gradients

    made = target.load(model)
    given = [made, *target.more_batches(model, made, batches)]
    wrapped = mpcompile(made.model, "fp16")
    found = wrapped.calibrate([Call(one.args, one.kwargs) for one in given])
    found.save(out)
    values = {key: one for key, one in found.values.items() if one.largest > 65504 / 4}
    gradients = unfit_gradients(found.gradients, "fp16")
    if json:
        options.print_json({"written": str(out), "batches": found.batches, "values": len(found.values),
                            "large": {key: one.largest for key, one in values.items()}, "gradients": gradients})  # fmt: skip
        return
    count = f"{found.batches} batch{'es' * (found.batches > 1)}"
    options.say(f"written: {out} ({count}, {len(found.values)} values, {len(found.gradients)} gradients)")
    for key, one in values.items():
        options.say(f"{_named(key)} reaches {one.largest:.4g}; FP16 ends at 65504")
    for key, why in gradients.items():
        options.say(f"{_named(key)}: {why}")
    if not values and not gradients:
        options.say("all of it fits FP16")


def _named(key: str) -> str:
    module, op, number = key.split("|")[:3]
    return f"{module or '(top)'}: {op.removeprefix('aten.').removesuffix('.default')} {int(number) + 1}"
