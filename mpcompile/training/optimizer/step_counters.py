"""Step counters: the 0-dim state of an optimizer, kept in one place for all the updates of all steps that share it.

Counters of parameters that have always moved together are one scalar in a graph, and views of one tensor in
``optimizer.state``: a bias correction is computed once, not once per parameter.  Batches that reach other parameters
(two tasks with a head each) get updates of their own, and two training steps may share an optimizer, so which
parameters move together is settled here, per optimizer: a class whose members part is forgotten, and with it every
update that took it for one.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpcompile.torch_internals.tensors import foreach_copy, version

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

    def holds(self, state: Any) -> bool:
        """True when the optimizer's state is still ours."""
        return all(
            _is_element(state.get(p, {}).get(key), base, j)
            for key, (base, _) in self.states.items()
            if key != STARTED
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
      ran: the update that moved the counters last; graphs of another have older values.
      ours: the step that the optimizer's hooks see is a training step's.
      stepped: someone else stepped since the last look.
      fresh: parameters whose state was made for an update that may never have been taken.
    """

    generation: int = 0
    ran: Any = None
    ours: bool = False
    stepped: bool = False
    fresh: dict[int, Tensor] = field(default_factory=dict)
    _classes: list[_Class] = field(default_factory=list)
    _versions: list[int] = field(default_factory=list)

    def clear(self) -> None:
        """The optimizer has another state."""
        self._classes.clear()
        self.generation += 1

    def edited(self) -> bool:
        """True when someone wrote to the counters themselves: compiled updates raise no version."""
        return list(map(version, self._bases())) != self._versions

    def note(self) -> None:
        """The counters are as they should be from here on."""
        self._versions = list(map(version, self._bases()))

    def look_again(self) -> None:
        """Someone else moved the counters: forget the classes whose members parted. Reads the device."""
        self.stepped = False
        self.fresh.clear()
        self._keep([one for one in self._classes if one.moved_together()])
        for one in self._classes:
            for base, value in one.states.values():
                value.copy_(base[0])
        self.note()

    def of(
        self, state: Any, params: Sequence[Tensor], groups: Sequence[int], scalars: Sequence[dict[str, Tensor]]
    ) -> list[Shared]:
        """The shared counters of `params`, of which `scalars` are the 0-dim states; views in `state`.

        Args:
          state: the optimizer's.
          scalars: ones under `STARTED` are in no state.
        """
        place = {id(p): i for i, p in enumerate(params)}
        self._part_from_emptied(place, scalars)
        self._keep([c for c in self._classes if c.holds(state) and _within(c.params, place) in (0, len(c.params))])
        known = {id(p) for one in self._classes for p in one.params}
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            if id(p) not in known and scalars[i]:
                values = tuple((k, v.item(), v.dtype) for k, v in scalars[i].items())
                alike[groups[i], p.device, values].append(i)
        for (_, device, values), members in alike.items():
            self._classes.append(_made(state, [params[i] for i in members], values, device))
        found = []
        for one in self._classes:
            if id(one.params[0]) not in place:
                continue
            members = [place[id(p)] for p in one.params]
            found += [Shared(key, members, base, value) for key, (base, value) in one.states.items()]
        self.note()
        return found

    def _part_from_emptied(self, place: dict[int, int], scalars: Sequence[dict[str, Tensor]]) -> None:
        """Forget the classes of which a member's state was emptied: it starts anew, and the others go on as they are."""
        kept = []
        for one in self._classes:
            flags, members = one.states.get(STARTED), [place.get(id(p)) for p in one.params]
            if flags is None or all(i is None or bool(scalars[i].get(STARTED, True)) for i in members):
                kept.append(one)
                continue
            for i, flag in zip(members, flags[0], strict=True):
                if i is not None and scalars[i].get(STARTED, False):
                    scalars[i][STARTED] = flag.detach().cpu()
        self._keep(kept)

    def withdraw(self, state: Any) -> None:
        """Take state that no taken step has touched out of the optimizer: without us it would not be there yet.

        Reads the device, until each has been stepped once.
        """
        if self.fresh and not self.edited() and not self._taken(state):
            self.generation += len([state.pop(param) for param in self.fresh.values() if param in state])
        self.fresh.clear()

    def _taken(self, state: Any) -> bool:
        """True when the update that `fresh` was made for was taken: for all of them, or for none.

        An empty parameter, or one whose gradient is zero, does not show it itself.
        """
        started = {
            id(p): base[j]
            for one in self._classes
            for base, _ in filter(None, [one.states.get(STARTED)])
            for j, p in enumerate(one.params)
        }
        return not all(_untouched(state.get(param, {}), started.get(key)) for key, param in self.fresh.items())

    def _bases(self) -> list[Tensor]:
        return [base for one in self._classes for base, _ in one.states.values()]

    def _keep(self, classes: list[_Class]) -> None:
        self.generation += len(classes) < len(self._classes)
        self._classes = classes


_ALL: weakref.WeakKeyDictionary[torch.optim.Optimizer, Counters] = weakref.WeakKeyDictionary()


def counters_of(optimizer: torch.optim.Optimizer) -> Counters:
    """The counters of an optimizer, one for all training steps on it."""
    if optimizer not in _ALL:
        _ALL[optimizer] = made = Counters()
        # Weak: they outlive neither the optimizer nor its copies' state.
        me = weakref.ref(made)
        optimizer.register_step_pre_hook(lambda one, *_: _foreign(me, one))
        optimizer.register_step_post_hook(lambda *_: _note_step(me))
        optimizer.register_load_state_dict_post_hook(lambda *_: _clear(me))
        optimizer.register_state_dict_pre_hook(lambda one: _withdraw(me, one))
    return _ALL[optimizer]


def _foreign(held: weakref.ref[Counters], optimizer: torch.optim.Optimizer) -> None:
    counters = held()
    if counters is not None and not counters.ours:
        counters.withdraw(optimizer.state)


def _note_step(held: weakref.ref[Counters]) -> None:
    counters = held()
    if counters is not None:
        counters.stepped = counters.stepped or not counters.ours


def _clear(held: weakref.ref[Counters]) -> None:
    counters = held()
    if counters is not None:
        counters.fresh.clear()
        counters.clear()


def _withdraw(held: weakref.ref[Counters], optimizer: torch.optim.Optimizer) -> None:
    counters = held()
    if counters is not None:
        counters.withdraw(optimizer.state)


def resync(shared: Sequence[Shared]) -> None:
    """What graphs read is what the counters are now: another update, or a fused kernel, may have moved them."""
    if shared:
        foreach_copy([one.value for one in shared], [one.base[0] for one in shared])


def _untouched(state: dict[str, Any], started: Tensor | None) -> bool:
    """True for state as it was made: its counter (or ours) is at zero; where nothing counts, all of it is."""
    tensors = [v for v in state.values() if isinstance(v, Tensor)]
    counter = started if started is not None else state.get("step")
    return not any(bool(t.any()) for t in ([counter] if isinstance(counter, Tensor) else tensors))


def _within(params: Iterable[Tensor], place: dict[int, int]) -> int:
    return sum(id(p) in place for p in params)


def _is_element(state: Any, base: Tensor, j: int) -> bool:
    return isinstance(state, Tensor) and state.dim() == 0 and state.data_ptr() == base[j].data_ptr()


def _made(state: Any, params: list[Tensor], values: Any, device: torch.device) -> _Class:
    states = {}
    for key, value, dtype in values:
        base = torch.full((len(params),), value, dtype=dtype, device=device)
        states[key] = base, base[0].clone()
        for p, element in zip(params, base.unbind(), strict=True):
            if key != STARTED:
                state[p][key] = element
    return _Class(params, states)
