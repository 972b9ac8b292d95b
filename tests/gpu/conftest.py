"""What several tests on a GPU use."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def no_sync() -> Iterator[Any]:
    """Call it, and whatever waits for the device is an error until the test ends."""

    def refuse() -> None:
        with warnings.catch_warnings():
            # torch says that the mode is a prototype.
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")

    before = torch.cuda.get_sync_debug_mode()
    yield refuse
    torch.cuda.set_sync_debug_mode(before)
