"""Delta debugging and checks in words: right, small, and few trials."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.bisection import Search, Trial, minimal
from mpcompile.condition import Condition
from mpcompile.errors import UsageError


@given(st.integers(1, 200), st.data())
def test_exactly_the_culprits_are_found(count: int, data: st.DataObject) -> None:
    units = [f"n{i}" for i in range(count)]
    culprits = data.draw(st.sets(st.sampled_from(units), max_size=4))
    tried = list[frozenset[str]]()

    def passes(kept: frozenset[str]) -> bool:
        tried.append(kept)
        return culprits <= kept

    found = minimal(units, passes)
    assert found is not None
    assert set(found) == culprits
    assert found == sorted(found, key=units.index)
    depth = math.ceil(math.log2(count)) + 1
    assert len(tried) <= 2 + 2 * len(culprits) * depth + len(culprits)


def test_one_culprit_among_a_thousand_costs_some_twenty_trials() -> None:
    tried = 0

    def passes(kept: frozenset[str]) -> bool:
        nonlocal tried
        tried += 1
        return "617" in kept

    assert minimal([str(i) for i in range(1000)], passes) == ["617"]
    assert tried <= 22


def test_either_of_two_is_enough() -> None:
    found = minimal("abcdefgh", lambda kept: bool({"b", "g"} & kept))
    assert found in (["b"], ["g"])


def test_fp32_that_harms_elsewhere_leaves_a_set_that_passes() -> None:
    def passes(kept: frozenset[str]) -> bool:
        return ("c" in kept and not {"a", "b"} <= kept) or len(kept) == 4

    found = minimal("abcd", passes)
    assert found is None or passes(frozenset(found))


UNITS = {"enc.0": ["n0", "n1"], "enc.1": ["n2", "n3", "n4"], "": ["n5"], "head": ["n6"]}


def search(culprits: set[str], **options: object) -> Search:
    return Search(UNITS, lambda kept: (culprits <= kept, {"off": float(len(culprits - kept))}), **options)  # type: ignore[arg-type]


def test_modules_come_first_and_whole_ones_are_named() -> None:
    one = search({"n3"})
    assert one.run() == ["n3"]
    assert one.named(["n3"]) == ["n3"]
    assert one.named(["n2", "n3", "n4", "n5"]) == ["enc.1", "n5"]
    assert one.named(["n6"]) == ["head"]
    several = search({"n1", "n5", "n6"})
    assert several.run() == ["n1", "n5", "n6"]
    assert search(set()).run() == []
    assert search({"elsewhere"}).run() is None


def test_a_search_goes_on_from_what_was_tried() -> None:
    seen = list[Trial]()
    first = search({"n3"}, on_trial=seen.append)
    first.run()
    again = list[Trial]()
    half = {frozenset(trial.kept): trial for trial in seen[: len(seen) // 2]}
    second = search({"n3"}, trials=dict(half), on_trial=again.append)
    assert second.run() == ["n3"]
    assert [trial.kept for trial in again] == [trial.kept for trial in seen[len(seen) // 2 :]]
    assert len({trial.kept for trial in seen}) == len(seen)


@pytest.mark.parametrize(
    ("text", "measured", "holds"),
    [
        ("loss<0.01", {"loss": 0.001}, True),
        ("loss < 1e-2 and finite", {"loss": 0.001, "finite": 0.0}, False),
        ("not loss > 0.5", {"loss": math.inf}, False),
        ("0 <= loss < 0.1 or loss == -1", {"loss": 0.05}, True),
        ("loss < 0.1", {"loss": math.nan}, False),
    ],
)
def test_checks_in_words(text: str, measured: dict[str, float], holds: bool) -> None:
    assert Condition.parse(text, ["loss", "finite"]).holds(measured) is holds


@pytest.mark.parametrize("text", ["", "loss <", "los < 1", "__import__('os')", "loss.real < 1", "1 < 2", "loss < 'a'",
                                  "loss[0] < 1", "(lambda: 1)() < loss", "loss is 1", "loss in 1"])  # fmt: skip
def test_what_is_no_check_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="MP812"):
        Condition.parse(text, ["loss", "finite"])
