"""`mpcompile bisect`: the smallest set of modules, then of nodes, to keep in FP32 so that a check passes."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcompile.errors import UsageError
from mpcompile.tools import options, target

if TYPE_CHECKING:
    from mpcompile.bisection import Search, Trial
    from mpcompile.condition import Condition
    from mpcompile.tools.bisect_subjects import Subject

SCHEMA = "mpcompile.bisect/1"
CHECK = (
    "'loss < 0.01', 'gradient < 0.05 and finite', or FILE.py:FUNCTION, which gets the compiled model and returns true when "
    "all is well."
)


def bisect(
    model: options.Target,
    check: Annotated[str, typer.Option("--check", help=CHECK, show_default=False)],
    policy: options.Policy = "auto",
    keep_fp32: options.KeepFp32 = None,
    low: options.Low = None,
    fp8: options.Fp8 = None,
    ranges: options.Ranges = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each trial there; go on from what it holds already.")
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="ONNX: sample inputs (.npz); by default generated ones.")] = None,
    json: options.Json = False,
) -> None:
    """Find the smallest set to keep in FP32 so that a check passes. Exit code 1 when FP32 itself does not pass."""
    onnx = target.is_onnx(model)
    condition = _condition(check, onnx)
    target.usable(model, policy, ranges)
    target.refuse_options(model, {"fp8": onnx and bool(fp8)})
    options.place(log)
    from mpcompile.tools import bisect_subjects

    overrides = {
        "keep_fp32": tuple(keep_fp32 or ()),
        "low": tuple(low or ()),
        "fp8": tuple(fp8 or ()),
        "ranges": ranges,
    }
    kind: Any = bisect_subjects.OfOnnx if onnx else bisect_subjects.OfTorch
    subject: Subject = kind(model, "fp16" if onnx and policy == "auto" else policy, overrides, samples)
    units = subject.candidates()
    judge = _judge(subject, condition, check)
    trials = _Log(log, {"target": model, "policy": subject.policy, "check": check, "units": _digest(units)})
    from mpcompile.bisection import Search

    search = Search(units, judge, dict(trials.found), _said(trials, units, quiet=json))
    found = search.run()
    kept = search.named(found) if found else []
    if json:
        options.print_json(_facts(search, found, kept, model, subject.policy, check))
    else:
        _say(search, found, kept, check)
    if found is None:
        raise typer.Exit(1)


def _condition(check: str, onnx: bool) -> Condition | None:
    """The check in words; None where it names a function."""
    if ".py:" in check or (":" in check and " " not in check.strip()):
        target.named(check)
        return None
    from mpcompile.condition import Condition

    return Condition.parse(check, ("output", "finite") if onnx else ("loss", "gradient", "finite"))


def _judge(subject: Subject, condition: Condition | None, check: str) -> Callable[..., Any]:
    if condition is None:
        function = target.function(check)
        return lambda nodes: (bool(subject.call(function, nodes, check)), {})

    def judge(nodes: frozenset[str]) -> tuple[bool, Mapping[str, float]]:
        measured = subject.measure(nodes)
        return condition.holds(measured), measured

    return judge


class _Log:
    """The trials in a file, one JSON object a line, after one that says what is searched."""

    def __init__(self, path: Path | None, about: Mapping[str, str]) -> None:
        self.path, self.about = path, {"schema": SCHEMA, **about}
        self.found: dict[frozenset[str], Trial] = {}
        if path is None or not path.exists() or not path.stat().st_size:
            self._write(self.about)
            return
        try:
            first, *lines = [jsonlib.loads(line) for line in _whole_lines(path)]
            if first != self.about:
                raise UsageError("MP813", f"{path} is the log of another search", why=_differs(first, self.about),
                                 try_="another --log, or delete it")  # fmt: skip
            from mpcompile.bisection import Trial

            trials = [Trial(tuple(one["kept"]), one["passed"], one["measured"], one["seconds"]) for one in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError("MP813", f"{path} is no log of a search", why=str(error)) from error
        self.found = {frozenset(trial.kept): trial for trial in trials}

    def add(self, trial: Trial) -> None:
        one = {"kept": trial.kept, "passed": trial.passed, "measured": dict(trial.measured), "seconds": trial.seconds}
        self._write(one)

    def _write(self, one: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(jsonlib.dumps(one) + "\n")


def _whole_lines(path: Path) -> list[str]:
    """Without a last line that was cut off."""
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return text.splitlines()


def _differs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} was {found.get(key)!r}" for key, value in wanted.items() if found.get(key) != value)


def _digest(units: Mapping[str, Any]) -> str:
    import hashlib

    return hashlib.sha256(jsonlib.dumps(dict(units), sort_keys=True).encode()).hexdigest()[:16]


def _said(log: _Log, units: Mapping[str, Any], *, quiet: bool) -> Callable[[Trial], None]:
    count, whole = 0, sum(map(len, units.values()))

    def say(trial: Trial) -> None:
        nonlocal count
        count += 1
        log.add(trial)
        measured = ", ".join(f"{name} {value:.3g}" for name, value in trial.measured.items())
        line = f"{count:3}: {len(trial.kept)} of {whole} nodes in FP32: {'passes' if trial.passed else 'fails'}"
        if not quiet:
            options.say(f"{line} ({measured})" if measured else line)

    return say


def _say(search: Search, found: list[str] | None, kept: list[str], check: str) -> None:
    trials = f"{len(search.trials)} trial{'s' * (len(search.trials) > 1)}"
    if found is None:
        options.say(f"not even FP32 everywhere passes {check!r} ({trials}): the check asks for more than FP32 gives")
    elif not found:
        options.say(f"the plan passes {check!r} as it is ({trials})")
    else:
        options.say(f"{trials}; {len(found)} of {sum(map(len, search.units.values()))} nodes are needed:")
        options.say(f"keep_fp32={jsonlib.dumps(kept, ensure_ascii=False)}")


def _facts(
    search: Search, found: list[str] | None, kept: list[str], model: str, policy: str, check: str
) -> dict[str, Any]:
    return {
        "schema": SCHEMA, "target": model, "policy": policy, "check": check, "passes": found is not None,
        "nodes": found or [], "keep_fp32": kept,
        "trials": [{"kept": list(one.kept), "passed": one.passed, "measured": {k: str(v) if v != v or abs(v) == float("inf")
                    else v for k, v in one.measured.items()}, "seconds": one.seconds} for one in search.trials.values()],
    }  # fmt: skip
