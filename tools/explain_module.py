"""A module's facts (`mpcompile.report.modules`) as text."""

from __future__ import annotations

from typing import Any

# Casts of each side of the border that are named; of more the sum is.
_NAMED = 4
_SIDES = {
    "in": "comes in through {}",
    "out": "goes out through {}",
    "inside": "inside: {}",
    "weights": "weights: {}, made when a master changes",
}


def module_text(facts: dict[str, Any]) -> str:
    """Counts and bytes of each precision, the main reasons, the casts at the border, both totals, what to write."""
    from mpcompile.report.quantities import counted, seconds

    alike = facts["modules"]
    several = f" ({len(alike)} modules)" if len(alike) > 1 else ""
    lines = [f"module {facts['module']}{several}: {counted(facts['nodes'], 'node')}"]
    lines += [f"  {name + ':':<8} {_amounts(one)}" for name, one in facts["precisions"].items()]
    lines += [
        f"  {one['precision']} because: {one['reason']} ({counted(one['nodes'], 'node')})" for one in facts["why"]
    ]
    lines += [f"  hazard:  {one['node']}: {one['reason']}" for one in facts["hazards"]]
    lines += _casts(facts["casts"])
    cost = facts["cost"]
    lines += [f"  all {name}: the whole {seconds(taken)} (the plan: {seconds(cost['plan'])})"
              for name, taken in cost.items() if name != "plan"]  # fmt: skip
    return "\n".join([*lines, *_change(facts)])


def _amounts(sums: dict[str, float]) -> str:
    from mpcompile.report.quantities import counted, seconds, size

    said = [counted(int(sums["nodes"]), "node"), f"{size(sums['bytes'])} of results"]
    said += [f"{sums['flops']:.3g} FLOPs"] if sums["flops"] else []
    return ", ".join([*said, f"about {seconds(sums['seconds'])}"])


def _casts(sides: dict[str, list[dict[str, Any]]]) -> list[str]:
    from mpcompile.report.quantities import counted, size

    lines = []
    for side, form in _SIDES.items():
        if casts := sides[side]:
            whole = f"{counted(len(casts), 'cast')} of {size(sum(one['bytes'] for one in casts))}"
            lines.append(f"  casts:   {form.format(whole)}")
            named = casts[:_NAMED] if side != "weights" else []
            lines += [f"           `{one['value']}` {one['from']} → {one['to']}, {size(one['bytes'])}" for one in named]
    return lines or ["  casts:   none"]


def _change(facts: dict[str, Any]) -> list[str]:
    """The options that move the module as a whole; each module by name where the pattern is no glob of the overrides."""
    names = facts["modules"]
    globs = [facts["module"]] if "{" not in facts["module"] else names
    lines = []
    for option, word, other in (("--keep-fp32", "keep_fp32", {"fp16", "bf16"}), ("--low", "low", {"fp32"})):
        if other & set(facts["precisions"]):
            shell = " ".join(f"{option} '{one}'" for one in globs)
            lines.append(f"  to change it: {shell}, or mpcompile(model, {word}={globs!r})")
    return lines
