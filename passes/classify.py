"""Give every node its kind, verdict and reason: from the rules, the user's own casts and regions, and overrides.

In order of strength: what the program itself says (integers stay, a cast is a cast), the caller's overrides, the
user's autocast regions, the rule.  An operation without a rule is FP32 and says how to register it.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, ClassVar

from mpcompile import fp8
from mpcompile.errors import RuleError, suggest
from mpcompile.formats import LOW
from mpcompile.graph import CAST_OP, NOTHING, Node, PrecisionGraph, Verdict
from mpcompile.passes.base import PassResult
from mpcompile.rules.table import Rule, Rules, rules_for

# torch's lists; "set_dtype" computes and gives FP32, and what is on no list or on "promote" takes its widest operand.
_AUTOCAST: dict[str, tuple[Verdict, str]] = {
    "lower": ("low", "on torch.autocast's list of low-precision operations"),
    "fp32": ("fp32", "on torch.autocast's list of FP32 operations"),
    "set_dtype": ("fp32", "on torch.autocast's list of operations that give FP32 unless told a dtype"),
}

_WIDE = frozenset({"fp64", "complex64", "complex128", "complex32"})


@dataclass(frozen=True)
class Classify:
    """Fields:
    low: the low type of the policy.
    source: whose operation names the graph uses: "aten" or "onnx".
    plan: "global", or "autocast" for torch.autocast's decisions.
    keep_fp32, force_low: overrides: globs on module path, operation or node name, or callables of a `Node`.
    strict: an operation without a rule is an error.
    partial: the graph is one of several of the model: a glob may match in another (see `unmatched`).
    force_fp8: overrides too: linear layers that read FP8 whatever it costs.
    """

    low: str
    source: str = "aten"
    plan: str = "global"
    keep_fp32: tuple[Any, ...] = ()
    force_low: tuple[Any, ...] = ()
    strict: bool = False
    partial: bool = False
    force_fp8: tuple[Any, ...] = ()

    name: ClassVar[str] = "classify"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        rules, names = rules_for(self.source), _Names(graph)
        if not self.partial:
            for option, globs in (("low", self.force_low), ("keep_fp32", self.keep_fp32), ("fp8", self.force_fp8)):
                if globs:
                    refuse_unmatched(names.unmatched(globs), option, names.found)
        # A node without a kind gets one; where all have theirs, an earlier run may have decided the same.
        before = None if any(not node.kind for node in graph) else [*map(_DECISION, graph)]
        wide = {name for name, value in graph.values.items() if value.dtype in _WIDE}
        for node in graph:
            node.fp8 = NOTHING
            self._decide(graph, node, rules, wide)
        # After the rules, so that a callable can ask for a node's kind and verdict.
        wanted: dict[str, tuple[Verdict, str]] = {
            id_: ("low", f"low={text!r}") for id_, text in names.matches(self.force_low).items()
        }
        self._ask_fp8(graph, names)
        wanted |= {id_: ("fp32", f"keep_fp32={text!r}") for id_, text in names.matches(self.keep_fp32).items()}
        for id_, (verdict, reason) in wanted.items():
            _override(graph.nodes[id_], verdict, reason)
        return PassResult(before is None or before != [*map(_DECISION, graph)])

    def _ask_fp8(self, graph: PrecisionGraph, names: _Names) -> None:
        """Mark the linear layers that are to read FP8; such a product is low."""
        for id_, text in names.matches(self.force_fp8).items():
            node = graph.nodes[id_]
            if not fp8.impossible(graph, node):
                _override(node, "low", f"fp8={text!r}")
                fp8.ask(node, f"fp8={text!r}")

    def _decide(self, graph: PrecisionGraph, node: Node, rules: Rules, wide: set[str]) -> None:
        if node.op == CAST_OP:
            node.kind = "cast"
            node.decide("propagate", node.reason, "rule")
            return
        rule = rules.get(node.op)
        if rule is None:
            self._unruled(node)
            return
        node.kind = rule.kind.name
        node.decide(rule.verdict_for(self.low), rule.why(), "rule")
        if rule.when:
            _attributes(node, rule)
        if self.plan == "autocast":
            node.decide(*_AUTOCAST.get(rule.autocast, ("propagate", node.reason)), "rule")
        _operands(node, rule)
        if node.kind == "cast" and node.out_dtype:
            node.decided_by = "user-cast"
        elif node.region == "off":
            _outside(node)
        if node.kind != "control" and not graph.has_floats(node):
            node.decide("propagate", "integers and bools are never cast", "rule")
        if wide and node.kind != "cast" and not wide.isdisjoint((*node.inputs, *node.outputs)):
            node.decide("fp32", "meets FP64 or complex values: low would lose digits that they keep", "rule")
        elif node.kind == "embedding":
            _low_table(graph, node)

    def _unruled(self, node: Node) -> None:
        if not node.autocast:
            self._unknown(node)
            return
        node.kind = "custom"
        node.decide(
            "low" if node.autocast in LOW else "fp32",
            f"torch.library.register_autocast gives it {node.autocast}",
            "rule",
        )
        if node.region == "off":
            _outside(node)

    def _unknown(self, node: Node) -> None:
        if self.strict:
            where = f"{node.module or 'the model'} {node.source}".strip()
            raise RuleError("MP205", f"no rule for {node.op}", where=where,
                            try_=f'mpcompile.rules.register("{node.op}", "elementwise")')  # fmt: skip
        node.kind = "custom"
        node.decide("fp32", f'no rule: mpcompile.rules.register("{node.op}", …) gives it one', "unknown")


def _outside(node: Node) -> None:
    node.decide("fp32", "inside the program's own autocast(enabled=False)", "autocast-region")


def _attributes(node: Node, rule: Rule) -> None:
    """The verdict of an attribute that is set."""
    for name, verdict in rule.when.items():
        if node.attrs.get(name):
            node.decide(verdict, rule.kind.reason, "rule")


def _operands(node: Node, rule: Rule) -> None:
    if node.operands or rule.any_operands or rule.fp32_operands:
        node.operands = dict.fromkeys(rule.any_operands, "any") | dict.fromkeys(rule.fp32_operands, "fp32")
    if node.results or rule.fp32_results:
        node.results = dict.fromkeys(rule.fp32_results, "fp32")


def _low_table(graph: PrecisionGraph, node: Node) -> None:
    """A frozen table that is low already is read as it is: in FP32, every step would cast all of it."""
    if node.inputs and (dtype := graph.values[node.inputs[0]].dtype) in LOW:
        node.operands, node.out_dtype = {**node.operands, node.slots[0]: "any"}, dtype
        node.reason = f"gathers rows of a table that the model has in {dtype} already"


def _override(node: Node, verdict: Verdict, reason: str) -> None:
    """The caller's word, where it can hold: an opaque body's own tensors would not follow."""
    if node.kind in ("cast", "integer") or (node.kind == "control" and verdict == "low"):
        return
    node.decide(verdict, reason, "override")


_DECISION = attrgetter("kind", "verdict", "reason", "decided_by")


class _Names:
    """What globs can match: module paths, operations (with and without overload), node ids; each with its nodes."""

    def __init__(self, graph: PrecisionGraph) -> None:
        self.graph = graph

    @cached_property
    def found(self) -> dict[str, list[str]]:
        found: defaultdict[str, list[str]] = defaultdict(list)
        packets: dict[str, str] = {}
        for node in self.graph:
            packet = packets.get(node.op)
            if packet is None:
                packet = packets[node.op] = node.op.rpartition(".")[0] or node.op
            for name in (node.module or node.id, node.op, packet, node.id):
                found[name].append(node.id)
        return found

    def hits(self, glob: str) -> list[str]:
        """The names that a glob matches; "decoder" names the module with all that is in it."""
        # The whole of a name, or of a module that it is in.
        match = re.compile(f"{fnmatch.translate(glob)}|{fnmatch.translate(glob + '.*')}").match
        return [name for name in self.found if match(name)]

    def matches(self, overrides: Iterable[Any]) -> dict[str, str]:
        """Node id -> the override that names it."""
        chosen: dict[str, str] = {}
        for one in overrides:
            if callable(one):
                chosen |= {n.id: getattr(one, "__name__", "callable") for n in self.graph if one(n)}
            else:
                chosen |= {id_: one for name in self.hits(one) for id_ in self.found[name]}
        return chosen

    def unmatched(self, globs: Iterable[Any]) -> list[str]:
        """The globs that match nothing (callables choose for themselves)."""
        return [one for one in globs if not callable(one) and not self.hits(one)]


def unmatched(graphs: Iterable[PrecisionGraph], overrides: Iterable[Any]) -> list[str]:
    """The globs that match nothing in any of the graphs."""
    globs = [one for one in overrides if not callable(one)]
    for graph in graphs if globs else ():
        globs = _Names(graph).unmatched(globs)
    return globs


def refuse_both(keep_fp32: Iterable[Any], low: Iterable[Any], option: str = "low") -> None:
    """Refuse an override that asks for FP32 and for the low type (or FP8); a narrower one in `keep_fp32` is an exception.

    Raises:
      RuleError: MP203.
    """
    forced = list(low)
    for one in keep_fp32:
        if one in forced:
            raise RuleError("MP203", f"keep_fp32 and {option} both name {one!r}",
                            why=f"keep_fp32 would win, and {option} say nothing", try_="name it in one of them")  # fmt: skip


def refuse_unmatched(globs: Iterable[str], option: str, known: Iterable[str], modules: Iterable[str] = ()) -> None:
    """Raise for the first glob, with near names out of `known`.

    Args:
      modules: paths of modules that the model has, whatever of it is in a graph.

    Raises:
      RuleError: MP203.
    """
    for one in globs:
        if found := next((path for path in modules if path and fnmatch.fnmatchcase(path, one)), ""):
            raise RuleError("MP203", f"{option}={one!r} names the module {found!r}, of which no captured graph has a node",
                            why="it is not used, is left out by a graph break, or is inside control flow that stays whole",
                            try_="mp.report() shows what was captured")  # fmt: skip
        near = suggest(one.replace("*", "").strip("."), known)
        raise RuleError("MP203", f"{option}={one!r} matches no module, operation or node",
                        try_=near or "mpcompile inspect lists the names")  # fmt: skip
