"""`mp.compare(*batch)`: every value and every gradient of the plan beside FP32's, on one batch and one set of masks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import dtype_name, op_name
from mpcompile.compiler import Settings
from mpcompile.errors import TrainingError
from mpcompile.formats import CASTABLE, LOW
from mpcompile.ranges import Call
from mpcompile.report.comparison import Comparison, ErrorRow, mark_noise
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.numerics.lockstep import Lockstep, is_cast, is_move
from mpcompile.training.numerics.measure import Lanes, row
from mpcompile.training.numerics.subject import GIVEN, MODEL, PROJECTION, Differentiable, Subject, phase_of, subject

# The loss scale that training begins with in FP16, and how often it may be halved before the plan counts as broken.
SCALE, HALVINGS = 2.0**16, 24


@dataclass
class Rows:
    """Collects the rows of one run."""

    subject: Subject
    low: str
    found: list[ErrorRow] = field(default_factory=list)
    counts: dict[Any, int] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)

    def __call__(self, node: fx.Node, lanes: Lanes) -> None:
        if node not in self.subject.exits or dtype_name(lanes.full.dtype) not in CASTABLE:
            return
        place, phase = self.subject.places[node.name], phase_of(node)
        planned = self.subject.planned(node)
        if planned is None and is_cast(node):
            stem, op = f"{self._source(node)}→{dtype_name(lanes.plan.dtype)}", "cast"
        else:
            stem, op = (planned.id, planned.op) if planned else (node.name, op_name(node.target))
        op = op if phase == "forward" else op_name(self.subject.exits[node].target)
        module, source = (planned.module, planned.source) if planned else (place.module, place.source)
        name = self._name(stem if phase == "forward" else f"{stem}'")
        self.names[node] = name
        self.found.append(row(name, planned.id if planned else "", op, phase, module, source, lanes, self.low))

    def _source(self, cast: fx.Node) -> str:
        """The name of what a cast reads: a row's, a node's of the plan, or the user's own name."""
        at = cast.all_input_nodes[0]
        while at not in self.names and (is_cast(at) or is_move(at)) and at.all_input_nodes:
            at = at.all_input_nodes[0]
        planned = self.subject.planned(at)
        return self.names.get(at) or (planned.id if planned else str(at.meta.get("mp_name") or at.name))

    def _name(self, stem: str) -> str:
        """ "linear", "linear:2" for a second result; "linear'" for a gradient at it."""
        number = self.counts[stem] = self.counts.get(stem, 0) + 1
        return stem if number == 1 else f"{stem}:{number}"


@dataclass(frozen=True)
class Options:
    """What `mp.compare` may be asked for beside its batch.

    Fields:
      loss_fn: ``loss_fn(model, *args, **kwargs) -> scalar``. Without one the model's own loss is differentiated, or where
        it has none, a projection of its outputs.
      gradients: False compares the forward alone.
      autocast: compare torch.autocast's decisions (``plan="autocast"``) too, on the same batch.
      scale: the loss scale; by default 65536 for FP16, halved while gradients overflow, and 1 for BF16.
    """

    loss_fn: Callable[..., Any] | None = None
    gradients: bool = True
    autocast: bool = False
    scale: float | None = None


