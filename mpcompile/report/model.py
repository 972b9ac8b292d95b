"""The report as data: one row per node and per cast, and a summary. Every other form is a view of it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpcompile.devices import device as device_row
from mpcompile.errors import UsageError, suggest
from mpcompile.formats import FORMATS
from mpcompile.fp8 import LINEAR, Prices, Read, ends, reads
from mpcompile.graph import CAST_OP, Node, PrecisionGraph
from mpcompile.pipeline import History, StepRecord
from mpcompile.policy import Policy
from mpcompile.report.costs import Estimate

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA = "mpcompile.report/1"
VERDICTS = ("low", "fp32", "propagate")


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node: what it is, what was decided, by whom and why, and where it comes from.

    Fields:
      was: dtypes of its first floating output in the program as given ("" when it has none).
      inputs: names of the values it reads.
      bytes: of its outputs, as planned.
      flops: of its matrix work (0 where there is none).
      operands: of a linear layer under FP8 products, how each pass reads each of its operands, and why.
      origins: of each float value that it gives, what rounding it would lose (`mpcompile.origins`): (value, origin).
    """

    id: str
    op: str
    kind: str
    phase: str
    verdict: str
    precision: str
    reason: str
    decided_by: str
    module: str
    source: str
    inputs: tuple[str, ...]
    bytes: int
    flops: int
    was: str = ""
    operands: tuple[Read, ...] = ()
    origins: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        row = {**asdict(self), "inputs": list(self.inputs), "origins": dict(self.origins)}
        row["operands"] = [asdict(one) for one in self.operands]
        return {key: value for key, value in row.items() if value or key not in ("operands", "origins")}


@dataclass(frozen=True, slots=True)
class CastRow:
    """One cast: of which value, from and to which dtype, who reads it, who put it there, and the bytes it writes."""

    value: str
    from_: str
    to: str
    readers: tuple[str, ...]
    origin: str
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        row = {name.rstrip("_"): value for name, value in asdict(self).items()}
        return {**row, "readers": list(self.readers)}


@dataclass(frozen=True)
class Report:
    """What was decided for each node of a graph, and why.

    Fields:
      source: "fx" or "onnx".
      policy: the policy's one line.
      device: what the plan was priced for.
      nodes, casts: the rows, in the graph's order.
      origins: of each float input of the graph, its origin.
      steps: what each pass did, in order.
      graph: the graph that the rows tell of.
      history: the graph as it was read and the passes that decided on it; None where that is not known.
      code: the user's own line of code by a row's `source`, where it is known.
    """

    source: str
    policy: str
    device: str
    nodes: tuple[NodeRow, ...]
    casts: tuple[CastRow, ...]
    summary: dict[str, Any]
    steps: tuple[StepRecord, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
    graph: PrecisionGraph = field(default_factory=PrecisionGraph, repr=False, compare=False)
    history: History | None = field(default=None, repr=False, compare=False)
    code: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The report in the schema ``mpcompile.report/1`` (report/schema.json)."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "policy": self.policy,
            "device": self.device,
            "origins": dict(self.origins),
            "nodes": [row.to_dict() for row in self.nodes],
            "casts": [row.to_dict() for row in self.casts],
            "summary": self.summary,
            "passes": [{"name": s.name, "seconds": s.seconds, "modified": s.modified, "notes": list(s.notes)}
                       for s in self.steps],
        }  # fmt: skip

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one page that needs no network."""
        from mpcompile.report.html import write_html

        write_html(self, path)

    def to_dot(self) -> str:
        """The graph in Graphviz' language, coloured by precision."""
        from mpcompile.report.dot import dot

        return dot(self.graph)

    def to_model_explorer(self, path: str | os.PathLike[str], graph: str = "graph") -> None:
        """Write each node's precision as node data for Google's Model Explorer.

        Args:
          graph: id of the graph that it shows: "graph" for an exported program, the model's own name for ONNX.
        """
        from mpcompile.report.model_explorer import node_data

        Path(path).write_text(json.dumps(node_data(self, graph)), encoding="utf-8")

    def filter(self, only: str | Iterable[str] = (), where: Callable[[NodeRow], bool] | None = None) -> Report:
        """The report with fewer rows; the summary stays that of the whole graph.

        Args:
          only: verdicts, precisions or deciders to keep ("fp32" keeps the nodes that run in FP32).
          where: keep the nodes for which this is true.

        Raises:
          UsageError: MP801, for a word that is none of those.
        """
        words = {only} if isinstance(only, str) else set(only)
        for word in words:
            _check(word, "a verdict, precision or decider", _FILTERS)
        rows = [row for row in self.nodes if not words or words & _words(row)]
        return replace(self, nodes=tuple(row for row in rows if where is None or where(row)))

    def sort(self, by: str, *, descending: bool = True) -> Report:
        """The report with its nodes ordered by a column, by "cost" (estimated seconds), or by "name" (from a to z).

        Raises:
          UsageError: MP801, for a column that does not exist.
        """
        _check(by, "a column", (*NodeRow.__slots__, "cost", "name"))
        if by == "name":
            return replace(self, nodes=tuple(sorted(self.nodes, key=lambda row: row.id, reverse=not descending)))
        if by == "cost":
            return self._by_cost(descending)
        return replace(self, nodes=tuple(sorted(self.nodes, key=lambda row: getattr(row, by), reverse=descending)))

    def _by_cost(self, descending: bool) -> Report:
        from mpcompile.report.columns import node_seconds

        taken = dict(zip([row.id for row in self.nodes], node_seconds(self), strict=True))
        return replace(self, nodes=tuple(sorted(self.nodes, key=lambda row: taken[row.id], reverse=descending)))

    def __rich__(self) -> Group:
        from mpcompile.report.table import node_table

        return node_table(self)

    def __str__(self) -> str:
        from mpcompile.report.table import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from mpcompile.report.html import fragment

        return fragment(self)


