"""Which private names of torch there are here, and what stands for one that there is not."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import tomllib
import warnings
from dataclasses import dataclass
from importlib import resources
from typing import Any

from mpcompile.errors import MPCompileError, RuntimeFailure

# The suite ran with these; a newer one is asked for every name before it is used.
TESTED = ("2.11", "2.14")


@dataclass(frozen=True)
class PrivateName:
    """One row of `names.toml`.

    Fields:
      path: module, then attributes: "torch._dynamo.config.optimize_ddp".
      use: what it is for.
      without: what happens where torch has it no more.
      seen: the versions it was found in; "2.11" alone is a name that a newer torch has another for (`instead`).
      instead: another path, one of which is enough.
    """

    path: str
    use: str
    without: str
    seen: str = "2.11 to 2.14"
    instead: str = ""


@functools.cache
def names() -> dict[str, PrivateName]:
    """Path -> row, in the order of the file."""
    text = resources.files(__package__).joinpath("names.toml").read_text(encoding="utf-8")
    return {path: PrivateName(path, **row) for path, row in tomllib.loads(text).items()}


def missing() -> list[PrivateName]:
    """The rows that this torch has neither by their own name nor by the other one. Imports what they are in: seconds."""
    rows = names()
    return [one for one in rows.values() if not any(map(_is_there, filter(None, (one.path, one.instead))))]


def _is_there(path: str) -> bool:
    """Whether a path leads somewhere: through modules, then attributes; of a class also those its code makes or names."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        return _has(found, parts[count:])
    return False


def _has(owner: Any, attributes: list[str]) -> bool:
    for name in attributes:
        if not hasattr(owner, name):
            return name == attributes[-1] and _is_written(owner, name)
        owner = getattr(owner, name)
    return True


def _is_written(owner: Any, name: str) -> bool:
    """An attribute that objects have and their class has not stands in its source; so does what a function marks."""
    if not isinstance(owner, type) and not inspect.isfunction(owner):
        return False
    try:
        return re.search(rf"\b{name}\b", inspect.getsource(owner)) is not None
    except (OSError, TypeError):
        return False


def warn_of_missing(version: str) -> None:
    """For a torch that is newer than those tested: one warning that says what it lacks. `version`: torch.__version__."""
    if release(version) <= release(TESTED[1]) or not (lacking := missing()):
        return
    told = "\n".join(f"  {one.path}: for {one.use}; without it {one.without}" for one in lacking)
    warnings.warn(
        f"mpcompile: torch {version} is newer than those tested ({TESTED[0]} to {TESTED[1]}) and lacks what mpcompile "
        f"reads of it:\n{told}\nWhat needs one of these raises MP705.",
        stacklevel=2,
    )


def release(version: str) -> tuple[int, int]:
    """Major and minor number.

    >>> release("2.13.0+cpu"), release("2.15.0a0+git1")
    ((2, 13), (2, 15))
    """
    major, minor = version.split(".")[:2]
    return int(major), int(re.match(r"\d+", minor)[0])  # type: ignore[index]


def absent(path: str) -> MPCompileError:
    """The error of whoever needs a name that this torch has not."""
    import torch

    row = names().get(path)
    return RuntimeFailure(
        "MP705", f"torch {torch.__version__} has no {path}", why=f"it is for {row.use}" if row else "",
        try_=f"a torch from {TESTED[0]} to {TESTED[1]}",
    )  # fmt: skip


class _Absent(type):
    """Stands where a name is missing: nothing is an instance of it, and whoever calls it or reads of it is told."""

    path: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise absent(cls.path)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise absent(cls.path)


def found(module: str, *wanted: str) -> Any:
    """The attributes of a module of torch (one alone is no tuple); for one that is not there, what raises MP705 when used."""
    try:
        owner: Any = importlib.import_module(module)
    except ImportError:
        owner = None
    made = tuple(getattr(owner, name) if hasattr(owner, name) else _stand_in(f"{module}.{name}") for name in wanted)
    return made if len(made) > 1 else made[0]


def _stand_in(path: str) -> Any:
    # A kind of exception, so that it may stand in an `except` too.
    return _Absent(path.rpartition(".")[2], (Exception,), {"path": path})


__all__ = ["TESTED", "PrivateName", "absent", "found", "missing", "names", "release", "warn_of_missing"]
