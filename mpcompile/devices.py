"""What a device does in a second: the rows of devices.toml, the user's own file, and one row pinned by the policy.

A *name* here is what `Policy.device` and a report's `device` hold: a row's name, or FILE.toml (FILE.toml#ROW where the
file has several).  Which row is the machine's own, `mpcompile.hardware.row_name` finds.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from mpcompile.errors import RuleError, suggest

# Where `mpcompile doctor --measure` writes and everybody looks; an empty value looks nowhere.
PLACE = "MPCOMPILE_DEVICES"
NUMBERS = ("fp32", "bf16", "fp16", "bandwidth", "launch")


@dataclass(frozen=True)
class Device:
    """One row: FLOP/s by precision, bytes/s, seconds per kernel, kinds with a speedup of their own, and the seconds that a
    library's low product takes more than its FP32 one, however small, by precision.

    Fields:
      family: whose kernels run: "cpu", "cuda" or "onnx".
      fp8: FLOP/s of products with FP8 operands, by how these are scaled ("tensorwise", "rowwise"); none: no FP8 here.
      quantise: bytes/s at which FP8 operands are made of BF16 ones, both layouts by one kernel; 0.0: `bandwidth`.
      emulated: low types that this device computes in FP32 and rounds; "auto" never picks one.
      products: words in the product's name, as the driver gives it, that say it is this row's.
      capability: CUDA compute capability of the row (9.0), 0.0 for others.
      source: where the numbers are from.
    """

    name: str
    fp32: float
    bf16: float
    fp16: float
    bandwidth: float
    launch: float
    speedup: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    low_call_overhead: Mapping[str, float] = field(default_factory=dict)
    fp8: Mapping[str, float] = field(default_factory=dict)
    quantise: float = 0.0
    family: str = "cpu"
    emulated: Sequence[str] = ()
    products: Sequence[str] = ()
    capability: float = 0.0
    source: str = ""

    def rate(self, precision: str, kind: str = "") -> float:
        """FLOP/s of a kind's kernels in a precision."""
        own = self.speedup.get(kind, {}).get(precision)
        if own is not None:
            return own * self.fp32
        return {"bf16": self.bf16, "fp16": self.fp16}.get(precision, self.fp32)

    def faster(self) -> str:
        """The low type that "auto" means here: BF16 where its products beat FP32's, else FP16, else "fp32"."""
        for low in ("bf16", "fp16"):
            if low not in self.emulated and self.rate(low) > self.fp32:
                return low
        return "fp32"


def device(name: str) -> Device:
    """The row of a name; an unknown one has the row of its family ("cuda:1" -> "cuda"), else "cpu".

    Raises:
      RuleError: MP206, for a file without such a row.
    """
    if is_file(name):
        return _of_file(name)
    known = rows()
    return known.get(name) or _renamed(known.get(name.partition(":")[0]) or known["cpu"], name)


def pinned(name: str) -> Device:
    """The row that a policy's `device` names.

    Raises:
      RuleError: MP206, with near names.
    """
    if is_file(name) or name in rows():
        return device(name)
    near = suggest(name, sorted(rows()))
    hint = f"did you mean {near}?" if near else f"one of {', '.join(sorted(rows()))}, or a FILE.toml"
    raise RuleError("MP206", f"there is no device {name!r}", try_=hint)


def is_file(name: str) -> bool:
    return name.partition("#")[0].endswith(".toml")


def rows() -> Mapping[str, Device]:
    """Every row that has a name: the package's, and over them those of the user's own file."""
    return {**built_in(), **own_rows()}


@cache
def built_in() -> Mapping[str, Device]:
    """The package's rows; one that is `like` another has its numbers."""
    return _read(_shipped(), "devices.toml")


@cache
def _shipped() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("mpcompile").joinpath("devices.toml").read_text(encoding="utf-8"))


def own_path() -> Path | None:
    """The user's device file, whether or not it is there; None where the environment says to look nowhere."""
    told = os.environ.get(PLACE)
    if told is not None:
        return Path(told) if told else None
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "mpcompile" / "devices.toml"


