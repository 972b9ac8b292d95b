"""The reference pages, made from the source: ``python -m mpcompile.tools.reference DIRECTORY``.

What the rules, passes, error codes and verbs are is said once, where they are; a test fails when a page is stale.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from mpcompile import errors
from mpcompile.errors import MPCompileError
from mpcompile.recipes import one_of_each
from mpcompile.rules import Rule, rules_for

MADE = "<!-- made by `make docs`; do not edit -->\n"
ROOMS = {
    "1": "Capture",
    "2": "Policies, rules and overrides",
    "3": "Assignment",
    "4": "Casts and laws",
    "5": "Training",
    "6": "ONNX",
    "7": "Run time",
    "8": "Command line",
}


def pages() -> dict[str, str]:
    """File name -> text."""
    return {
        "errors.md": errors_page(),
        "passes.md": passes_page(),
        "rules-aten.md": rules_page("aten"),
        "rules-onnx.md": rules_page("onnx"),
        "cli.md": cli_page(),
    }


def errors_page() -> str:
    lines = ["# Errors", "", MADE, "`mpcompile explain CODE` prints the same. All are `mpcompile.MPCompileError`.", ""]
    families = {
        kind.__doc__.partition(":")[0]: kind.__name__ for kind in MPCompileError.__subclasses__() if kind.__doc__
    }
    room = ""
    for one in errors.pages().values():
        if one.code[2] != room:
            room = one.code[2]
            lines += [f"## {ROOMS[room]} (`{families[f'MP{room}xx']}`)", ""]
        lines += [f"### {one.code}: {one.title}", "", one.cause, "", f"*Try:* {one.remedy}", ""]
    return "\n".join(lines).rstrip() + "\n"


def passes_page() -> str:
    how = "In the order in which they run. `mpcompile inspect TARGET --after PASS` shows the graph after one."
    lines = ["# Passes", "", MADE, how, ""]
    for one in one_of_each():
        kind = type(one)
        said = sys.modules[kind.__module__].__doc__ if one.name != "verify" else kind.__doc__
        lines += [f"## {one.name}", "", (said or "").strip(), ""]
        lines += [*options, ""] if (options := list(_options(kind))) else []
    return "\n".join(lines).rstrip() + "\n"


def _options(kind: Any) -> Iterator[str]:
    for option in fields(kind):
        yield f"- `{option.name}`: `{option.type}`"


def rules_page(source: str) -> str:
    """Every kind, and the operations of each."""
    rules = rules_for(source)
    by_kind: dict[str, list[Rule]] = defaultdict(list)
    for rule in rules:
        by_kind[rule.kind.name].append(rule)
    lines = [f"# Rules: {source}", "", MADE]
    count = f"{sum(map(len, by_kind.values()))} operations of {len(by_kind)} kinds."
    lines += [f"{count} An operation without a rule is FP32 and listed as unknown.", ""]
    lines += ["| kind | verdict | operations | why |", "|---|---|---|---|"]
    lines += [f"| [{name}](#{name}) | {_verdict(rules.kinds[name])} | {len(rows)} | {rules.kinds[name].reason} |"
              for name, rows in sorted(by_kind.items())]  # fmt: skip
    for name, rows in sorted(by_kind.items()):
        plain = [f"`{row.op}`" for row in rows if not _special(row)]
        lines += ["", f"## {name}", "", ", ".join(plain)] if plain else ["", f"## {name}"]
        special = [row for row in rows if _special(row)]
        lines += ["", *(f"- `{row.op}`: {_special(row)}" for row in special)] if special else []
    return "\n".join(lines) + "\n"


def _verdict(kind: Any) -> str:
    other = "".join(f"; {verdict} in {low}" for low, verdict in kind.per_precision.items())
    return f"{kind.verdict}{other}"


def _special(rule: Rule) -> str:
    """What a row says beyond its kind."""
    facts = []
    if rule.verdict:
        facts.append(f"{rule.verdict}: {rule.why()}")
    elif rule.reason:
        facts.append(rule.reason)
    for label, slots in (("FP32 operands", rule.fp32_operands), ("operands as they come", rule.any_operands),
                         ("FP32 results", rule.fp32_results)):  # fmt: skip
        if slots:
            facts.append(f"{label}: {', '.join(map(str, slots))}")
    return "; ".join(facts)


def cli_page() -> str:
    import typer

    from mpcompile.tools.main import app

    group: Any = typer.main.get_command(app)
    lines = ["# Command line", "", MADE]
    lines += ["A model is `FILE.py:FACTORY`, `PACKAGE.MODULE:FACTORY` or `MODEL.onnx`.", ""]
    lines += [
        "Exit codes: 0 done, 1 what was asked about is not so (a diff, a failed check), 2 bad usage or input.",
        "",
    ]
    for name, verb in group.commands.items():
        arguments = " ".join(p.metavar or p.name.upper() for p in verb.params if p.param_type_name == "argument")
        lines += [f"## mpcompile {name} {arguments}".rstrip(), "", verb.help or "", ""]
        lines += [_option(p) for p in verb.params if p.param_type_name == "option" and p.name != "help"] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _option(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    usual = option.default
    shown = f" (`{usual}`)" if usual not in (None, "", False, True) and not callable(usual) else ""
    return f"- {names}{shown}: {option.help}"


def main() -> None:
    """Write every page into the directory that the command line names."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
