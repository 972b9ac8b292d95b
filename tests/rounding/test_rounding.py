"""The proof of what may be rounded: on every model of the suite we are no further from FP32 than CUDA's autocast is.

Bound: 1.5 times autocast's distance plus two roundings, for the loss, what the model returns and every gradient, each
relative to its tensor. A number that is not finite where autocast's is fails. Every run asserts that products ran low.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mpcompile import LossScale
from rounding.exceptions import bound_of, draws_of, is_open
from rounding.measure import ROUNDINGS, WAYS, Distance, autocast, distances, reference
from rounding.registry import ROWS
from rounding.suite import CASES, Case

LOWS = ("bf16", "fp16")
# Seen by every run of the tests: one case of each kind of loss, and some of the rest, always the same ones.
SAMPLED, SEED = 6, 20
# Compiled by Inductor in the slow tests.
COMPILED = 10


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Models of the suite may do what torch warns of; compiled graphs of one case are of no use to the next."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def sample() -> list[str]:
    draw = random.Random(SEED)
    rows = [
        draw.choice([c.name for c in CASES.values() if c.row == row and c.domain != "published"] or [""])
        for row in ROWS
    ]
    rest = [c.name for c in CASES.values() if not c.row and c.domain != "published"]
    return [name for name in rows if name] + draw.sample(rest, SAMPLED)


def measured(case: Case, low: str, way: str, backend: str) -> list[Distance]:
    ours, wanted, peer = WAYS[way](case, low, backend), reference(case), autocast(case, low)
    assert ours.low, f"{case.name}: no product ran low, so nothing is proved"
    assert peer.low, f"{case.name}: autocast ran nothing low"
    return distances(wanted, peer, ours)


def worse(case: Case, low: str, way: str, backend: str = "eager") -> list[str]:
    """What is outside the bound, in words: of several draws, by their median."""
    name = f"{case.name} {low} {way}"
    roundings = bound_of(name, ROUNDINGS)
    drawn = [measured(replace(case, draw=i), low, way, backend) for i in range(draws_of(name))]
    middle = [sorted(each, key=lambda d: d.excess(low, roundings))[len(each) // 2] for each in zip(*drawn, strict=True)]
    return [_line(d, low, roundings) for d in middle if d.excess(low, roundings) > 1]


def check(case: Case, low: str, way: str, backend: str = "eager") -> None:
    found = worse(case, low, way, backend)
    if is_open(f"{case.name} {low} {way}"):
        assert found, "it holds its bound now: its row in OPEN goes"
    else:
        assert found == []


def _line(d: Distance, low: str, roundings: float) -> str:
    return f"{low} {d.what}: {d.ours:.3g} from FP32, autocast {d.autocast:.3g} ({d.excess(low, roundings):.1f} times the bound)"


@pytest.mark.parametrize("name", sample())
def test_a_sample_of_the_suite(name: str) -> None:
    turn = sample().index(name)
    check(CASES[name], LOWS[turn % 2], list(WAYS)[turn // 2 % 2])


@pytest.mark.parametrize("name", ["published/deit", "published/deit_by_hand[0.02]", "published/deit_by_hand[0.004]"])
def test_a_deit_s_first_step_at_the_default_scale_does_not_overflow(name: str) -> None:
    """Its position and token parameters are sums over a batch: in FP16 they leave the range where autocast's do not."""
    case = CASES[name]
    assert case.scale == LossScale.dynamic().init
    peer = autocast(case, "fp16")
    assert all(tensor.isfinite().all() for tensor in peer.tensors.values())
    check(case, "fp16", "step")


def ways_of(case: Case) -> list[tuple[str, str]]:
    """Both types in both ways where the case stands for a kind of loss; else each type in one, by turns."""
    if case.row:
        return [(low, way) for low in case.lows for way in WAYS]
    turn = case.seed % 2
    return [(low, list(WAYS)[(turn + i) % 2]) for i, low in enumerate(case.lows)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_model(name: str) -> None:
    for low, way in ways_of(CASES[name]):
        check(CASES[name], low, way)


@pytest.mark.slow
@pytest.mark.parametrize("name", random.Random(SEED + 1).sample(list(CASES), COMPILED))
@pytest.mark.parametrize("way", WAYS)
def test_a_sample_compiled_by_inductor(name: str, way: str) -> None:
    for low in CASES[name].lows:
        check(CASES[name], low, way, "inductor")