def own_rows() -> Mapping[str, Device]:
    """The rows of the user's device file; none where there is no file."""
    path = own_path()
    try:
        stamp = path.stat().st_mtime_ns if path is not None else 0
    except OSError:
        return {}
    return _file(str(path), stamp) if path is not None else {}


def write_row(path: Path, row: Device) -> None:
    """Write a row into a device file, over the row of that name; other rows stay, and nothing is left half written.

    Raises:
      RuleError: MP206, where the file that is there is none, or cannot be written.
    """
    try:
        stamp = path.stat().st_mtime_ns if path.exists() else None
        kept = {} if stamp is None else dict(_file(str(path), stamp))
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        fresh.write_text("\n".join(_as_toml(one) for one in {**kept, row.name: row}.values()), encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise RuleError(
            "MP206", f"the device file {str(path)!r} cannot be written", why=error.strerror or str(error)
        ) from error


def _as_toml(row: Device) -> str:
    lines = [f"[{_text(row.name)}]"]
    for one in fields(Device):
        value = getattr(row, one.name)
        if one.name != "name" and (value or one.name in NUMBERS):
            lines.append(f"{one.name} = {_text(value)}")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_text(k)} = {_text(v)}" for k, v in value.items()) + " }"
    if isinstance(value, str):
        # JSON's escapes are TOML's.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, Sequence) else repr(value)


def _of_file(name: str) -> Device:
    path, _, wanted = name.partition("#")
    try:
        stamp = Path(path).stat().st_mtime_ns
    except OSError as error:
        raise RuleError(
            "MP206", f"the device file {path!r} cannot be read", why=error.strerror or str(error)
        ) from error
    found = _file(path, stamp)
    if not wanted and len(found) == 1:
        return _renamed(next(iter(found.values())), name)
    if wanted in found:
        return _renamed(found[wanted], name)
    hint = " or ".join(f"{path}#{row}" for row in found)
    what = f"has no row {wanted!r}" if wanted else f"has {len(found)} rows"
    raise RuleError("MP206", f"the device file {path!r} {what}", try_=hint or "`mpcompile doctor --measure` writes one")


@cache
def _file(path: str, stamp: int) -> Mapping[str, Device]:
    """The rows of a file as it was at `stamp`."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RuleError("MP206", f"the device file {path!r} cannot be read", why=str(error)) from error
    return _read(table, path)


def _read(table: Mapping[str, Any], path: str) -> dict[str, Device]:
    found: dict[str, Device] = {}
    for name, row in table.items():
        if not isinstance(row, dict):
            raise RuleError("MP206", f"{path}: {name} is not a row", try_="[name] and its numbers below")
        found[name] = _row(name, {**_base(name, row.get("like", ""), table, path), **row}, path)
    return found


def _base(name: str, like: str, table: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The numbers of the row that `name` is like: of the same file, else one of the package's."""
    if not like:
        return {}
    base = table.get(like) if like != name else None
    base = base or _shipped().get(like)
    if base is None:
        near = suggest(like, [*table, *_shipped()])
        raise RuleError("MP206", f"{path}: [{name}] is like {like!r}, which is no row",
                        try_=f"did you mean {near}?" if near else ", ".join(_shipped()))  # fmt: skip
    return {**_base(like, base.get("like", "") if like != base.get("like") else "", table, path), **base}


def _row(name: str, given: dict[str, Any], path: str) -> Device:
    given.pop("like", None)
    known = [f.name for f in fields(Device) if f.name != "name"]
    for key in given:
        if key not in known:
            near = suggest(key, known)
            raise RuleError("MP206", f"{path}: [{name}] has an unknown field {key!r}",
                            try_=f"did you mean {near}?" if near else ", ".join(known))  # fmt: skip
    for key in NUMBERS:
        value = given.get(key)
        # A rate of nothing, or of infinity, is a division by zero in a price.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise RuleError("MP206", f"{path}: [{name}] needs a positive number {key}", why=f"it has {value!r}")
    return Device(name, **given)


def _renamed(row: Device, name: str) -> Device:
    return Device(name, **{f.name: getattr(row, f.name) for f in fields(Device) if f.name != "name"})


__all__ = ["PLACE", "Device", "built_in", "device", "is_file", "own_path", "own_rows", "pinned", "rows", "write_row"]
