"""What is asked of a model and of overrides before anything is compiled."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

from torch import nn

from mpcompile.aten.facts import LOW_DTYPES
from mpcompile.compiler import Settings
from mpcompile.errors import CaptureError
from mpcompile.passes.classify import refuse_unmatched
from mpcompile.rules.table import rules_for
from mpcompile.runtime.sharded import refuse_sharded


def check_model(model: Any) -> None:
    """Refuse what cannot be trained in mixed precision.

    Raises:
      CaptureError: MP103, MP104, MP105, MP107, MP108.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError("MP105", f"mpcompile() was given a {type(model).__name__}", try_="an nn.Module, an "
                           "ExportedProgram, an onnx.ModelProto, or the path of an .onnx file")  # fmt: skip
    refuse_sharded(model)
    named = [(n, p) for n, p in model.named_parameters() if p.is_floating_point()]
    for name, parameter in named:
        if parameter.is_meta:
            raise CaptureError("MP104", "a parameter is on the meta device", where=name,
                               try_="model.to_empty(device='cpu'), then load or initialise")  # fmt: skip
        if parameter.requires_grad and parameter.dtype in LOW_DTYPES:
            raise CaptureError("MP103", f"a trainable parameter is {str(parameter.dtype).removeprefix('torch.')}",
                               where=name, why="FP32 parameters are the masters that updates are added to",
                               try_="model.float(), or requires_grad_(False) to use it as it is; for PEFT's adapters "
                               "get_peft_model(model, config, autocast_adapter_dtype=True)")  # fmt: skip


def check_overrides(model: nn.Module, settings: Settings) -> None:
    """Refuse now what can name nothing later: no module path, no operation, no node (nodes are named after operations).

    Raises:
      RuleError: MP203, with near names; MP207, for ranges of another model.
    """
    if settings.ranges is not None:
        settings.ranges.check({name: p.shape for name, p in model.named_parameters()})
    paths = [name for name, _ in model.named_modules() if name]
    ops = [rule.op for rule in rules_for("aten")]
    known = [*paths, *ops, *(f"{op}.default" for op in ops), *(op.partition(".")[2] for op in ops)]
    for option, globs in settings.overrides().items():
        words = [g for g in globs if not callable(g)]
        hopeless = [g for g in words if not _may_match(g, known)]
        refuse_unmatched(hopeless, option, known)


def _may_match(glob: str, known: list[str]) -> bool:
    stem = re.sub(r"(_\d+)?(\.\w+)?$", "", glob)
    return any(fnmatch.fnmatchcase(name, g) for name in known for g in {glob, stem, f"{glob}.*"})
