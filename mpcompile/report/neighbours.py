"""What a node reads and who reads what it gives, casts and all, as data and in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mpcompile.report.columns import through_casts
from mpcompile.report.quantities import size

if TYPE_CHECKING:
    from mpcompile.graph import Node, PrecisionGraph, Value

# Readers that are named; of more the number is.
_NAMED = 6


def reads_of(graph: PrecisionGraph, node: Node) -> list[dict[str, Any]]:
    """Of each value that `node` reads: its name, who makes it, how it is stored, how it is read, through which cast.

    Returns:
      ``{"value", "from": a node or a role, "stored", "origin": what rounding it would lose, "dtype", "cast": None or
      {"origin", "bytes"}, "says"}``, ``dtype`` being the one that is read, and ``says`` the same in words.
    """
    return [_read(graph, name) for name in dict.fromkeys(node.inputs)]


def _read(graph: PrecisionGraph, name: str) -> dict[str, Any]:
    root, cast = through_casts(graph, name)
    stored, given = graph.values[root], graph.values[name]
    made = graph.producer(name) if cast else None
    through = {"origin": made.origin or "inserted", "bytes": given.bytes} if made else None
    fact = {"value": root, "from": stored.producer or stored.role, "stored": stored.dtype, "origin": stored.origin,
            "dtype": given.dtype}  # fmt: skip
    what = f"`{root}`" if stored.producer else f"the {stored.role} `{root}`"
    how = f"as {_type(given)}"
    if through:
        how += f" through a {_cast(through)} (it is {_type(stored)})"
    elif stored.castable:
        how += f", as it is stored ({size(stored.bytes)})"
    return {**fact, "cast": through, "says": f"{what} {how}{_said(stored)}"}


def gives_of(graph: PrecisionGraph, node: Node) -> list[dict[str, Any]]:
    """Of each value that `node` gives: how it is stored, who reads it so, and who through a cast of which type and bytes.

    Returns:
      ``{"value", "dtype", "bytes", "origin", "readers", "casts": [{"to", "origin", "bytes", "readers"}], "says"}``.
    """
    uses = graph.uses()
    return [_given(graph, uses, name) for name in node.outputs]


def _given(graph: PrecisionGraph, uses: dict[str, list[tuple[str, int]]], name: str) -> dict[str, Any]:
    value = graph.values[name]
    readers = _readers(graph, uses, name)
    casts: list[dict[str, Any]] = [
        {"to": graph.values[made].dtype, "origin": cast.origin or "inserted", "bytes": graph.values[made].bytes,
         "readers": _readers(graph, uses, made)}
        for cast, made in _casts(graph, uses, name)
    ]  # fmt: skip
    parts = [f"to {_listed(readers)}"] if readers else []
    parts += [f"to {_listed(one['readers'])} as {one['to'].upper()} through a {_cast(one)}" for one in casts]
    said = f"`{name}` as {_type(value)} ({size(value.bytes)}) {'; '.join(parts) or 'to nobody'}"
    return {"value": name, "dtype": value.dtype, "bytes": value.bytes, "origin": value.origin, "readers": readers,
            "casts": casts, "says": f"{said}{_said(value)}"}  # fmt: skip


def _said(value: Value) -> str:
    """What rounding the value would lose, in words."""
    return f"; {_LOST[value.origin]}" if value.origin else ""


_LOST = {
    "rounded": "rounded: it carries roundings of the low type already",
    "weight": "weight: a parameter, whose FP32 master stays",
    "row": "row: looked up in a weight by an index",
    "full": "full: it has all the digits of FP32",
}


def _casts(graph: PrecisionGraph, uses: dict[str, list[tuple[str, int]]], name: str) -> Iterator[tuple[Node, str]]:
    for reader in dict.fromkeys(reader for reader, _ in uses[name]):
        if (node := graph.nodes[reader]).is_cast:
            yield from ((node, made) for made in node.outputs)


def _readers(graph: PrecisionGraph, uses: dict[str, list[tuple[str, int]]], name: str) -> list[str]:
    """Who reads the value as it is; "(output)" is the caller."""
    found = dict.fromkeys(reader for reader, _ in uses[name] if not graph.nodes[reader].is_cast)
    return [*found, *(["(output)"] if name in graph.outputs else [])]


def _listed(readers: list[str]) -> str:
    names = ["the caller" if one == "(output)" else f"`{one}`" for one in readers]
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join([*names[:_NAMED], *more])


def _cast(cast: dict[str, Any]) -> str:
    kind = "shadow (made when the master changes)" if cast["origin"] == "shadow" else "cast"
    return f"{kind} of {size(cast['bytes'])}"


def _type(value: Value) -> str:
    return value.dtype.upper() if value.castable else value.dtype
