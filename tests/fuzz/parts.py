"""What a case is made of: texts of Python, so that a case is a script and shrinking one is leaving texts out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """A layer, a loss, an optimizer or an event.

    Fields:
      name: what a report of findings counts by.
      init: statements of `Model.__init__`; ``#`` stands for the number of the layer.
      run: statements of `Model.forward` on the stream ``h`` (rows, length, D), or of the event on the world ``w``.
      needs: words of what it must not be with ("rng": draws random numbers; "window": differs inside a window; ...).
    """

    name: str
    init: str = ""
    run: str = ""
    needs: frozenset[str] = frozenset()

    def at(self, number: int) -> Part:
        return Part(self.name, self.init.replace("#", str(number)), self.run.replace("#", str(number)), self.needs)


@dataclass(frozen=True)
class Case:
    """One training: everything that the script of it says.

    Fields:
      events: (step before which it happens, event).
      sizes: (rows, length) of each microbatch.
      modes: the last argument of the model, one microbatch after the other: a number or a word.
    """

    seed: int
    layers: tuple[Part, ...]
    start: Part
    loss: Part
    optimizer: str
    scheduler: str = "None"
    events: tuple[tuple[int, Part], ...] = ()
    sizes: tuple[tuple[int, int], ...] = ((4, 5),) * 4
    modes: tuple[float, ...] = (0.5,)
    how: str = "step"
    policy: str = "fp32"
    backend: str = "eager"
    clip: float | None = None
    window: int = 1
    states: str = "fp32"
    names: tuple[str, ...] = field(default=(), compare=False)

    def parts(self) -> Sequence[str]:
        """The names of all that is in it."""
        return [*(one.name for one in self.layers), self.start.name, self.loss.name, *(e.name for _, e in self.events)]


def needs(*words: str) -> frozenset[str]:
    return frozenset(words)


def pick(rng: random.Random, parts: Sequence[Part], barred: frozenset[str]) -> Part | None:
    """One of the parts that need nothing barred."""
    open_ = [part for part in parts if not part.needs & barred]
    return rng.choice(open_) if open_ else None
