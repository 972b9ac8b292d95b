"""A case from a seed: the same seed is the same case."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from fuzz import optimizers
from fuzz.events import EVENTS, STRUCTURE
from fuzz.models import LAYERS, LOSSES, STARTS
from fuzz.parts import Case, Part, pick


def case(seed: int, policy: str = "", without: frozenset[str] = frozenset()) -> Case:
    """The case of `seed`.

    Args:
      policy: "fp32", or a low policy; by default one of both (three of four are FP32, which plain torch judges exactly).
      without: names of parts to leave out.
    """
    rng = random.Random(seed)
    policy = policy or rng.choice(["fp32", "fp32", "fp32", "bf16,device=free-low"])
    barred = set[str]() if policy == "fp32" else {"rng"}
    how, window = rng.choice(["step", "step", "step", "dropin"]), rng.choice([1, 1, 1, 2, 3])
    if how == "dropin":
        barred |= {"skip"}
    backend = "inductor" if rng.random() < 0.02 else "eager"
    if backend == "inductor":
        barred |= {"rng"}
    if window > 1:
        barred |= {"window"}
    layers = _layers(rng, barred, without)
    drawn = {word for layer in layers for word in layer.needs}
    if "stats" in drawn:
        barred |= {"stats"}
    optimizer, scheduler = optimizers.sample(rng)
    if "fused=True" in optimizer:
        # Torch's own fused kernels go by address: with a state of another layout than its parameter they mix elements.
        barred |= {"layout"}
    steps = rng.choice([3, 4, 5, 6])
    states = rng.choice(["fp32", "fp32", "bf16", "8bit"]) if policy != "fp32" and how == "step" else "fp32"
    # In low every second case has events too: what a shadow, or a low state, misses shows there alone.
    eventful = policy == "fp32" or (states == "fp32" and rng.random() < 0.5)
    return Case(
        seed=seed, layers=layers, start=_one(rng, STARTS, without), loss=_one(rng, LOSSES, without), optimizer=optimizer,
        scheduler=scheduler, events=_events(rng, steps * window, barred, without) if eventful else (),
        sizes=_sizes(rng, steps * window), modes=rng.choice([(0.5,), (0.5,), (0.5, 0.9), (0.1, 0.9), (0.9, 0.5, 0.1)]), how=how,
        policy=policy, backend=backend, clip=rng.choice([None, None, 0.5, 5.0]), window=window,
        states=states,
    )  # fmt: skip


def _one(rng: random.Random, parts: tuple[Part, ...], without: frozenset[str]) -> Part:
    return rng.choice([part for part in parts if part.name not in without])


def _layers(rng: random.Random, barred: set[str], without: frozenset[str]) -> tuple[Part, ...]:
    chosen = [
        pick(rng, [p for p in LAYERS if p.name not in without], frozenset(barred))
        for _ in range(rng.choice([1, 1, 2, 2, 3]))
    ]
    return tuple(one for one in chosen if one is not None)


def _sizes(rng: random.Random, count: int) -> tuple[tuple[int, int], ...]:
    kinds = rng.choice([[(4, 5)], [(4, 5)], [(4, 5), (3, 5)], [(4, 5), (4, 6), (2, 7)]])
    return tuple(rng.choice(kinds) for _ in range(count))


def _events(rng: random.Random, steps: int, barred: set[str], without: frozenset[str]) -> tuple[tuple[int, Part], ...]:
    """Up to three, and never one that another would undo the meaning of."""
    chosen, barred = list[tuple[int, Part]](), set(barred)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        event = pick(rng, [p for p in EVENTS if p.name not in without], frozenset(barred))
        if event is None:
            continue
        chosen.append((rng.randrange(1, steps), event))
        if event.name in STRUCTURE:
            barred.add("structure")
    return tuple(sorted(chosen, key=lambda one: one[0]))


def each(how: str = "step", policy: str = "fp32") -> Iterator[Case]:
    """One small case for every part there is: what fails here needs no luck to be found."""
    layers = tuple(part for part in LAYERS if part.name in ("act module", "layer norm"))
    plain = Case(
        seed=0, layers=layers, start=STARTS[2], loss=LOSSES[0], optimizer="torch.optim.AdamW(m.parameters(), lr=0.05, eps=1e-2)",
        how=how, policy=policy,
    )  # fmt: skip
    for start in STARTS:
        yield replace(plain, start=start, layers=layers[:1])
    for loss in LOSSES:
        yield replace(plain, loss=loss, layers=layers[:1])
    for layer in LAYERS:
        yield replace(plain, layers=(layer,), modes=(0.5, 0.9, 0.1, 0.5))
    for optimizer in optimizers.OPTIMIZERS:
        made = optimizer.format(groups=optimizers.GROUPS[3].format(other="'lr': 0.02"), lr=0.05)
        yield replace(plain, layers=layers[:1], optimizer=made, scheduler=optimizers.SCHEDULERS[2], clip=0.5)
    for event in EVENTS if policy == "fp32" else ():
        if how == "step" or "skip" not in event.needs:
            yield replace(plain, events=((2, event),), optimizer=TWO_GROUPS)
    for window in (2, 3):
        yield replace(
            plain, window=window, sizes=((4, 5),) * 6, modes=(0.9, 0.9, 0.1, 0.1), layers=_named("late", "either")
        )


TWO_GROUPS = (
    "torch.optim.AdamW([{'params': [p for p in m.parameters() if p.dim() > 1]}, "
    "{'params': [p for p in m.parameters() if p.dim() < 2], 'lr': 0.02}], lr=0.05, eps=1e-2)"
)


def _named(*names: str) -> tuple[Part, ...]:
    return tuple(part for part in LAYERS if part.name in names)
