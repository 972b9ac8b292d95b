"""What a capture changes for its thread, it changes for no other, and for no longer than it lasts."""

from __future__ import annotations

import logging
import threading
import types

import pytest
import torch

from mpcompile.aten.surroundings import quiet_torch
from mpcompile.torch_internals.patches import as_if_compiling, replaced


def elsewhere(call: object) -> object:
    """What `call` gives in another thread."""
    found = list[object]()
    thread = threading.Thread(target=lambda: found.append(call()))  # type: ignore[operator]
    thread.start()
    thread.join()
    return found[0]


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_torchs_log_is_quiet_in_this_thread_alone_and_no_level_moves() -> None:
    log, handler = logging.getLogger("torch"), Kept()
    log.addHandler(handler)
    child, level = logging.getLogger("torch.fx.some"), log.level
    try:
        with quiet_torch():
            child.error("mine")
            logging.getLogger("other").error("not torch's")
            elsewhere(lambda: child.error("another thread's"))
            assert log.level == level
        child.error("after")
    finally:
        log.removeHandler(handler)
    assert handler.texts == ["another thread's", "after"]
    assert not handler.filters


def test_torchs_log_is_loud_again_after_an_error() -> None:
    log, handler = logging.getLogger("torch"), Kept()
    log.addHandler(handler)
    try:
        with pytest.raises(ValueError, match="in it"), quiet_torch():
            raise ValueError("in it")
        log.error("after")
    finally:
        log.removeHandler(handler)
    assert handler.texts == ["after"]


def test_only_this_thread_takes_itself_for_compiled() -> None:
    before = torch.compiler.is_compiling
    with as_if_compiling():
        assert torch.compiler.is_compiling()
        assert elsewhere(lambda: torch.compiler.is_compiling()) is False
    assert torch.compiler.is_compiling is before
    assert not torch.compiler.is_compiling()


def test_what_was_absent_is_absent_again() -> None:
    owner = types.SimpleNamespace(a=1)
    with replaced(owner, a=2, b=3):
        assert (owner.a, owner.b) == (2, 3)
    assert vars(owner) == {"a": 1}
