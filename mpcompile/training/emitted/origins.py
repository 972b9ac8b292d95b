"""Origins of an emitted step's values: by the rules of `mpcompile.origins`, on what each node really computes."""

from __future__ import annotations

from mpcompile.formats import CASTABLE, LOW
from mpcompile.graph import PrecisionGraph
from mpcompile.origins import Flow


def note_origins(graph: PrecisionGraph, low: str) -> None:
    """Write down the origin of each float value of forward, backward and update.

    Verdicts, precisions and casts must be there.  What is stored low carries a rounding, whatever made it; a cast of ours
    has the origin of what it casts; masters and what the update makes of them are weights; states, the loss, its scale and
    FP32 sums of FP32 gradients are full.
    """
    # What the update writes in place is read by the next step: it says nothing of this one's values.
    storage = {name: value.alias for name, value in graph.values.items() if value.alias}
    for name in storage:
        graph.values[name].alias = ""
    found = Flow(graph, low).solve().origin
    for name, alias in storage.items():
        graph.values[name].alias = alias
    for name, value in graph.values.items():
        maker = graph.producer(name)
        if value.dtype not in CASTABLE:
            continue
        origin = found.get(name, "")
        if value.dtype in LOW and origin in ("full", "") and not (maker is not None and maker.is_cast):
            origin = "rounded"
        value.origin = origin
