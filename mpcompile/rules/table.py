"""Load, check, look up and extend the rules.

``kinds.toml`` has a row per kind: its verdict and reason, and what the cost model must know of it.  ``aten.toml`` and
``onnx.toml`` map operations to kinds.  An operation is named as its front end names it ("aten.linear.default",
"onnx::MatMul"); a row may name one overload, or the packet ("aten.linear") for all of them.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

from mpcompile.errors import RuleError, suggest
from mpcompile.graph import Verdict

VERDICTS = ("low", "fp32", "propagate")
# What an operation does with the origins of what it reads: `mpcompile.origins` says how.
BEHAVIOURS = ("round", "norm", "map", "select", "place", "move", "gather", "add", "multiply", "divide", "power", "compare",
              "source", "cast", "compute", "none")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of operations with one verdict.

    Fields:
      fusion: "kernel" (runs as a library kernel: its operands and results are materialised), "fused" (can live inside
        a fused region), "view" (moves no data), "none" (no device work).
      saves: what autograd keeps of it: "inputs", "output", or "none".
      per_precision: verdict by low type where it differs, e.g. {"fp16": "fp32"}.
      origin: what becomes of the origins of its operands (`mpcompile.origins` has the table).
    """

    name: str
    verdict: Verdict
    reason: str
    fusion: Literal["kernel", "fused", "view", "none"] = "fused"
    saves: Literal["inputs", "output", "none"] = "none"
    per_precision: dict[str, Verdict] = field(default_factory=dict)
    origin: str = "compute"


@dataclass(frozen=True, slots=True)
class Rule:
    """What is known of one operation.

    Fields:
      fp32_operands, any_operands: operand slots; a row names them as the schema does: ``{ weight = 1, bias = 2 }``.
      fp32_results: numbers of outputs.
      flops: the formula of a product's work (`mpcompile.aten.flops`, `mpcompile.onnx.read.facts`), or "none": it is low
        whatever it costs.
    """

    op: str
    kind: Kind
    reason: str = ""
    fp32_operands: tuple[int, ...] = ()
    any_operands: tuple[int, ...] = ()
    fp32_results: tuple[int, ...] = ()
    verdict: Verdict | None = None
    # Attribute -> the verdict where the node has it set (to anything true): `accumulate` makes a write a sum.
    when: dict[str, Verdict] = field(default_factory=dict)
    # torch.autocast's own treatment on CUDA: "lower", "fp32", "promote", "set_dtype" or "" (no list).
    autocast: str = ""
    # Where the operation's origins differ from its kind's.
    origin: str = ""
    flops: str = ""
    # Least and greatest number of its results, whatever it reads.
    range: tuple[float, float] | None = None

    @property
    def origins(self) -> str:
        return self.origin or self.kind.origin

    def verdict_for(self, low: str) -> Verdict:
        return self.verdict or self.kind.per_precision.get(low, self.kind.verdict)

    def why(self) -> str:
        return self.reason or self.kind.reason


class Rules:
    """The rows of one front end ("aten" or "onnx"), with the kinds."""

    def __init__(self, kinds: dict[str, Kind], rows: dict[str, Rule]) -> None:
        self.kinds, self._rows = kinds, rows
        self._found: dict[str, Rule | None] = {}

    def get(self, op: str) -> Rule | None:
        """The row of `op`: the overload's own, else its packet's, else that of an in-place packet's functional twin.

        None: an unknown op.
        """
        if op not in self._found:
            packet = op.rpartition(".")[0]
            self._found[op] = self._rows.get(op) or self._rows.get(packet) or self._twin(packet)
        return self._found[op]

    def _twin(self, packet: str) -> Rule | None:
        """The row of "aten.add" for "aten.add_", less its autocast list: autocast leaves in-place calls alone."""
        if not packet.endswith("_") or packet.endswith("__"):
            return None
        rule = self._rows.get(packet[:-1])
        return replace(rule, autocast="") if rule else None

    def __iter__(self) -> Any:
        return iter(self._rows.values())

    def set(self, rule: Rule) -> None:
        self._rows[rule.op] = rule
        self._found.clear()

    def rule(self, op: str, row: str | dict[str, Any]) -> Rule:
        """Build the rule that a TOML row describes.

        Raises:
          RuleError: MP202, for an unknown kind or verdict.
        """
        fields = {"kind": row} if isinstance(row, str) else dict(row)
        kind = self.kinds.get(fields.pop("kind", ""))
        if kind is None:
            name = row if isinstance(row, str) else row.get("kind")
            raise RuleError("MP202", f"the rule of {op!r} names an unknown kind {name!r}",
                            try_=suggest(str(name), self.kinds) or f"one of {', '.join(self.kinds)}")  # fmt: skip
        if fields.get("verdict", "low") not in VERDICTS:
            raise RuleError(
                "MP202", f"the rule of {op!r} has no verdict {fields['verdict']!r}", try_=", ".join(VERDICTS)
            )
        if fields.get("origin", "none") not in BEHAVIOURS:
            raise RuleError(
                "MP202", f"the rule of {op!r} has no origin {fields['origin']!r}", try_=", ".join(BEHAVIOURS)
            )
        lists = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
        lists |= {k: tuple(v.values()) for k, v in fields.items() if k.endswith("_operands") and isinstance(v, dict)}
        return replace(Rule(op, kind), **{**fields, **lists})


@cache
def load_kinds() -> dict[str, Kind]:
    rows = tomllib.loads(_text("kinds.toml"))
    return {name: Kind(name, **row) for name, row in rows.items()}


@cache
def rules_for(source: str) -> Rules:
    """The rules of a front end: "aten" or "onnx" (one shared object: what is registered stays)."""
    rules = Rules(load_kinds(), {})
    for op, row in tomllib.loads(_text(f"{source}.toml")).items():
        rules.set(rules.rule(op, row))
    return rules


def register(op: str, kind: str | None = None, *, verdict: str | None = None, reason: str = "") -> None:
    """Teach the compiler an op of your own.

    Args:
      op: "mylib::op" (all overloads), "mylib::op.overload", or an ONNX "domain::Op".
      kind: a kind of kinds.toml, or give `verdict` with a `reason`.

    Raises:
      RuleError: MP202, for an unknown kind or verdict, or neither given.
    """
    if kind is None and (verdict is None or not reason):
        raise RuleError("MP202", f"register({op!r}) needs a kind, or a verdict with a reason",
                        try_=f'register({op!r}, "matmul") or register({op!r}, verdict="fp32", reason="…")')  # fmt: skip
    row: dict[str, Any] = {"kind": kind or "custom", "reason": reason}
    if verdict is not None:
        row["verdict"] = verdict
    for source, name in (("aten", op.replace("::", ".")), ("onnx", op)):
        rules = rules_for(source)
        rules.set(rules.rule(name, row))


def _text(name: str) -> str:
    return resources.files("mpcompile.rules").joinpath(name).read_text(encoding="utf-8")
