"""From what the user typed to a model that is decided on."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mpcompile.errors import MPCompileError, UsageError, suggest

if TYPE_CHECKING:
    from mpcompile.graph import PrecisionGraph
    from mpcompile.pipeline import StepRecord
    from mpcompile.report.model import Report


@dataclass(frozen=True)
class Factory:
    """What a factory gave."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A model that is decided on: its report, the graph before the passes, and the passes."""

    report: Report
    before: PrecisionGraph
    passes: Sequence[Any]

    def text_after(self, name: str) -> str:
        """The graph's text after pass `name`.

        Raises:
          UsageError: MP805.
        """
        from mpcompile.pipeline import keep_text, run

        names = [one.name for one in self.passes]
        if name not in names:
            raise UsageError("MP805", f"there is no pass {name!r} here", try_=suggest(name, names) or ", ".join(names))
        _, records = run(self.before, self.passes[: names.index(name) + 1], keep_text([name]))
        return records[-1].text

    def changes(self) -> list[tuple[str, str]]:
        """(pass, what it changed in the graph's text as a diff) of each pass that changed something."""
        from difflib import unified_diff

        from mpcompile.pipeline import run
        from mpcompile.text import print_graph

        texts = [("as read", print_graph(self.before).splitlines())]

        def note(graph: PrecisionGraph, record: StepRecord) -> None:
            texts.append((record.name, print_graph(graph).splitlines()))

        run(self.before, self.passes, note)
        return [
            (
                name,
                "\n".join(
                    unified_diff(old, new, f"after {before}" if at else before, f"after {name}", n=1, lineterm="")
                ),
            )
            for at, ((before, old), (name, new)) in enumerate(pairwise(texts))
            if old != new
        ]


def is_onnx(target: str) -> bool:
    return target.endswith(".onnx")


def study(target: str, policy: str, keep_fp32: Sequence[str] | None = (), low: Sequence[str] | None = (),
          ranges: Path | None = None, fp8: Sequence[str] | None = ()) -> Study:  # fmt: skip
    """Read the model that `target` names, and decide on it; `ranges` is a file of `mpcompile calibrate`.

    Raises:
      MPCompileError: MP802 to MP804 for the target, and what the compiler has to say.
    """
    overrides = {"keep_fp32": tuple(keep_fp32 or ()), "low": tuple(low or ()), "fp8": tuple(fp8 or ())}
    given = overrides if ranges is None else {**overrides, "ranges": ranges}
    return _study_onnx(target, policy, given) if is_onnx(target) else _study_fx(target, policy, given)


def _study_fx(target: str, policy: str, overrides: dict[str, Any]) -> Study:
    from mpcompile import mpcompile
    from mpcompile.report.model import build_report

    made = load(target)
    plan = mpcompile(made.model, policy, **overrides).plan(*made.args, **made.kwargs)
    before = plan.capture.graph
    report = build_report(plan.graph, plan.policy, plan.row, steps=plan.steps, before=before, history=plan.history,
                          code=plan.capture.code)  # fmt: skip
    return Study(report, before, plan.passes)


def step_report(target: str, policy: str, keep_fp32: Sequence[str] | None = (), low: Sequence[str] | None = (),
                ranges: Path | None = None, fp8: Sequence[str] | None = ()) -> Report:  # fmt: skip
    """The report of a whole training step of the model with AdamW: forward, backward and update. One step is run, op by op.

    Raises:
      MPCompileError: MP801 for ONNX, MP802 to MP804 for the target, and what `train_step` has to say (a model without a loss).
    """
    from mpcompile import mpcompile

    if is_onnx(target):
        raise UsageError("MP801", f"{target} has a forward alone", try_="--phase forward, or a factory")
    import torch

    made = load(target)
    overrides = {
        "keep_fp32": tuple(keep_fp32 or ()),
        "low": tuple(low or ()),
        "fp8": tuple(fp8 or ()),
        "ranges": ranges,
    }
    mp = mpcompile(made.model, policy, backend="eager", **overrides)
    step = mp.train_step(torch.optim.AdamW(made.model.parameters()))
    step(*made.args, **made.kwargs)
    report: Report = step.report()
    return report


def _study_onnx(target: str, policy: str, overrides: dict[str, Any]) -> Study:
    from mpcompile import mpcompile
    from mpcompile.onnx.plan import passes_for

    made = mpcompile(existing(target), policy, **overrides)
    return Study(made.report(), made.capture.graph, passes_for(made.policy, made.options, made.capture))


def existing(path: str) -> str:
    """`path`, which must be a file.

    Raises:
      UsageError: MP802, with near names of the same directory.
    """
    try:
        if Path(path).is_file():
            return path
        if Path(path).exists():
            raise UsageError("MP802", f"{path!r} is no file")
    except ValueError as error:  # a zero byte
        raise UsageError("MP802", f"{path!r} names no file", why=str(error)) from error
    folder = Path(path).parent
    near = suggest(Path(path).name, [p.name for p in folder.iterdir()]) if folder.is_dir() else ""
    raise UsageError("MP802", f"there is no file {path!r}", try_=f"did you mean {near}?" if near else "")


def load(target: str) -> Factory:
    """Import the factory that `target` names, and call it.

    Raises:
      UsageError: MP802, MP803, MP804.
    """
    given = _call(target, function(target), 0)
    made = _checked(target, given)
    _try_out(target, made)
    return made


