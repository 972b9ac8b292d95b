"""The pages of error codes as text: `mpcompile explain MP203`, or `MP2` for the list of those that begin so.

Who is stopped by an error wants its page at once, so nothing is imported here but the errors themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict

from mpcompile.errors import UsageError, pages, printable, suggest

_CODE = re.compile(r"(?i)mp\d*")


def is_code(word: str) -> bool:
    """True for a code, and for the beginning of one.

    >>> is_code("mp203"), is_code("MP"), is_code("model.py:make")
    (True, True, False)
    """
    return _CODE.fullmatch(word) is not None


def answer(word: str, *, as_json: bool = False) -> str:
    """The page of a code; of the beginning of codes, a line for each.

    Raises:
      UsageError: MP806.
    """
    known, code = pages(), word.upper()
    some = [known[one] for one in known if one.startswith(code)]
    if not some:
        near = suggest(code, known)
        raise UsageError("MP806", f"there is no error {code}", try_=near or "mpcompile explain MP lists them")
    if as_json:
        return json.dumps(asdict(known[code]) if code in known else [asdict(one) for one in some], indent=2)
    if code in known:
        found = known[code]
        return printable(f"{found.code}: {found.title}\n\n  cause:  {found.cause}\n  remedy: {found.remedy}")
    return "\n".join(f"{one.code}: {one.title}" for one in some)


def completions(incomplete: str) -> list[str]:
    """The codes that a shell offers, as they are begun: "mp2" goes on in small letters."""
    if not is_code(incomplete):
        return []
    return [incomplete + code[len(incomplete) :] for code in pages() if code.startswith(incomplete.upper())]


def asked(words: Sequence[str]) -> str:
    """What ``mpcompile WORDS`` answers where that is a page and nothing else; "" otherwise."""
    rest = [word for word in words[1:] if word != "--json"]
    if not words or words[0] != "explain" or len(rest) != 1 or not is_code(rest[0]):
        return ""
    try:
        return answer(rest[0], as_json="--json" in words)
    except UsageError:
        return ""  # the verb says it, in the form that was asked for
