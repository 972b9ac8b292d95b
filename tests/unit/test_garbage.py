"""Python's cycle collector while a plan is made: held back, what was made is not walked, and the caller's word holds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from mpcompile.garbage import no_garbage_collection


class Thing:
    """Something that the collector tracks."""


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    was = gc.isenabled()
    gc.enable()
    yield
    gc.unfreeze()
    (gc.enable if was else gc.disable)()


def test_it_is_held_back_inside_and_runs_again_after() -> None:
    with no_garbage_collection():
        assert not gc.isenabled()
        with no_garbage_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_lets_it_run_again() -> None:
    with pytest.raises(ValueError, match="inside"), no_garbage_collection():
        raise ValueError("inside")
    assert gc.isenabled()


def test_it_stays_off_for_a_caller_who_has_switched_it_off() -> None:
    gc.disable()
    with no_garbage_collection():
        pass
    assert not gc.isenabled()


def test_what_was_made_inside_is_old() -> None:
    with no_garbage_collection():
        made = [Thing() for _ in range(10)]
    young = {id(one) for generation in (0, 1) for one in gc.get_objects(generation)}
    assert young.isdisjoint(map(id, made))
    assert gc.get_freeze_count() == 0


def test_a_cycle_of_the_caller_s_is_collected_first() -> None:
    gc.disable()  # so that nothing else takes it
    one = Thing()
    one.own = one  # type: ignore[attr-defined]
    seen = weakref.ref(one)
    del one
    gc.enable()
    with no_garbage_collection():
        assert seen() is None


def test_what_the_caller_has_frozen_stays_frozen() -> None:
    """Asked of one object: how many are frozen, another thread or a finalizer may change."""
    one = Thing()
    gc.collect()
    gc.freeze()
    with no_garbage_collection():
        pass
    assert not any(held is one for held in gc.get_objects()), "frozen objects are in no generation"
    gc.unfreeze()
    assert any(held is one for held in gc.get_objects())