def refuse_options(target: str, given: Mapping[str, bool]) -> None:
    """Refuse options that would say nothing of this kind of model.

    Raises:
      UsageError: MP800.
    """
    for name in (name for name, there in given.items() if there):
        other = "models that train" if is_onnx(target) else ".onnx files"
        raise UsageError("MP800", f"--{name} is for {other}", where=target, try_="leave it out")


def function(target: str) -> Any:
    """The function that `target` names.

    Raises:
      UsageError: MP802, MP803.
    """
    place, name = named(target)
    module = _import(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        near = suggest(name, [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")])
        raise UsageError("MP803", f"{place} has no function {name!r}", try_=f"did you mean {near}?" if near else "")
    return factory


def usable(target: str, policy: str = "auto", ranges: Path | None = None) -> None:
    """Refuse now, before anything slow is imported, a target that names nothing, a policy and ranges that cannot be read.

    Raises:
      UsageError: MP802. RuleError: MP201, MP206, MP208.
    """
    existing(target) if is_onnx(target) else named(target)
    readable(target, policy, ranges)


def readable(target: str, policy: str, ranges: Path | None) -> None:
    """Refuse a policy that is none, and a file that holds no ranges of this kind of model.

    Raises:
      RuleError: MP201, MP206, MP208.
    """
    from mpcompile import Policy

    Policy.parse(policy)
    if ranges is None:
        return
    if is_onnx(target):
        from mpcompile.onnx.ranges import OnnxRanges

        OnnxRanges.load(ranges)
    else:
        from mpcompile.ranges import Ranges

        Ranges.load(ranges)


def named(target: str) -> tuple[str, str]:
    """File or module, and function; a file must be there.

    Raises:
      UsageError: MP802.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(
            "MP802", f"{target!r} does not name a model", try_="FILE.py:FACTORY, PACKAGE.MODULE:FACTORY or MODEL.onnx"
        )
    return (existing(place) if place.endswith(".py") else place), name


def _call(target: str, factory: Any, batch: int) -> Any:
    try:
        return factory(batch=batch) if _takes_batch(factory) else factory()
    except Exception as error:
        raise UsageError("MP804", f"{target} failed: {type(error).__name__}: {error}", where=place_of(error)) from error


def _takes_batch(factory: Any) -> bool:
    try:
        return "batch" in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


def more_batches(target: str, first: Factory, count: int) -> Iterator[Factory]:
    """Batches 1, 2, … `count` - 1 of the factory: it is called with that number where it has a parameter `batch`, and
    otherwise again, under another seed.

    Raises:
      UsageError: MP811, when the second batch is the first.
    """
    import torch

    for number in range(1, count):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            made = _checked(target, _call(target, function(target), number))
        if number == 1 and _same((made.args, made.kwargs), (first.args, first.kwargs)):
            raise UsageError("MP811", f"{target} gives the same batch each time",
                             try_="a factory with a parameter: def make(batch=0)")  # fmt: skip
        yield made


def _same(one: Any, other: Any) -> bool:
    import torch

    from mpcompile.torch_internals.tensors import pytree

    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=False)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def _try_out(target: str, made: Factory) -> None:
    """Run the model once: what it refuses itself is no example. Its buffers and torch's random numbers stay as they are.

    Raises:
      UsageError: MP810.
    """
    import torch

    if any(tensor.is_meta for tensor in made.model.state_dict().values()):
        return  # nothing can be run
    buffers = {name: buffer.detach().clone() for name, buffer in made.model.named_buffers()}
    try:
        args, kwargs = copy.deepcopy((made.args, made.kwargs))
        with torch.random.fork_rng(), torch.no_grad():
            made.model(*args, **kwargs)
    except Exception as error:
        raise UsageError("MP810", f"the model of {target} does not take its example: {type(error).__name__}: {error}",
                         where=place_of(error), try_="call the factory and the model in a Python shell") from error  # fmt: skip
    finally:
        with torch.no_grad():
            for name, buffer in made.model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])


def _import(place: str) -> ModuleType:
    try:
        return _import_file(existing(place)) if place.endswith(".py") else importlib.import_module(place)
    except MPCompileError:
        raise
    except BaseException as error:  # a script without a main guard may exit
        raise UsageError(
            "MP803", f"{place} does not import: {type(error).__name__}: {error}", where=place_of(error)
        ) from error
    finally:
        importlib.invalidate_caches()


def _import_file(path: str) -> ModuleType:
    """Import a file as Python would run it: with its own directory first on the path."""
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _checked(target: str, given: Any) -> Factory:
    shape = "(model, args) or (model, args, kwargs)"
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        raise UsageError("MP804", f"{target} returned a {type(given).__name__}", try_=f"return {shape}")
    model, args, kwargs = (*given, {})[:3]
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict) or not hasattr(model, "parameters"):
        kinds = ", ".join(type(part).__name__ for part in given)
        raise UsageError("MP804", f"{target} returned ({kinds})", try_=f"return {shape}: an nn.Module, a tuple, a dict")
    return Factory(model, tuple(args), kwargs)


def place_of(error: BaseException) -> str:
    """The last line of the user's own code in a traceback."""
    trace, place = error.__traceback__, ""
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if "site-packages" not in file and os.sep + "importlib" not in file and file != __file__ and "<" not in file:
            place = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
