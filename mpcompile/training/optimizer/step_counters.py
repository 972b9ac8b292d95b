"""Step counters: the 0-dim state of an optimizer, kept in one place for all the updates of a step.

Counters of parameters that have always moved together are one scalar in a graph, and views of one tensor in
``optimizer.state``: a bias correction is computed once, not once per parameter.  Batches that reach other parameters
(two tasks with a head each) get updates of their own, so which parameters move together is settled here, across
updates: a class whose members part is forgotten, and with it every update that took it for one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STARTED = "started"  # not in the optimizer's state: 0 until the first step that was taken


@dataclass
class Shared:
    """A 0-dim state that the parameters `members` of a binding share: `base[j]` is the state of member j.

    `value` is what a graph reads: storage of its own, as a graph that writes `base` must not read an element of it.
    """

    key: str
    members: list[int]
    base: Tensor
    value: Tensor


@dataclass
class _Class:
    """Parameters whose counters move together, and where these are: key -> (base, value)."""

    params: list[Tensor]
    states: dict[str, tuple[Tensor, Tensor]]

    def holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """True when the optimizer's state is still ours."""
        return all(
            _is_element(optimizer.state.get(p, {}).get(key), base, j)
            for key, (base, _) in self.states.items()
            for j, p in enumerate(self.params)
        )

    def moved_together(self) -> bool:
        """Reads the device."""
        return all(bool((base == base[0]).all()) for base, _ in self.states.values())


@dataclass
class Counters:
    """Every class of one optimizer's parameters.

    Fields:
      generation: rises when a class is forgotten: updates made before may hold it.
    """

    generation: int = 0
    _classes: list[_Class] = field(default_factory=list)
    _started: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def clear(self) -> None:
        """The optimizer has another state."""
        self._classes.clear()
        self._started.clear()
        self.generation += 1

    def look_again(self) -> None:
        """Someone else moved the counters: forget the classes whose members parted. Reads the device."""
        self._keep([one for one in self._classes if one.moved_together()])
        for base, _ in self._started.values():
            base.fill_(1.0)
        pairs = [pair for one in self._classes for pair in one.states.values()]
        for base, value in [*pairs, *self._started.values()]:
            value.copy_(base[0])

    def of(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], groups: Sequence[int],
           scalars: Sequence[dict[str, Tensor]]) -> list[Shared]:  # fmt: skip
        """The shared counters of `params`, of which `scalars` are the 0-dim states; views in ``optimizer.state``."""
        place = {id(p): i for i, p in enumerate(params)}
        self._keep([c for c in self._classes if c.holds(optimizer) and _within(c.params, place) in (0, len(c.params))])
        known = {id(p) for one in self._classes for p in one.params}
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            if id(p) not in known and scalars[i]:
                values = tuple((k, v.item(), v.dtype) for k, v in scalars[i].items())
                alike[groups[i], p.device, values].append(i)
        for (_, device, values), members in alike.items():
            self._classes.append(_made(optimizer, [params[i] for i in members], values, device))
        found = []
        for one in self._classes:
            if id(one.params[0]) not in place:
                continue
            members = [place[id(p)] for p in one.params]
            found += [Shared(key, members, base, value) for key, (base, value) in one.states.items()]
        return found

    def started(self, number: int, member: int, device: torch.device, begun: bool) -> Shared:
        """Whether group `number` ever stepped."""
        if number not in self._started:
            base = torch.full((1,), float(begun), device=device)
            self._started[number] = base, base[0].clone()
        return Shared(STARTED, [member], *self._started[number])

    def _keep(self, classes: list[_Class]) -> None:
        self.generation += len(classes) < len(self._classes)
        self._classes = classes


def resync(shared: Sequence[Shared]) -> None:
    """What graphs read is what the counters are now: another update, or a fused kernel, may have moved them."""
    if shared:
        torch._foreach_copy_([one.value for one in shared], [one.base[0] for one in shared])


def _within(params: Sequence[Tensor], place: dict[int, int]) -> int:
    return sum(id(p) in place for p in params)


def _is_element(state: Any, base: Tensor, j: int) -> bool:
    return isinstance(state, Tensor) and state.dim() == 0 and state.data_ptr() == base[j].data_ptr()


def _made(optimizer: torch.optim.Optimizer, params: list[Tensor], values: Any, device: torch.device) -> _Class:
    states = {}
    for key, value, dtype in values:
        base = torch.full((len(params),), value, dtype=dtype, device=device)
        states[key] = base, base[0].clone()
        for p, element in zip(params, base.unbind(), strict=True):
            optimizer.state[p][key] = element
    return _Class(params, states)
