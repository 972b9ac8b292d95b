"""The smallest set that makes a check pass: delta debugging by halves, in two levels, with everything tried remembered.

It knows neither graphs nor models: units are words, and the check is a function of a set of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Passes = Callable[[frozenset[str]], bool]


def minimal(units: Sequence[str], passes: Passes, held: frozenset[str] = frozenset()) -> list[str] | None:
    """A minimal set of `units` with which, and with `held`, the check passes; None when even all of them do not do.

    One culprit among n costs about 2 log2(n) checks, k of them k times as many at most. Minimal means: without any one of
    them the check fails (where more FP32 never harms).

    >>> minimal("abcdefgh", lambda kept: {"c", "g"} <= kept)
    ['c', 'g']
    >>> minimal("abc", lambda kept: True), minimal("abc", lambda kept: False)
    ([], None)
    """
    if passes(held):
        return []
    if not passes(held.union(units)):
        return None
    found = set(_explain(list(units), passes, held, False))
    kept = [unit for unit in units if unit in found]
    # Where FP32 in one place harms another, halves can mislead: what the whole set does not need goes.
    for unit in list(kept):
        rest = [one for one in kept if one != unit]
        if len(kept) > 1 and passes(held.union(rest)):
            kept = rest
    return kept


def _explain(units: list[str], passes: Passes, held: frozenset[str], more: bool) -> list[str]:
    """QuickXplain: the part of `units` that is needed beside `held`, which fails unless `more` was just added to it."""
    if more and passes(held):
        return []
    if len(units) == 1:
        return units
    half = len(units) // 2
    first, second = units[:half], units[half:]
    late = _explain(second, passes, held.union(first), True)
    early = _explain(first, passes, held.union(late), bool(late))
    return early + late


@dataclass(frozen=True)
class Trial:
    """One check: what was kept in FP32, whether it passed, what was measured, in how many seconds."""

    kept: tuple[str, ...]
    passed: bool
    measured: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Search:
    """The search over modules, then over the nodes of those found.

    Fields:
      units: module -> the nodes in it that run low.
      check: (nodes kept in FP32) -> (passed, what was measured).
      trials: what was tried so far, by what was kept; give those of an earlier run to go on with it.
      on_trial: called with each new trial.
    """

    units: Mapping[str, Sequence[str]]
    check: Callable[[frozenset[str]], tuple[bool, Mapping[str, float]]]
    trials: dict[frozenset[str], Trial] = field(default_factory=dict)
    on_trial: Callable[[Trial], Any] = lambda _: None

    def passes(self, nodes: frozenset[str]) -> bool:
        if nodes not in self.trials:
            start = time.perf_counter()
            passed, measured = self.check(nodes)
            trial = Trial(tuple(sorted(nodes)), passed, dict(measured), time.perf_counter() - start)
            self.trials[nodes] = trial
            self.on_trial(trial)
        return self.trials[nodes].passed

    def run(self) -> list[str] | None:
        """A minimal set of nodes; [] when nothing is needed, None when even all of FP32 does not do."""
        modules = minimal(list(self.units), lambda kept: self.passes(self.nodes_of(kept)))
        if not modules:
            return modules
        return minimal([node for module in modules for node in self.units[module]], self.passes)

    def nodes_of(self, modules: Iterable[str]) -> frozenset[str]:
        return frozenset(node for module in modules for node in self.units[module])

    def named(self, nodes: Sequence[str]) -> list[str]:
        """Globs for `keep_fp32`: a module's path where all that runs low in it is kept, else the nodes."""
        kept, found = set(nodes), list[str]()
        for module, members in self.units.items():
            if module and kept.issuperset(members):
                found.append(module)
            else:
                found += [node for node in members if node in kept]
        return found
