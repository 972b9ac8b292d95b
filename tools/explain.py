"""`mpcompile explain`: one node's decision in full, a module's in sums, or one error code's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcompile.errors import UsageError, suggest
from mpcompile.tools import codes, options, target
from mpcompile.tools.explain_module import module_text

if TYPE_CHECKING:
    from mpcompile.graph import Node
    from mpcompile.report.model import Report


def explain(
    what: Annotated[
        str,
        typer.Argument(
            metavar="TARGET|CODE",
            help="A model (then a node or a module too), or a code such as MP203; MP5 lists those that begin so.",
            autocompletion=codes.completions,
        ),
    ],
    node: Annotated[
        str,
        typer.Argument(
            metavar="[NODE|MODULE]",
            help="A node or a module as the report names it: linear, h.{0-11}.mlp",
            show_default=False,
        ),
    ] = "",
    policy: options.Policy = "auto",
    keep_fp32: options.KeepFp32 = None,
    low: options.Low = None,
    fp8: options.Fp8 = None,
    ranges: options.Ranges = None,
    json: options.Json = False,
) -> None:
    """Explain a node's precision, sum up a module's (TARGET NODE|MODULE), or show an error's page (CODE)."""
    if codes.is_code(what):
        typer.echo(codes.answer(what, as_json=json))
        return
    target.usable(what, policy, ranges)
    if not node:
        raise UsageError("MP806", f"which node or module of {what}?", try_=f"mpcompile explain {what} NODE")
    report = target.study(what, policy, keep_fp32, low, ranges, fp8).report
    if one := _node(report, node):
        facts = node_facts(report, one)
        options.print_json(facts) if json else options.say(_node_text(facts))
        return
    facts = _module(report, node)
    options.print_json(facts) if json else options.say(module_text(facts))


def _node(report: Report, name: str) -> Node | None:
    """The node of that name, or the one that makes the value of that name."""
    graph = report.graph
    return graph.nodes.get(name) or (graph.producer(name) if name in graph.values else None)


def _module(report: Report, name: str) -> dict[str, Any]:
    """Facts of the module; a dot at the end tells a module from a node of the same name."""
    from mpcompile.report.modules import module_facts, module_paths

    if facts := module_facts(report, name.removesuffix(".")):
        return facts
    near = suggest(name, [*report.graph.nodes, *module_paths(report)])
    raise UsageError("MP806", f"the graph has no node or module {name!r}", try_=near)


def node_facts(report: Report, node: Node) -> dict[str, Any]:
    """All that is known of one node: its row, its rule, what it reads and who reads it, and what each choice costs."""
    from mpcompile.report.modules import inside
    from mpcompile.report.neighbours import gives_of, reads_of

    graph = report.graph
    row = next(
        (r.to_dict() for r in report.nodes if r.id == node.id), {"id": node.id, "op": node.op, "reason": node.reason}
    )
    row = {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}
    within = inside(node.id)
    return {
        "node": row, "rule": _rule(report, node), "reads": reads_of(graph, node), "gives": gives_of(graph, node),
        "cost": _choices(report, node), "module_too": any(within(one.module) for one in report.nodes),
    }  # fmt: skip


def _rule(report: Report, node: Node) -> dict[str, Any]:
    from mpcompile.rules import rules_for

    rule = rules_for("onnx" if report.source == "onnx" else "aten").get(node.op)
    if rule is None:
        return {"kind": "", "verdict": "fp32", "why": "no rule: mpcompile.rules.register() teaches one"}
    return {"kind": rule.kind.name, "verdict": rule.verdict_for(_low(report)), "why": rule.why()}


def _choices(report: Report, node: Node) -> dict[str, dict[str, float]]:
    """What either precision costs: seconds of the node's work, bytes of its results, and the plan with it alone so."""
    from mpcompile.cost import CostModel, device
    from mpcompile.report.costs import Estimate

    low = _low(report)
    if node.precision not in (low, "fp32"):
        return {}
    model = CostModel(report.graph, device(report.device), low, report.source != "onnx")
    estimate = Estimate.of(report)
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
    from mpcompile.report.quantities import seconds

    lines = []
    for left, right in zip(operands[::2], operands[1::2], strict=True):
        how = " and ".join(
            f"{one['operand']} as {one['format']}" + (f" (transposed, {one['scale']})" if one["transposed"] else "")
            for one in (left, right)
        )
        fast = seconds(left["seconds_fp8"]) if left["seconds_fp8"] is not None else "not here"
        lines.append(f"  {left['step']}: {how}; BF16 {seconds(left['seconds_low'])}, FP8 with copies of its own {fast}: "
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
    lines += [f"  reads:   {one['says']}" for one in facts["reads"]]
    lines += [f"  gives:   {one['says']}" for one in facts["gives"]]
    lines += _cost_lines(facts["cost"], row.get("precision"))
    lines += _reads_of(row.get("operands") or [])
    lines += [f"  to change it: {how}"] if (how := _change(row)) else []
    if facts["module_too"]:
        lines.append(f"  {row['id']} is a module, too: mpcompile explain TARGET {row['id']}.")
    return "\n".join(lines)


def _cost_lines(choices: dict[str, dict[str, float]], now: str | None) -> list[str]:
    from mpcompile.report.quantities import seconds, size

    lines = []
    for precision, cost in choices.items():
        work = f"{seconds(cost['seconds'])} of matrix work, " if any(c["seconds"] for c in choices.values()) else ""
        here = " (the plan)" if precision == now else ""
        lines.append(
            f"  as {precision}: {size(cost['bytes'])} of results, {work}the whole {seconds(cost['plan'])}{here}"
        )
    return [*lines, "           estimates; the whole with this node alone changed, its casts included"] if lines else []


def _change(row: dict[str, Any]) -> str:
    """What to write for the other precision; "" where nothing is decided."""
    name, now = row["id"], row.get("precision")
    if now not in ("fp16", "bf16", "fp32"):
        return ""
    if row["decided_by"] == "override":
        return f"take out the override that names it ({row['reason']})"
    if row["decided_by"] == "user-cast":
        return f"the program itself names the type{', at ' + row['source'] if row['source'] else ''}"
    if now == "fp32":
        return f"--low '{name}', or mpcompile(model, low=['{name}'])"
    return f"--keep-fp32 '{name}', or mpcompile(model, keep_fp32=['{name}'])"
