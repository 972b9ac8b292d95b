"""A plan's numbers beside FP32's, as data: one row per value and gradient, worst first. Views are in `comparison_table`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA = "mpcompile.comparison/1"
NOISE = 2.0**-20


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One value, or one gradient, of the plan beside the same of the FP32 run.

    Errors are of the whole tensor: the norm of the difference over the norm of FP32's value.

    Fields:
      id: the value's name: that of the plan's node, or a parameter's for its gradient.
      node: the node of the plan that makes it, or whose gradient it belongs to ("" for none).
      op, phase: "aten.mm.default", "forward" or "backward".
      dtype: in which the plan holds it.
      error: what the plan's value is off by.
      own: what it would be off by if the node had read FP32's values, rounded as the plan rounds them.
      inherited: the rest: what it is off by because of what it read.
      underflow, overflow: elements that `dtype` rounds to zero, and that are finite in FP32 and not in the plan.
      elements: how many there are.
      largest: the largest absolute FP32 value.
      headroom: how often `largest` may double before the low type overflows, in bits (negative: it does).
      noise: FP32's own value is what is left where its terms cancel; its error says nothing.
    """

    id: str
    node: str
    op: str
    phase: str
    module: str
    source: str
    dtype: str
    error: float
    own: float
    inherited: float
    underflow: int
    overflow: int
    elements: int
    largest: float
    headroom: float
    noise: bool = False

    def joined(self, other: ErrorRow) -> ErrorRow:
        """The worse of two batches; counts add up."""
        worse = other if other.error > self.error else self
        return replace(
            worse,
            own=max(self.own, other.own),
            underflow=self.underflow + other.underflow,
            overflow=self.overflow + other.overflow,
            elements=self.elements + other.elements,
            largest=max(self.largest, other.largest),
            headroom=min(self.headroom, other.headroom),
            noise=self.noise and other.noise,
        )

    def to_dict(self) -> dict[str, Any]:
        return {name: _finite(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class ModuleErrors:
    """The rows of one module in short: how many, the largest error of its own, and the value that has it."""

    module: str
    rows: int
    own: float
    error: float
    worst: str
    underflow: int
    overflow: int


@dataclass(frozen=True)
class Comparison:
    """What `mp.compare(*batch)` gives.

    Fields:
      policy: the policy's one line; `low` its low type.
      device: what the plan was priced for.
      loss_is: what was differentiated: "the model's loss", "loss_fn", "a projection of the outputs", or "" (values alone).
      loss: (the plan's, FP32's) of the first batch; empty where values alone were compared.
      scale: the loss scale that gradients carry.
      values, gradients: forward values and gradients of values; `parameters`: the gradient of each parameter.
      batches: how many were run.
      autocast: the same for ``plan="autocast"``, where it was asked for.
      notes: lines for the user.
    """

    policy: str
    low: str
    device: str
    loss_is: str
    loss: tuple[float, ...]
    scale: float
    values: tuple[ErrorRow, ...]
    gradients: tuple[ErrorRow, ...] = ()
    parameters: tuple[ErrorRow, ...] = ()
    batches: int = 1
    autocast: Comparison | None = None
    notes: tuple[str, ...] = ()
    source: str = "fx"

    @property
    def rows(self) -> tuple[ErrorRow, ...]:
        """All rows, the one with the largest error of its own first."""
        return tuple(worst_first((*self.values, *self.gradients, *self.parameters)))

    def row(self, name: str) -> ErrorRow:
        """The row of that id (a value's, or a parameter's for its gradient).

        Raises:
          KeyError: there is none.
        """
        for one in (*self.values, *self.parameters, *self.gradients):
            if one.id == name:
                return one
        raise KeyError(name)

    @property
    def finite(self) -> bool:
        """False when something overflowed in the plan that is finite in FP32."""
        return not any(row.overflow for row in self.rows)

    def by_module(self) -> tuple[ModuleErrors, ...]:
        """Modules, the one with the largest error of its own first."""
        found: dict[str, list[ErrorRow]] = {}
        for row in (*self.values, *self.gradients):
            found.setdefault(row.module, []).append(row)
        made = [_module(name, rows) for name, rows in found.items()]
        return tuple(sorted(made, key=lambda one: (-one.overflow, -one.own, -one.error)))

    def worst_output_error(self) -> float:
        """The largest error of the loss and of the parameters' gradients; of the values where there are none."""
        loss = [_relative(*self.loss)] if self.loss else []
        return max([*loss, *(row.error for row in self.parameters or self.values if not row.noise)], default=0.0)

    def joined(self, other: Comparison) -> Comparison:
        """This and another batch's, as one."""
        return replace(
            self,
            values=_joined(self.values, other.values),
            gradients=_joined(self.gradients, other.gradients),
            parameters=_joined(self.parameters, other.parameters),
            scale=min(self.scale, other.scale),
            batches=self.batches + other.batches,
            autocast=self.autocast.joined(other.autocast) if self.autocast and other.autocast else None,
            notes=tuple(dict.fromkeys((*self.notes, *other.notes))),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the schema ``mpcompile.comparison/1``; what is not finite is a word ("inf", "nan")."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "policy": self.policy,
            "device": self.device,
            "batches": self.batches,
            "loss_is": self.loss_is,
            "loss": [_finite(one) for one in self.loss],
            "scale": self.scale,
            "values": [row.to_dict() for row in worst_first(self.values)],
            "gradients": [row.to_dict() for row in worst_first(self.gradients)],
            "parameters": [row.to_dict() for row in worst_first(self.parameters)],
            "modules": [{k: _finite(v) for k, v in asdict(one).items()} for one in self.by_module()],
            "autocast": self.autocast.to_dict() if self.autocast else None,
            "notes": list(self.notes),
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def worst_first(self, *parts: str) -> list[ErrorRow]:
        """The rows of `parts` ("values", "gradients", "parameters"): overflows first, then by their own error; noise last."""
        return worst_first(row for part in parts for row in getattr(self, part))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the comparison as one page that needs no network."""
        from mpcompile.report.comparison_page import comparison_page

        Path(path).write_text(comparison_page(self), encoding="utf-8", errors="backslashreplace")

    def _repr_html_(self) -> str:
        """For notebooks: the worst modules and rows."""
        from mpcompile.report.comparison_page import comparison_cell

        return comparison_cell(self)

    def __rich__(self) -> Group:
        from mpcompile.report.comparison_table import comparison_table

        return comparison_table(self)

    def __str__(self) -> str:
        from mpcompile.report.comparison_table import as_text

        return as_text(self)


def worst_first(rows: Iterable[ErrorRow]) -> list[ErrorRow]:
    """Overflows first, then by the error of their own, then by error; noise last."""
    return sorted(rows, key=lambda row: (row.noise, -row.overflow, -row.own, -row.error, row.id))


def mark_noise(rows: Sequence[ErrorRow], kin: Callable[[ErrorRow], str]) -> tuple[ErrorRow, ...]:
    """Mark what is smaller than FP32's rounding of its kin (the other gradients of its node, or of its module).

    The gradient of a key's bias, say, is zero but for rounding: any two runs differ in all of it.
    """
    most: dict[str, float] = {}
    for row in rows:
        most[kin(row)] = max(most.get(kin(row), 0.0), row.largest)
    return tuple(replace(row, noise=row.largest < NOISE * most[kin(row)]) for row in rows)


def headroom(largest: float, limit: float) -> float:
    """How often `largest` may double before it passes `limit`, in bits; infinite for nothing but zeros.

    >>> headroom(1.0, 65504.0) > 15.99, headroom(131008.0, 65504.0)
    (True, -1.0)
    """
    if largest == 0:
        return math.inf
    return math.log2(limit / largest) if math.isfinite(largest) else -math.inf


def _relative(got: float, want: float) -> float:
    if got == want:
        return 0.0
    return abs(got - want) / abs(want) if want and math.isfinite(got) else math.inf


def _module(name: str, rows: list[ErrorRow]) -> ModuleErrors:
    worst = worst_first(rows)[0]
    return ModuleErrors(name, len(rows), worst.own, max((row.error for row in rows if not row.noise), default=0.0), worst.id,
                        sum(row.underflow for row in rows), sum(row.overflow for row in rows))  # fmt: skip


def _joined(mine: tuple[ErrorRow, ...], others: tuple[ErrorRow, ...]) -> tuple[ErrorRow, ...]:
    found = {row.id: row for row in mine}
    for row in others:
        found[row.id] = found[row.id].joined(row) if row.id in found else row
    return tuple(found.values())


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


__all__ = ["SCHEMA", "Comparison", "ErrorRow", "ModuleErrors", "headroom", "mark_noise", "worst_first"]
