"""`mpcompile diff`: what two plans decide differently."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcompile.errors import UsageError, page
from mpcompile.tools import options, target

page(
    "MP807",
    "A file that is not a report",
    "`mpcompile diff` reads models, and reports as `inspect --json` writes them.",
    "mpcompile inspect TARGET --json > report.json",
)

# What makes two decisions different; names, bytes and lines may move without one.
_DECIDED = ("op", "verdict", "precision", "decided_by", "reason")


def diff(
    a: Annotated[str, typer.Argument(help="A model, or a report.json")],
    b: Annotated[str, typer.Argument(help="A model, or a report.json")],
    policy: options.Policy = "auto",
    policy_b: Annotated[str, typer.Option(help="The policy of B, when it is another.")] = "",
    json: options.Json = False,
) -> None:
    """Compare two plans node by node. Exit code 1 when they differ."""
    first, second = _report(a, policy), _report(b, policy_b or policy)
    found = compare(first, second)
    same = not (found["changed"] or found["only_a"] or found["only_b"])
    options.print_json({"same": same, **found}) if json else options.say(_text(found, same))
    if not same:
        raise typer.Exit(1)


def _report(what: str, policy: str) -> dict[str, Any]:
    if not what.endswith(".json"):
        return target.study(what, policy).report.to_dict()
    try:
        data = jsonlib.loads(Path(target.existing(what)).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError("MP807", f"{what} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != "mpcompile.report/1":
        raise UsageError("MP807", f"{what} is not a report of schema mpcompile.report/1")
    return data


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Nodes that only one report has, nodes decided differently, and both counts of casts."""
    left, right = ({node["id"]: node for node in report["nodes"]} for report in (a, b))
    changed = [
        {"id": name, "a": _decision(left[name]), "b": _decision(right[name])}
        for name in left
        if name in right and _decision(left[name]) != _decision(right[name])
    ]
    return {
        "changed": changed,
        "only_a": [name for name in left if name not in right],
        "only_b": [name for name in right if name not in left],
        "casts": [a["summary"]["casts"], b["summary"]["casts"]],
        "policy": [a["policy"], b["policy"]],
    }


def _decision(node: dict[str, Any]) -> dict[str, str]:
    return {key: node[key] for key in _DECIDED}


def _text(found: dict[str, Any], same: bool) -> str:
    if same:
        return "the plans are the same"
    lines = [
        f"a: {found['policy'][0]}, {found['casts'][0]} casts",
        f"b: {found['policy'][1]}, {found['casts'][1]} casts",
    ]
    lines += [f"- {name}" for name in found["only_a"]] + [f"+ {name}" for name in found["only_b"]]
    for one in found["changed"]:
        old, new = one["a"], one["b"]
        lines.append(f"~ {one['id']} ({new['op']}): {old['precision']} → {new['precision']}")
        said = [f"{side['verdict']} by {side['decided_by']}: {side['reason']}" for side in (old, new)]
        lines += [f"    a: {said[0]}", f"    b: {said[1]}"] if said[0] != said[1] else []
    return "\n".join(lines)
