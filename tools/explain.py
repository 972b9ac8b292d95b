"""`mpcompile explain`: one node's decision in full, or one error code's page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcompile.errors import Page, UsageError, pages, suggest
from mpcompile.tools import options, target

if TYPE_CHECKING:
    from mpcompile.graph import Node
    from mpcompile.report.model import Report


def explain(
    what: Annotated[
        str, typer.Argument(metavar="TARGET|CODE", help="A model (then NODE too), or a code such as MP203.")
    ],
    node: Annotated[str, typer.Argument(help="The node's name in the report.", show_default=False)] = "",
    policy: options.Policy = "auto",
    keep_fp32: options.KeepFp32 = None,
    low: options.Low = None,
    fp8: options.Fp8 = None,
    ranges: options.Ranges = None,
    json: options.Json = False,
) -> None:
    """Explain a node's precision (TARGET NODE), or an error (CODE)."""
    if re.fullmatch(r"(?i)mp\d+", what):
        found = _page(what.upper())
        options.print_json(asdict(found)) if json else options.say(_page_text(found))
        return
    if not node:
        raise UsageError("MP806", f"which node of {what}?", try_=f"mpcompile explain {what} NODE")
    report = target.study(what, policy, keep_fp32, low, ranges, fp8).report
    facts = node_facts(report, _find(report, node))
    options.print_json(facts) if json else options.say(_node_text(facts))


def _page(code: str) -> Page:
    known = pages()
    if code not in known:
        raise UsageError("MP806", f"there is no error {code}", try_=suggest(code, known) or "a code such as MP203")
    return known[code]


def _page_text(found: Page) -> str:
    return f"{found.code}: {found.title}\n\n  cause:  {found.cause}\n  remedy: {found.remedy}"


def _find(report: Report, name: str) -> Node:
    node = report.graph.nodes.get(name)
    if node is None:
        raise UsageError("MP806", f"the graph has no node {name!r}", try_=suggest(name, report.graph.nodes))
    return node


def node_facts(report: Report, node: Node) -> dict[str, Any]:
    """All that is known of one node: its row, its rule, what it reads and who reads it, and what each choice costs."""
    graph = report.graph
    uses = graph.uses()
    row = next(
        (r.to_dict() for r in report.nodes if r.id == node.id), {"id": node.id, "op": node.op, "reason": node.reason}
    )
    row = {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}
    reads = [
        {
            "value": name,
            "dtype": graph.values[name].dtype,
            "from": graph.values[name].producer or graph.values[name].role,
        }
        for name in node.inputs
    ]
    gives = [
        {
            "value": name,
            "dtype": graph.values[name].dtype,
            "readers": list(dict.fromkeys(reader for reader, _ in uses[name])),
        }
        for name in node.outputs
    ]
    return {"node": row, "rule": _rule(report, node), "reads": reads, "gives": gives, "cost": _choices(report, node)}


def _rule(report: Report, node: Node) -> dict[str, Any]:
    from mpcompile.rules import rules_for

    rule = rules_for("onnx" if report.source == "onnx" else "aten").get(node.op)
    if rule is None:
        return {"kind": "", "verdict": "fp32", "why": "no rule: mpcompile.rules.register() teaches one"}
    return {"kind": rule.kind.name, "verdict": rule.verdict_for(_low(report)), "why": rule.why()}


def _choices(report: Report, node: Node) -> dict[str, dict[str, float]]:
    """What either precision costs: seconds of the node's work, bytes of its results, and the plan with it alone so."""
    from mpcompile.cost import CostModel, device
    from mpcompile.policy import Policy
    from mpcompile.report.costs import Estimate

    low = _low(report)
    if node.precision not in (low, "fp32"):
        return {}
    model = CostModel(report.graph, device(report.device), low, report.source != "onnx")
    estimate = Estimate(report.graph, Policy.parse(report.policy), report.device, report.source)
    values = [report.graph.values[name] for name in node.outputs]
    return {
        precision: {
            "seconds": model.work(node, precision),
            "bytes": sum(v.bytes_at(precision) for v in values),
            "plan": estimate.with_node(node.id, precision),
        }
        for precision in (low, "fp32")
    }


def _low(report: Report) -> str:
    low = report.policy.removeprefix("low=").partition(",")[0]
    return low if low in ("fp16", "bf16") else "bf16"


def _reads_of(operands: Sequence[Any]) -> list[str]:
    """A line for each product of a linear layer: in which format it reads its operands, both prices, and why."""
    lines = []
    for left, right in zip(operands[::2], operands[1::2], strict=True):
        how = " and ".join(
            f"{one['operand']} as {one['format']}" + (f" (transposed, {one['scale']})" if one["transposed"] else "")
            for one in (left, right)
        )
        fast = f"{left['seconds_fp8'] * 1e6:.4g} µs" if left["seconds_fp8"] is not None else "not here"
        lines.append(f"  {left['step']}: {how}; BF16 {left['seconds_low'] * 1e6:.4g} µs, FP8 with copies of its own {fast}: "
                     f"{left['reason']}")  # fmt: skip
    return lines


def _node_text(facts: dict[str, Any]) -> str:
    row, rule = facts["node"], facts["rule"]
    lines = [f"{row['id']} = {row['op']}"]
    if where := " ".join(filter(None, (row.get("module"), row.get("source")))):
        lines.append(f"  where:   {where}")
    if "precision" in row:
        lines.append(f"  now:     {row['precision']} (was {row['was'] or 'no floating result'})")
        lines.append(f"  verdict: {row['verdict']}, by {row['decided_by']}")
    lines.append(f"  why:     {row['reason']}")
    lines.append(f"  rule:    {rule['kind'] or 'none'}: {rule['verdict']}; {rule['why']}")
    lines += [f"  reads:   {r['value']} {r['dtype']} from {r['from']}" for r in facts["reads"]]
    lines += [
        f"  gives:   {g['value']} {g['dtype']} to {', '.join(g['readers']) or 'the caller'}" for g in facts["gives"]
    ]
    for precision, cost in facts["cost"].items():
        work = (
            f"{cost['seconds'] * 1e6:.3g} µs of matrix work, "
            if any(c["seconds"] for c in facts["cost"].values())
            else ""
        )
        whole = f"the whole {cost['plan'] * 1e6:.4g} µs"
        here = " (the plan)" if precision == row.get("precision") else ""
        lines.append(f"  as {precision}: {cost['bytes']:,} bytes of results, {work}{whole}{here}")
    lines += _reads_of(row.get("operands") or [])
    if facts["cost"]:
        lines.append("           estimates; the whole with this node alone changed, its casts included")
    if row.get("precision") in ("fp16", "bf16"):
        lines.append(f"  to keep it FP32:  --keep-fp32 '{row['id']}', or mpcompile(model, keep_fp32=['{row['id']}'])")
    elif row.get("precision") == "fp32":
        lines.append(f"  to make it low:   --low '{row['id']}', or mpcompile(model, low=['{row['id']}'])")
    return "\n".join(lines)
