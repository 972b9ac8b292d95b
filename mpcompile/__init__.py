"""Mixed-precision training as a compiler pass: `mpcompile(model)`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpcompile import optim, rules
    from mpcompile.api import MixedPrecisionModule, mpcompile
    from mpcompile.errors import MPCompileError
    from mpcompile.policy import Policy
    from mpcompile.ranges import Call
    from mpcompile.training.checkpoint_file import load_checkpoint, save_checkpoint
    from mpcompile.training.loss_scale.scale import LossScale

__version__ = "0.1.0"

# Name -> the module that has it: torch and onnx are imported when a name that needs them is first used.
_HOMES = {
    "Call": "mpcompile.ranges",
    "mpcompile": "mpcompile.api",
    "MixedPrecisionModule": "mpcompile.module",
    "MPCompileError": "mpcompile.errors",
    "Policy": "mpcompile.policy",
    "LossScale": "mpcompile.training.loss_scale.scale",
    "load_checkpoint": "mpcompile.training.checkpoint_file",
    "save_checkpoint": "mpcompile.training.checkpoint_file",
}


def __getattr__(name: str) -> Any:
    if name in ("optim", "rules"):
        return importlib.import_module(f"mpcompile.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mpcompile' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "Call",
    "LossScale",
    "MPCompileError",
    "MixedPrecisionModule",
    "Policy",
    "__version__",
    "load_checkpoint",
    "mpcompile",
    "optim",
    "rules",
    "save_checkpoint",
]
