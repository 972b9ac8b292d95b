"""Run cases until the time is up; write a small script for each that fails.

python -m fuzz.run --seconds 3600 --first 0 --out found/     (with tests/ on the path)
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fuzz import sample
from fuzz.known import KNOWN
from fuzz.parts import Case
from fuzz.script import run, script
from fuzz.shrink import shrink

BAD = ("differs", "crash")


@dataclass
class Found:
    """Counts of a session, and the cases that failed: (what came out, the shrunk case, what differs)."""

    counts: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, Case, str]] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.most_common())
        return f"{self.counts.total()} cases: {counts}; refusals {dict(self.codes.most_common())}"


# What torch writes to the screen of an export whose size is 1.
logging.getLogger("torch").setLevel(logging.ERROR)


def attempt(case: Case) -> tuple[str, float, str]:
    """Run one case and leave nothing of it behind."""
    said = io.StringIO()  # torch prints the graph that it cannot export
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return run(case)
    finally:
        torch._dynamo.reset()
        gc.collect()


def session(seconds: float, first: int = 0, policy: str = "", without: frozenset[str] = frozenset(), *,
            smaller: bool = True, out: Path | None = None, loud: bool = False, count: int = 1 << 30,
            cases: Iterator[Case] | None = None) -> Found:  # fmt: skip
    """Run `cases`, or those of the seeds from `first` on, until the time is up or `count` have run."""
    found, end, seed = Found(), time.monotonic() + seconds, first
    while time.monotonic() < end and seed < first + count:
        case = sample.case(seed, policy, without) if cases is None else next(cases, None)
        if case is None:
            break
        start = time.monotonic()
        what, distance, where = attempt(case)
        found.counts[what] += 1
        if what == "refused":
            found.codes[(re.findall(r"MP\d+", where) or ["?"])[0]] += 1
        if loud:
            print(
                f"{seed} {what} {distance:.2g} {time.monotonic() - start:.1f}s {where[:150]!r} {case.parts()}",
                flush=True,
            )
        if what in BAD:
            if smaller:
                case = shrink(case, lambda one, what=what: attempt(one)[0] == what)
            found.failures.append((what, case, where))
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                (out / f"{seed:06d}_{what}_{_word(case)}.py").write_text(script(case), encoding="utf-8")
        seed += 1
    return found


def _word(case: Case) -> str:
    return re.sub(r"\W+", "-", case.parts()[-1])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1 << 30)
    parser.add_argument("--policy", default="", help="fp32, or a low policy; both by default")
    parser.add_argument("--without", default="", help="names of parts to leave out, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("fuzz-found"))
    parser.add_argument("--each", choices=("step", "dropin"), help="every part alone, by this way of training")
    parser.add_argument("--skip", type=int, default=0, help="of --each, leave out so many at the start")
    parser.add_argument("--only", default="", help="of --each, the parts of these names")
    parser.add_argument("--all", action="store_true", help="what is known to fail, too")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--no-shrink", action="store_true")
    given = parser.parse_args(arguments)
    without = frozenset(word.strip() for word in given.without.split(",") if word)
    without |= frozenset() if given.all else frozenset(KNOWN)
    cases = sample.each(given.each, given.policy or "fp32") if given.each else None
    if cases is not None:
        only = {word.strip() for word in given.only.split(",") if word}
        cases = (
            case
            for case in cases
            if (only or set(case.parts())) & set(case.parts()) and not without & set(case.parts())
        )
    if cases is not None:
        cases = itertools.islice(cases, given.skip, given.skip + given.count)
    found = session(given.seconds, given.first, given.policy, without, smaller=not given.no_shrink, out=given.out,
                    loud=not given.quiet, count=given.count, cases=cases)  # fmt: skip
    print(found)
    for what, case, where in found.failures:
        print(f"{what}, seed {case.seed}: {where[:200]}; {', '.join(case.parts())}")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