def compare(model: Any, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Comparison:
    """One batch: `kwargs` holds its keywords and the fields of `Options`; or `args` is one `Call`, and they are options alone.

    The graph runs op by op, three times over; memory is that of a training step of each run.

    Raises:
      CaptureError: MP101. TrainingError: MP561, MP562.
    """
    args, kwargs, options = _asked(model, args, kwargs)
    if not args and not kwargs:
        raise TrainingError("MP561", "compare() was given no batch", try_="mp.compare(x), as you would call mp(x)")
    if options.scale is not None and not 0 < options.scale < math.inf:
        raise TrainingError("MP561", f"no gradient is left at scale={options.scale}", try_="a positive number")
    batch = Batch(args, kwargs)
    loss = options.loss_fn or Differentiable()
    cpu = torch.get_rng_state()

    def run(settings: Settings) -> Comparison:
        found = subject(model, loss, batch, settings, gradients=options.gradients)
        return replace(_compared(found, options.scale, cpu), loss_is=_loss_is(loss, options.gradients))

    made = run(settings)
    if not options.autocast:
        return made
    policy = replace(settings.policy, plan="autocast", products="low")
    plain = replace(settings, policy=policy, keep_fp32=(), low=(), fp8=(), ranges=None)
    return replace(made, autocast=run(plain))


def _asked(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Options]:
    """The batch's arguments and keywords, and the options."""
    names = {one.name for one in fields(Options)}
    given = {name: value for name, value in kwargs.items() if name in names}
    rest = {name: value for name, value in kwargs.items() if name not in names}
    options = Options(**given)
    if len(args) == 1 and isinstance(args[0], Call):
        if rest:
            raise TrainingError("MP562", f"{sorted(rest)[0]!r} is no option of compare", where="beside a Call",
                                try_="keywords of the batch belong into the Call: Call((x,), {'mask': mask})")  # fmt: skip
        return args[0].args, dict(args[0].kwargs), options
    taken = sorted(name for name in given if name in _keywords(options.loss_fn or model.forward))
    if taken:
        raise TrainingError(
            "MP562", f"{taken[0]!r} is a keyword of the batch and an option of compare",
            try_=f"from mpcompile import Call; mp.compare(Call((x,), {{{taken[0]!r}: ...}}), {taken[0]}=...)",
        )  # fmt: skip
    return args, rest, options


def _keywords(call: Callable[..., Any]) -> set[str]:
    """Names that a batch's keyword may have; ``**kwargs`` names none."""
    try:
        return {one.name for one in inspect.signature(call).parameters.values() if one.kind in _NAMED}
    except (TypeError, ValueError):
        return set()


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _loss_is(loss: Any, gradients: bool) -> str:
    if not gradients:
        return ""
    if not isinstance(loss, Differentiable):
        return GIVEN
    return PROJECTION if loss.is_projection else MODEL


def _compared(found: Subject, scale: float | None, state: Tensor) -> Comparison:
    plan = found.plan
    low = plan.policy.low
    rows = Rows(found, low)
    runner = Lockstep(found.module, found.group, found.rounded, rows)
    notes = list[str]()
    with torch.random.fork_rng(), torch.no_grad():
        torch.set_rng_state(state)
        used = 1.0
        if found.gradients:
            used, notes = scale_of(found, scale, low)
            torch.set_rng_state(state)
        seed = [torch.full((), used, device=found.device())] if found.gradients else []
        outputs = runner.compare([*found.inputs, *seed], [*found.full, *seed])
    if low not in LOW:
        notes.append("the policy settled on FP32 here: there is nothing to compare")
    loss = outputs[found.loss_at]
    if found.gradients and not bool(torch.isfinite(loss.full)):
        notes.append(
            "FP32's own loss is not finite: where its values or gradients are not, there is nothing to compare with"
        )
    values = [one for one in rows.found if one.phase == "forward"]
    backward = mark_noise([one for one in rows.found if one.phase == "backward"], lambda one: one.node)
    return Comparison(
        str(plan.policy), low, plan.row, "", (float(loss.plan), float(loss.full)), used, tuple(values), backward,
        _parameters(found, outputs, low), notes=tuple(notes),
    )  # fmt: skip


def _parameters(found: Subject, outputs: list[Lanes], low: str) -> tuple[ErrorRow, ...]:
    """The gradient of each parameter: the sum of those of its copies."""
    sums = dict[str, Lanes]()
    for place, name in found.gradients:
        lanes = outputs[place]
        if name in sums:
            mine = sums[name]
            lanes = Lanes(*(getattr(mine, k).float() + getattr(lanes, k).float() for k in ("plan", "full", "fed")))
        sums[name] = lanes
    rows = [
        row(name, "", "gradient", "backward", name.rpartition(".")[0], "", lanes, low) for name, lanes in sums.items()
    ]
    return mark_noise(rows, lambda one: one.module)


def scale_of(found: Subject, given: float | None, low: str) -> tuple[float, list[str]]:
    """The loss scale, and a line when it is not the one that training begins with."""
    if given is not None:
        return float(given), []
    if low != "fp16":
        return 1.0, []
    used, device = SCALE, found.device()
    for _ in range(HALVINGS):
        outputs: Any = fx.Interpreter(found.module).run(*found.inputs, torch.full((), used, device=device))
        if all(bool(torch.isfinite(outputs[place]).all()) for place, _ in found.gradients):
            break
        used /= 2
    else:
        return SCALE, [f"gradients are not finite at any loss scale from {SCALE:g} down: the forward overflows"]
    return used, [] if used == SCALE else [
        f"gradients overflow above a loss scale of {used:g}; training begins at {SCALE:g}"
    ]
