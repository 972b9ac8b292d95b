"""Random trainings against plain torch: equal within rounding, or refused by code; and the fuzzer itself finds what is planted."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fuzz import optimizers, sample
from fuzz.events import EVENTS
from fuzz.known import KNOWN
from fuzz.models import LAYERS, LOSSES, STARTS
from fuzz.parts import Case, Part
from fuzz.run import BAD, attempt, session
from fuzz.script import script
from fuzz.shrink import shrink

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
# The default run is the same cases on a fast and on a slow machine; `make fuzz` goes on until its time is up.
MOST = 1 << 30 if "FUZZ_SECONDS" in os.environ else 24
FIRST = int(os.environ.get("FUZZ_SEED", "0"))


def test_random_trainings_are_plain_torchs_or_refused(tmp_path: Path) -> None:
    found = session(SECONDS, FIRST, out=tmp_path, without=frozenset(KNOWN), count=MOST)
    print(found)
    assert not found.failures, "\n\n".join(
        f"{what}: {where}\n{script(case)}" for what, case, where in found.failures[:3]
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["step", "dropin"])
def test_every_part_alone(how: str, tmp_path: Path) -> None:
    cases = (case for case in sample.each(how) if not set(case.parts()) & set(KNOWN))
    found = session(3600, out=tmp_path, cases=cases)
    assert not found.failures, [(what, case.parts(), where) for what, case, where in found.failures]


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_to_fail_still_does(name: str) -> None:
    """A part that no seed of a few makes fail has been mended: take it off the list."""
    drawn = (sample.case(seed) for seed in range(20_000))
    alone = [case for how in ("step", "dropin") for case in sample.each(how) if name in case.parts()]
    found = [sample.case(int(seed)) for seed in re.findall(r"seed (\d+)", KNOWN[name])]
    cases = [*alone, *found, *itertools.islice((case for case in drawn if name in case.parts()), 8)]
    assert any(attempt(case)[0] in BAD for case in cases)


def test_the_known_are_parts() -> None:
    assert set(KNOWN) <= {part.name for part in (*LAYERS, *LOSSES, *STARTS, *EVENTS)}


def test_a_seed_is_a_case() -> None:
    assert [sample.case(seed) for seed in range(50)] == [sample.case(seed) for seed in range(50)]
    assert len({script(sample.case(seed)) for seed in range(50)}) == 50


def test_every_part_is_drawn_and_every_script_compiles() -> None:
    names = set[str]()
    for seed in range(4000):
        case = sample.case(seed)
        names.update(case.parts())
        if seed < 300:
            compile(script(case), "case", "exec")
    assert names >= {part.name for part in (*LAYERS, *LOSSES, *STARTS, *EVENTS)}


def test_what_plain_torch_cannot_run_is_rare() -> None:
    """A case that plain torch refuses judges nothing: a slip in the fuzzer would make all of them so."""
    found = session(600, 100, policy="fp32", smaller=False, count=3, without=frozenset(KNOWN))
    assert found.counts["invalid"] <= 1, found


PLANTED = Part("planted", run="if w.how == 'step': linear(w, 0).weight.data[0, 0] += 1e-3")


def planted(seed: int) -> Case:
    """A case in which one number of one weight is changed for the step alone."""
    parts = [part for part in LAYERS if part.name in ("linear", "layer norm", "gelu")]
    events = tuple(event for event in EVENTS if event.name in ("learning rate", "evaluate"))
    return Case(seed, tuple(parts), STARTS[1], LOSSES[0], optimizers.OPTIMIZERS[1].format(groups="m.parameters()", lr=0.1),
                events=((1, events[0]), (1, PLANTED), (2, events[1])), clip=5.0)  # fmt: skip


@pytest.mark.slow
def test_a_planted_difference_is_found_and_shrunk_to_a_script(tmp_path: Path) -> None:
    what, distance, _ = attempt(planted(3))
    assert what == "differs"
    assert distance > 1e-5
    small = shrink(planted(3), lambda case: attempt(case)[0] == "differs", most=12)
    assert [event.name for _, event in small.events] == ["planted"]
    assert not small.layers
    path = tmp_path / "small.py"
    path.write_text(script(small), encoding="utf-8")
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": root})  # fmt: skip
    assert done.stdout.startswith("differs"), done.stdout + done.stderr


def test_without_the_planted_difference_it_is_the_same() -> None:
    case = planted(3)
    assert attempt(replace(case, events=()))[0] == "same"


def test_a_low_case_that_runs_in_fp32_would_not_pass_for_one_that_is_off() -> None:
    off = Part("off", run="for p in w.m.parameters(): p.data.mul_(1.5 if w.how == 'step' else 1.0)")
    case = replace(planted(1), policy="bf16,device=free-low", events=())
    assert attempt(case)[0] == "same"
    assert attempt(replace(case, events=((1, off),)))[0] in BAD
