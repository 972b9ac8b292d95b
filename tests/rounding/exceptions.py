"""What is worse than the yardstick by design: each row has its bound, in roundings, and its reason."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """A wider bound for the cases that a glob names.

    Fields:
      glob: matches "domain/case low way".
      roundings: of the low type, beside the 1.5 times of autocast's distance; two where nothing is listed.
      reason: why it is so.
    """

    glob: str
    roundings: float
    reason: str


EXCEPTIONS: tuple[Bound, ...] = ()


def bound_of(name: str, usual: float) -> float:
    """How many roundings a run may lose: those of its exception, or the usual ones."""
    return max((one.roundings for one in EXCEPTIONS if fnmatch.fnmatchcase(name, _literal(one.glob))), default=usual)


def _literal(glob: str) -> str:
    """Case names have brackets, which are no sets of characters here."""
    return glob.replace("[", "[[]")


def unused(names: list[str]) -> list[str]:
    """Globs of exceptions that match no run."""
    return [one.glob for one in EXCEPTIONS if not fnmatch.filter(names, _literal(one.glob))]
