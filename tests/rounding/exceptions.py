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


FLIPPED = (
    "a unit whose input is near zero changes its side with the last rounding: its gradient goes as a whole, by luck"
)
CANCELS = "the gradient of a shift that the loss does not see: both sides are what roundings leave of zero, by luck"
EXCEPTIONS: tuple[Bound, ...] = (
    Bound("language/torch_s_own[*", 24, f"a low residual stream, and ReLU: {FLIPPED}"),
    Bound("restoration/residual[total-variation]*", 8, f"absolute differences: {FLIPPED}"),
    Bound("metric/embedding_losses[contrastive]*", 16, CANCELS),
    Bound("metric/distances[rbf]*", 24, CANCELS),
    Bound(
        "signal/spectral_losses[cepstrum]*",
        6,
        "a logarithm of a spectrum's zeros: their roundings are drawn out to the loss",
    ),
    Bound(
        "graphs/molecule[painn]*", 12, "squares of sums that cancel: the output has lost digits before they are taken"
    ),
)
# One run of these is a matter of luck: the median over draws of weights and batch holds the usual bound.
DRAWS = 5
DRAWN: dict[str, str] = {
    "detection/detr*": f"absolute differences and ReLU: {FLIPPED}",
}
# Known to be wrong and not yet mended, by run. One that holds its bound fails its test, so that its row goes.
OPEN: dict[str, str] = {}


def bound_of(name: str, usual: float) -> float:
    """How many roundings a run may lose: those of its exception, or the usual ones."""
    return max((one.roundings for one in EXCEPTIONS if fnmatch.fnmatchcase(name, _literal(one.glob))), default=usual)


def _literal(glob: str) -> str:
    """Case names have brackets, which are no sets of characters here."""
    return glob.replace("[", "[[]")


def draws_of(name: str) -> int:
    """How many draws of weights and batch a run is judged by."""
    return DRAWS if any(fnmatch.fnmatchcase(name, _literal(glob)) for glob in DRAWN) else 1


def is_open(name: str) -> bool:
    """True for a run that is known to be wrong."""
    return any(fnmatch.fnmatchcase(name, _literal(glob)) for glob in OPEN)


def unused(names: list[str]) -> list[str]:
    """Globs of exceptions that match no run."""
    globs = [*(one.glob for one in EXCEPTIONS), *DRAWN, *OPEN]
    return [glob for glob in globs if not fnmatch.filter(names, _literal(glob))]
