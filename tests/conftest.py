"""Options and settings of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton asks when it is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Shared machines are slow at times: a slow example is no failure.
settings.register_profile("mpcompile", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mpcompile")

# "auto" and plans are those of one row here, whatever this machine is (tests of the device file name their own).
os.environ["MPCOMPILE_DEVICES"] = str(Path(__file__).with_name("devices.toml"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens", action="store_true", help="rewrite the golden texts from what the code does now"
    )