# What --only takes. "low" is a verdict and fp16/bf16 are precisions; "fp32" is both, and means what runs in FP32.
_FILTERS = (
    *("low", "propagate", *(one.name for one in FORMATS if one.storable), "keep"),
    *("rule", "override", "hazard", "cost", "unknown", "user-cast", "autocast-region"),
)


def _words(row: NodeRow) -> set[str]:
    verdict = {row.verdict} - {"fp32"}
    return verdict | {row.precision, row.decided_by}


def _check(word: str, what: str, known: Iterable[str]) -> None:
    names = list(known)
    if word not in names:
        near = suggest(word, names)
        raise UsageError("MP801", f"{word!r} is not {what}",
                         try_=f"did you mean {near}?" if near else ", ".join(names))  # fmt: skip


def build_report(graph: PrecisionGraph, policy: Policy, device: str, source: str = "", *,
                 steps: Sequence[StepRecord] = (), before: PrecisionGraph | None = None,
                 history: History | None = None, code: Mapping[str, str] | None = None) -> Report:  # fmt: skip
    """The report of a graph that the passes have decided on.

    Args:
      graph: after the passes, casts and all.
      policy: its settled policy.
      device: what the plan was priced for.
      source: "fx" or "onnx"; by default what the graph's header says.
      steps: what each pass did.
      before: the graph before the passes, for what the dtypes were; by default FP32 where a precision was given.
      code: the user's own line of code by place ("model.py:41").
      history: with it the page shows the graph's text before and after each pass.
    """
    source = source or graph.header.get("source", "fx")
    operands = _operands(graph, policy, device)
    nodes = tuple(_node_row(graph, n, before, operands.get(n.id, ())) for n in graph if not n.is_cast)
    casts = tuple(_casts(graph))
    summary = _summary(nodes, casts)
    summary["cost"] = Estimate(graph, policy, device, source).to_dict()
    origins = dict(_origins(graph, graph.inputs))
    return Report(source, str(policy), device, nodes, casts, summary, tuple(steps), origins, graph, history, code or {})


def _origins(graph: PrecisionGraph, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The origins of the float values among `names`; numbers, and what an FP32 plan never asked, have none."""
    return tuple((name, graph.values[name].origin) for name in names if graph.values[name].origin)


def _operands(graph: PrecisionGraph, policy: Policy, name: str) -> dict[str, tuple[Read, ...]]:
    """Node -> how its products read their operands, where FP8 is a question."""
    if policy.low != "bf16" or (policy.products != "fp8" and not any(node.fp8 for node in graph)):
        return {}
    prices, outer = Prices(graph, device_row(name), policy.fp8, margin=1.0), ends(graph)
    return {node.id: tuple(reads(graph, node, prices, outer)) for node in graph if node.op == LINEAR}


def _node_row(
    graph: PrecisionGraph, node: Node, before: PrecisionGraph | None, operands: tuple[Read, ...] = ()
) -> NodeRow:
    return NodeRow(
        id=node.id, op=node.op, kind=node.kind, phase=node.phase, verdict=node.verdict or "propagate",
        precision=node.precision or "keep", reason=node.reason, decided_by=node.decided_by, module=node.module,
        source=node.source, inputs=tuple(node.inputs), bytes=sum(graph.values[name].bytes for name in node.outputs),
        flops=node.flops, was=_was(graph, node, before), operands=operands,
        origins=_origins(graph, node.outputs),
    )  # fmt: skip


def _was(graph: PrecisionGraph, node: Node, before: PrecisionGraph | None) -> str:
    """dtype of the node's first floating output in the program as given."""
    for name in node.outputs:
        if graph.values[name].castable:
            old = before.values.get(name) if before else None
            return old.dtype if old else node.out_dtype or "fp32"
    return ""


def _casts(graph: PrecisionGraph) -> Iterable[CastRow]:
    """Ours and, as "existing", the user's own between floating dtypes."""
    uses = graph.uses()
    for node in graph:
        if not node.inputs or not node.outputs or not (node.is_cast or node.decided_by == "user-cast"):
            continue
        given, made = graph.values[node.inputs[0]], graph.values[node.outputs[0]]
        if not given.castable or not made.castable or (node.op != CAST_OP and given.dtype == made.dtype):
            continue
        readers = dict.fromkeys(reader for reader, _ in uses[made.name])
        returned = ["(output)"] if made.name in graph.outputs else []
        origin = node.origin or ("inserted" if node.is_cast else "existing")
        yield CastRow(given.name, given.dtype, made.dtype, (*readers, *returned), origin, made.bytes)


def _summary(nodes: Sequence[NodeRow], casts: Sequence[CastRow]) -> dict[str, Any]:
    verdicts = Counter(row.verdict for row in nodes)
    precisions = Counter(row.precision for row in nodes)
    return {
        "nodes": {verdict: verdicts[verdict] for verdict in VERDICTS},
        "precision": dict(sorted(precisions.items())),
        "casts": len(casts),
        "unknown_ops": sorted({row.op for row in nodes if row.decided_by == "unknown"}),
    }


__all__ = ["SCHEMA", "CastRow", "NodeRow", "Report", "build_report"]
