"""Where speech models of transformers draw their masks of time and of features with numpy (SpecAugment)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

# (shape, mask_prob, mask_length, attention_mask=None, min_masks=0) -> a bool array of that shape.
NAME = "_compute_mask_indices"


def modules_of(model: nn.Module) -> Sequence[Any]:
    """The modules of Python that the model's classes are of and that have such a function of transformers'."""
    names = dict.fromkeys(cls.__module__ for part in model.modules() for cls in type(part).__mro__)
    found = [sys.modules[name] for name in names if NAME in vars(sys.modules.get(name, sys))]
    return [one for one in found if str(vars(one)[NAME].__module__).partition(".")[0] == "transformers"]


__all__ = ["NAME", "modules_of"]
