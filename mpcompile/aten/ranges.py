"""Parameters, buffers and constants that hold numbers beyond the low type's: measured once, when a graph is compiled.

Only those get a `Value.range`: what training moves has no range that lasts, but a number that is infinite in the low
type now is no number to start with. (A weight that grows beyond it later is MP721, when its shadow is cast.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from mpcompile.aten.facts import DTYPES
from mpcompile.formats import CASTABLE, LARGEST
from mpcompile.graph import PrecisionGraph
from mpcompile.rules.hazards import SMALL

HELD = ("parameter", "buffer", "constant")
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def note_ranges(graph: PrecisionGraph, tensors: Mapping[str, Tensor], low: str) -> frozenset[str]:
    """Give the inputs of `graph` that reach beyond `low`'s largest number their range; the parameters near zero.

    Args:
      tensors: value name -> what the model holds there; fake and meta tensors and those of several ranks are left out.
    """
    found = {name: tensor for name, tensor in tensors.items() if _has_numbers(tensor)}
    sizes = dict(zip(found, sizes_of(list(found.values())), strict=True))
    for name, size in sizes.items():
        if size > LARGEST[low] and (ends := _finite_ends(found[name].detach())) is not None:
            graph.values[name].range = ends
    return frozenset(name for name, size in sizes.items() if size <= SMALL and graph.values[name].role == "parameter")


def held_by(values: Iterable[tuple[str, fx.Node]], module: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Value name -> tensor: an attribute of the graph's module, or what was `given` for the placeholder of that name."""
    found = dict[str, Tensor]()
    for name, node in values:
        held = given.get(node.name) if node.op == "placeholder" else _attribute(module, str(node.target))
        if isinstance(held, Tensor):
            found[name] = held
    return found


def sizes_of(tensors: Sequence[Tensor]) -> list[float]:
    """Largest absolute element of each (NaN where one is): one pass, and one transfer per device."""
    sizes = [0.0] * len(tensors)
    places: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(place)
    with torch.no_grad():
        for here in places.values():
            # Eight times as fast on a CPU as torch's maximum norms.
            ends = [torch.stack(torch.aminmax(tensors[place].detach())).abs().amax().float() for place in here]
            for place, size in zip(here, torch.stack(ends).tolist(), strict=True):
                sizes[place] = size
    return sizes


def _has_numbers(tensor: Tensor) -> bool:
    plain = type(tensor) in _PLAIN and not tensor.is_meta and tensor.layout is torch.strided
    return plain and DTYPES.get(tensor.dtype) in CASTABLE and tensor.numel() > 0


def _finite_ends(tensor: Tensor) -> tuple[float, float] | None:
    """(least, greatest) finite element; an infinity of the model's own (a mask's) stays one in every type."""
    finite = tensor[tensor.isfinite()]
    return (float(finite.min()), float(finite.max())) if finite.numel() else None


def _attribute(module: nn.Module, target: str) -> object:
    held: object = module
    for part in target.split("."):
        held = getattr(held, part, None)
    return held
