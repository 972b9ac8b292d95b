"""Leave out what a failing case does not need: events, layers, options, steps, one after the other, until nothing goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from fuzz.models import LOSSES, STARTS
from fuzz.parts import Case, Part

PLAIN = {
    "optimizer": "torch.optim.SGD(m.parameters(), lr=0.1)",
    "scheduler": "None",
    "sizes": None,
    "modes": (0.5,),
    "clip": None,
    "window": 1,
    "states": "fp32",
    "backend": "eager",
    "loss": LOSSES[0],
    "start": STARTS[1],
}


def shrink(case: Case, fails: Callable[[Case], bool], most: int = 60) -> Case:
    """The smallest case found that fails still, in at most `most` tries."""
    tried = 0
    again = True
    while again and tried < most:
        again = False
        for smaller in _smaller(case):
            tried += 1
            if fails(smaller):
                case, again = smaller, True
                break
            if tried >= most:
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    for i in range(len(case.events)):
        yield replace(case, events=case.events[:i] + case.events[i + 1 :])
    for i in range(len(case.layers)):
        yield replace(case, layers=case.layers[:i] + case.layers[i + 1 :])
    if len(case.sizes) > 2:
        yield _shorter(case)
    for name, value in PLAIN.items():
        value = (case.sizes[0],) * len(case.sizes) if name == "sizes" else value
        if getattr(case, name) != value:
            yield replace(case, **{name: value})
    if any(layer.name != "linear" for layer in case.layers):
        yield from (
            replace(case, layers=_with(case.layers, i)) for i, one in enumerate(case.layers) if one.name != "linear"
        )


def _shorter(case: Case) -> Case:
    last = len(case.sizes) - 1
    events = tuple((min(step, last - 1), event) for step, event in case.events)
    return replace(case, sizes=case.sizes[:last], events=events)


def _with(layers: tuple[Part, ...], at: int) -> tuple[Part, ...]:
    plain = Part("linear", "self.l# = nn.Linear(D, D)", "h = self.l#(h)")
    return (*layers[:at], plain, *layers[at + 1 :])
