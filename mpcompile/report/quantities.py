"""Bytes, seconds and precisions as people read them, in one format everywhere."""

from __future__ import annotations

_SECONDS = (("s", 1.0), ("ms", 1e3), ("µs", 1e6))
_BYTES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def seconds(value: float) -> str:
    """
    >>> seconds(0.00517), seconds(0), seconds(2e-9)
    ('5.17 ms', '0', '< 0.01 µs')
    """
    for unit, factor in _SECONDS:
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return "0" if not value else f"{value * 1e6:.2g} µs" if value >= 1e-8 else "< 0.01 µs"


def size(value: float) -> str:
    """
    >>> size(1_048_576), size(12)
    ('1.05 MB', '12 B')
    """
    for unit, factor in _BYTES:
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def counted(count: int, thing: str) -> str:
    """
    >>> counted(1, "node"), counted(1200, "node")
    ('1 node', '1,200 nodes')
    """
    return f"{count:,} {thing}{'s' * (count != 1)}"


def times(value: float) -> str:
    """
    >>> times(1.0312), times(9267.77)
    ('1.03', '9,268')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
