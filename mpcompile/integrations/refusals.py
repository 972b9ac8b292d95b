"""What a host and the training step cannot do together."""

from __future__ import annotations

from mpcompile.errors import TrainingError, page

page(
    "MP551",
    "A host that asks for what the training step cannot give",
    "Inside a host's loop the training step is one call that does forward, backward, clipping and update. What the host "
    "would do between them (look at gradients, clip them by value, log from inside a traced loss) has no place there.",
    "Do it before or after the step (see the page of the host), or take the drop-in way: the host's own loop on "
    "`mpcompile(model)`.",
)


def refused(what: str, *, why: str = "", try_: str = "") -> TrainingError:
    """MP551."""
    return TrainingError("MP551", what, why=why, try_=try_)


__all__ = ["refused"]
