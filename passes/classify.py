"""Give every node its kind, its verdict and the reason: from the rules, the user's own casts and regions, and overrides.

In order of strength: what the program itself says (integers stay, a cast is a cast), the caller's overrides, the
user's autocast regions, the rule.  An operation without a rule is FP32 and says how to register it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mpcompile.errors import RuleError, page, suggest
from mpcompile.graph import Node, PrecisionGraph
from mpcompile.passes.base import PassResult
from mpcompile.rules.table import Rule, Rules, rules_for

page(
    "MP203",
    "An override that matches nothing",
    "A glob of keep_fp32 or low matches no module path, no operation name and no node name of the graph.",
    "Look the names up with `mpcompile inspect`; near names are in the message.",
)
page(
    "MP205",
    "An operation without a rule, under strict=True",
    "strict=True makes an unknown operation an error instead of FP32.",
    "Register it: mpcompile.rules.register('lib::op', 'matmul'), or verdict='fp32' with a reason.",
)

# torch's lists; "set_dtype" computes and gives FP32, and what is on no list or on "promote" takes its widest operand.
_AUTOCAST: dict[str, tuple[str, str]] = {
    "lower": ("low", "on torch.autocast's list of low-precision operations"),
    "fp32": ("fp32", "on torch.autocast's list of FP32 operations"),
    "set_dtype": ("fp32", "on torch.autocast's list of operations that give FP32 unless told a dtype"),
}


@dataclass(frozen=True)
class Classify:
    """Fields:
    low: the low type of the policy.
    source: whose operation names the graph uses: "aten" or "onnx".
    plan: "global", or "autocast" for torch.autocast's decisions.
    keep_fp32, force_low: overrides: globs on module path, operation or node name, or callables of a `Node`.
    strict: an operation without a rule is an error.
    partial: the graph is one of several of the model: a glob may match in another (see `unmatched`).
    """

    low: str
    source: str = "aten"
    plan: str = "global"
    keep_fp32: tuple[Any, ...] = ()
    force_low: tuple[Any, ...] = ()
    strict: bool = False
    partial: bool = False

    name: ClassVar[str] = "classify"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        rules = rules_for(self.source)
        if not self.partial:
            for option, globs in (("low", self.force_low), ("keep_fp32", self.keep_fp32)):
                refuse_unmatched(unmatched([graph], globs), option, _Names.of(graph).found)
        wanted = {id_: ("low", f"low={text!r}") for id_, text in _matches(graph, self.force_low).items()}
        wanted |= {id_: ("fp32", f"keep_fp32={text!r}") for id_, text in _matches(graph, self.keep_fp32).items()}
        changed = False
        for node in graph:
            before = (node.kind, node.verdict, node.reason, node.decided_by)
            self._decide(graph, node, rules)
            if node.id in wanted and node.kind not in ("cast", "integer"):
                node.verdict, node.reason = wanted[node.id]  # type: ignore[assignment]
                node.decided_by = "override"
            changed |= before != (node.kind, node.verdict, node.reason, node.decided_by)
        return PassResult(changed)

    def _decide(self, graph: PrecisionGraph, node: Node, rules: Rules) -> None:
        if node.is_cast:
            node.kind, node.verdict = "cast", "propagate"
            return
        rule = rules.get(node.op)
        if rule is None:
            self._unknown(node)
            return
        node.kind, node.reason, node.decided_by = rule.kind.name, rule.why(), "rule"
        node.verdict = rule.verdict_for(self.low)
        if rule.when:
            _attributes(node, rule)
        if self.plan == "autocast":
            node.verdict, node.reason = _AUTOCAST.get(rule.autocast, ("propagate", node.reason))  # type: ignore[assignment]
        _operands(node, rule)
        if rule.kind.name == "cast" and node.out_dtype:
            node.decided_by = "user-cast"
        elif node.region == "off":
            node.verdict, node.decided_by = "fp32", "autocast-region"
            node.reason = "inside the program's own autocast(enabled=False)"
        if _mixes_wide(graph, node):
            node.verdict, node.reason = "fp32", "meets FP64 or complex values: low would lose digits that they keep"

    def _unknown(self, node: Node) -> None:
        if self.strict:
            raise RuleError("MP205", f"no rule for {node.op}", where=f"{node.module or 'the model'} {node.source}".strip(),
                            try_=f'mpcompile.rules.register("{node.op}", "elementwise")')  # fmt: skip
        node.kind, node.verdict, node.decided_by = "custom", "fp32", "unknown"
        node.reason = f'no rule: mpcompile.rules.register("{node.op}", …) gives it one'


def _attributes(node: Node, rule: Rule) -> None:
    """The verdict of an attribute that is set."""
    for name, verdict in rule.when.items():
        if node.attrs.get(name):
            node.verdict, node.reason = verdict, rule.kind.reason


def _operands(node: Node, rule: Rule) -> None:
    node.operands = dict.fromkeys(rule.any_operands, "any") | dict.fromkeys(rule.fp32_operands, "fp32")
    node.results = dict.fromkeys(rule.fp32_results, "fp32")


def _mixes_wide(graph: PrecisionGraph, node: Node) -> bool:
    kinds = {graph.values[name].dtype for name in (*node.inputs, *node.outputs)}
    return node.kind != "cast" and bool(kinds & {"fp64", "complex64", "complex128", "complex32"})


@dataclass
class _Names:
    """What globs can match: module paths (with their parents), operations (with and without overload), node ids."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, node: str) -> None:
        self.found.setdefault(name, []).append(node)

    @classmethod
    def of(cls, graph: PrecisionGraph) -> _Names:
        names = cls()
        for node in graph:
            if node.module:
                names.add(node.module, node.id)
            for name in {node.op, node.op.rpartition(".")[0]} - {""}:
                names.add(name, node.id)
            names.add(node.id, node.id)
        return names


def _hits(names: _Names, glob: str) -> list[str]:
    """The names that a glob matches; "decoder" names the module with all that is in it."""
    return [n for n in names.found if fnmatch.fnmatchcase(n, glob) or fnmatch.fnmatchcase(n, f"{glob}.*")]


def _matches(graph: PrecisionGraph, overrides: Iterable[Any]) -> dict[str, str]:
    """Node id -> the override that names it."""
    overrides = tuple(overrides)
    if not overrides:
        return {}
    names, chosen = _Names.of(graph), dict[str, str]()
    for one in overrides:
        if callable(one):
            chosen |= _called(graph, one)
        else:
            chosen |= {id_: one for name in _hits(names, one) for id_ in names.found[name]}
    return chosen


def unmatched(graphs: Iterable[PrecisionGraph], overrides: Iterable[Any]) -> list[str]:
    """The globs that match nothing in any of the graphs (callables choose for themselves)."""
    globs = [one for one in overrides if not callable(one)]
    for graph in graphs if globs else ():
        names = _Names.of(graph)
        globs = [one for one in globs if not _hits(names, one)]
    return globs


def refuse_unmatched(globs: Iterable[str], option: str, known: Iterable[str]) -> None:
    """Raise for the first glob, with near names out of `known`.

    Raises:
      RuleError: MP203.
    """
    for one in globs:
        near = suggest(one.replace("*", "").strip("."), known)
        raise RuleError("MP203", f"{option}={one!r} matches no module, operation or node",
                        try_=near or "mpcompile inspect lists the names")  # fmt: skip


def _called(graph: PrecisionGraph, wanted: Callable[[Node], bool]) -> dict[str, str]:
    return {node.id: getattr(wanted, "__name__", "callable") for node in graph if wanted(node)}
