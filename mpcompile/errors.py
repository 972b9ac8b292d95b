"""One family of errors, with a code by room.

A message says what happened, where, why, and what to try.  The long form of each code is a page of `errors.toml`, which
``mpcompile explain CODE`` prints and the reference is generated from.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

# Control characters, those of C1 and the marks that turn the order of text: a terminal obeys them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` with what a terminal would obey written as escapes; line breaks and tabs stay.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class MPCompileError(Exception):
    """What went wrong, where in the user's own file, why, and what to try.

    >>> print(MPCompileError("MP203", "the pattern 'decodr.*' matches nothing", try_="decoder.*"))
    MP203: the pattern 'decodr.*' matches nothing
      try:   decoder.*
    """

    def __init__(self, code: str, what: str, *, where: str = "", why: str = "", try_: str = "") -> None:
        self.code, self.what, self.where, self.why, self.try_ = code, what, where, why, try_
        lines = [f"{code}: {what}"]
        lines += [
            f"  {label}{text}" for label, text in (("where: ", where), ("why:   ", why), ("try:   ", try_)) if text
        ]
        super().__init__(printable("\n".join(lines)))

    def to_dict(self) -> dict[str, str]:
        """The same as plain data: code, what, where, why, try."""
        return {"code": self.code, "what": self.what, "where": self.where, "why": self.why, "try": self.try_}


class CaptureError(MPCompileError):
    """MP1xx: the model could not be read as a graph."""


class RuleError(MPCompileError):
    """MP2xx: policies, rules and overrides."""


class AssignError(MPCompileError):
    """MP3xx: no assignment satisfies the constraints."""


class LawError(MPCompileError):
    """MP4xx: a pass left a graph that breaks a law."""


class TrainingError(MPCompileError):
    """MP5xx: the training step, its optimizer, its state."""


class OnnxError(MPCompileError):
    """MP6xx: ONNX models in and out."""


class RuntimeFailure(MPCompileError):
    """MP7xx: a compiled graph could not be run."""


class UsageError(MPCompileError):
    """MP8xx: the command line."""


@dataclass(frozen=True)
class Page:
    """The reference page of one code."""

    code: str
    title: str
    cause: str
    remedy: str


@functools.cache
def pages() -> dict[str, Page]:
    """Code -> page, sorted: read from `errors.toml` when somebody asks."""
    # Nobody pays for the reader who meets no error.
    import tomllib
    from importlib import resources

    rows = tomllib.loads(resources.files("mpcompile").joinpath("errors.toml").read_text(encoding="utf-8"))
    return {code: Page(code, **row) for code, row in sorted(rows.items())}


def suggest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Near names of `word`, for a message: "'a', 'b'", or "" when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return ", ".join(repr(name) for name in near)
