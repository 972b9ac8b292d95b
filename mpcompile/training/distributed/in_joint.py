"""Collectives of gradients in a joint graph: whose they are, and what the graph gives then."""

from __future__ import annotations

from mpcompile.aten.graphs import outputs_of, values_of
from mpcompile.training.accumulation import Layout
from mpcompile.training.distributed.reduce import Reducer
from mpcompile.training.distributed.scatter import Scatterer
from mpcompile.training.gradients.joint import Joint


def reduce_joint(joint: Joint, reducer: Reducer | Scatterer) -> tuple[Layout, Layout]:
    """Let a joint graph give the ranks' average, one gradient for each parameter or, in shares, for each piece of one.

    Returns:
      (parameter's name, dtype) of each gradient that the graph gives, and of each that travels.
    """
    parts: dict[str, list[int]] = {}
    for position, place in enumerate(joint.grads):
        parts.setdefault(joint.forward.inputs[place].name, []).append(position)
    first = len(joint.mutated) + 1
    if isinstance(reducer, Scatterer):
        reducer.note(read_whole(joint))
    reducer.reduce(joint.module, list(parts.values()), list(parts), first)
    joint.grads = [joint.grads[part[0]] for part in parts.values()]
    if isinstance(reducer, Scatterer):
        layout = reducer.layout
        assert layout is not None
        places = dict(zip(parts, joint.grads, strict=True))
        joint.grads = [places[name] for name, _ in layout.mine if name]
        return layout.mine, layout.sent
    values = values_of(outputs_of(joint.module)[first:])
    given = tuple((name, value.dtype) for name, value in zip(parts, values, strict=True))
    return given, given


def read_whole(joint: Joint) -> set[str]:
    """Names of the parameters whose FP32 masters a graph reads."""
    return {one.name for one in joint.forward.inputs if one.kind == "param"}


__all__ = ["read_whole", "reduce_joint"]
