"""What a host and the training step cannot do together."""

from __future__ import annotations

from mpcompile.errors import TrainingError


def refused(what: str, *, why: str = "", try_: str = "") -> TrainingError:
    """MP551."""
    return TrainingError("MP551", what, why=why, try_=try_)


__all__ = ["refused"]
