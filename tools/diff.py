"""`mpcompile diff`: what two plans decide differently."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcompile.errors import UsageError
from mpcompile.tools import options, target


def diff(
    a: Annotated[str, typer.Argument(help="A model, or a report.json")],
    b: Annotated[str, typer.Argument(help="A model, or a report.json")],
    policy: options.Policy = "auto",
    policy_b: Annotated[str, typer.Option(help="The policy of B, when it is another.")] = "",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the difference as one offline page.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Compare two plans node by node. Exit code 1 when they differ."""
    from mpcompile.report.difference import difference, write_difference

    options.place(html)
    for what, chosen in ((a, policy), (b, policy_b or policy)):
        target.existing(what) if what.endswith(".json") else target.usable(what, chosen)
    first, second = _report(a, policy), _report(b, policy_b or policy)
    found = difference(first, second)
    if html:
        write_difference(first, second, html, (a, b))
    same = not (found["changed"] or found["only_a"] or found["only_b"])
    options.print_json({"same": same, **found}) if json else options.say(_text(found, same))
    if html and not json:
        options.say(f"written: {html}")
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
