"""A case as a script that stands alone: the model, the optimizer, the events, and the text of kit.py before them."""

from __future__ import annotations

import linecache
import sys
import types
from pathlib import Path

from fuzz.parts import Case

KIT = Path(__file__).with_name("kit.py").read_text(encoding="utf-8")
LAST = "\nif __name__ == '__main__':\n    print(*verdict())\n"


def source(case: Case) -> str:
    """What the case itself says, without the kit."""
    numbered = [layer.at(number) for number, layer in enumerate(case.layers)]
    body = [case.start, *numbered, case.loss]
    init = _indented([part.init for part in body], 8)
    forward = _indented([part.run for part in body], 8)
    return f"""
SEED, HOW, POLICY, BACKEND = {case.seed}, {case.how!r}, {case.policy!r}, {case.backend!r}
CLIP, WINDOW, SIZES, MODES = {case.clip}, {case.window}, {list(case.sizes)}, {list(case.modes)}
STATES = {case.states!r}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
{init}

    def forward(self, x, y, f, t):
{forward}


def optimizer(m):
    return {case.optimizer}


def scheduler(o):
    return {case.scheduler}

{_events(case)}
"""


def _indented(texts: list[str], width: int) -> str:
    lines = [line for text in texts for line in text.splitlines()]
    return "\n".join(" " * width + line for line in lines if line) or " " * width + "pass"


def _events(case: Case) -> str:
    made, table = list[str](), dict[int, list[str]]()
    for number, (step, event) in enumerate(case.events):
        made.append(f"\ndef event{number}(w):  # {event.name}\n{_indented([event.run], 4)}\n")
        table.setdefault(step, []).append(f"event{number}")
    rows = ", ".join(f"{step}: [{', '.join(names)}]" for step, names in sorted(table.items()))
    return "\n".join([*made, f"\nEVENTS = {{{rows}}}"])


def script(case: Case) -> str:
    return KIT + "\n\n# ---- the case ----\n" + source(case) + LAST


def run(case: Case) -> tuple[str, float, str]:
    """Run the case's own script in this process: ("same" | "refused" | "invalid" | "differs" | "crash", distance, what)."""
    text, name = script(case), f"fuzz_case_{case.seed}"
    # Dynamo imports the module of what it traces, and torch.export reads the lines of it.
    module = sys.modules[name] = types.ModuleType(name)
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    try:
        exec(compile(text, file, "exec"), module.__dict__)  # made from the texts of this folder alone
        result: tuple[str, float, str] = module.verdict()
        return result
    finally:
        del sys.modules[name], linecache.cache[file]
