"""A whole training step as one ONNX model: forward, backward and update in elementary operations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import onnx
import onnx_ir as ir
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpcompile.onnx.export.step import OnnxStep, step_to_onnx
from mpcompile.onnx.write import check as onnx_check
from mpcompile.onnx.write.simulate import simulate
from mpcompile.policy import Policy
from mpcompile.training.emitted.weave import Emitted, emit
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.gradients.specialization import compiling


class Step(Protocol):
    """What is asked of a `mpcompile.training.step.TrainStep`."""

    context: Any
    specializations: Any

    @property
    def policy(self) -> Policy: ...


def emit_step(step: Step, batch: Batch) -> tuple[Emitted, Any]:
    """The emitted step for `batch` without running it, and the update that it was woven from."""
    # Attention in its elementary operations: fused kernels have no ONNX form of their backward.
    with sdpa_kernel(SDPBackend.MATH), compiling():
        specialization = step.specializations.find(batch)
        step.context.shadows.bring_up_to_date()
        updater = _traced(step, specialization)
        emitted, _ = emit(specialization, updater)
    return emitted, updater


def _traced(step: Step, specialization: Any) -> Any:
    """The update in elementary operations: fused optimizer kernels have no ONNX form."""
    return step.context.build(specialization.layout, specialization.gradients(), fused=False)


def export_step(step: Step, specialization: Any, path: str | os.PathLike[str]) -> OnnxStep:
    """Write the step that `specialization` is part of; see `TrainStep.export_onnx`."""
    with sdpa_kernel(SDPBackend.MATH), compiling():
        updater = _traced(step, specialization)
        emitted, joint = emit(specialization, updater)
    batch = {number: joint.forward.fakes[place] for place, number in specialization.args}
    tensors = [torch.zeros([int(n) for n in batch[i].shape], dtype=batch[i].dtype) if i in batch else torch.zeros(())
               for i in range(max(batch, default=-1) + 1)]  # fmt: skip
    made = step_to_onnx(emitted.module, emitted.arguments(tensors), step.policy.low)
    write_step(made, path)
    return made


def write_step(step: OnnxStep, path: str | os.PathLike[str]) -> None:
    """Check the model of a step and write it.

    Raises:
      OnnxError: MP602, MP603; nothing is written.
    """
    name = Path(path).name
    proto = ir.to_proto(step.model)

    def fill(folder: Path) -> None:
        onnx.save(proto, folder / name)
        stand_in = ir.to_proto(simulate(step.model))
        onnx_check.check(proto, lambda: stand_in, loads=stand_in)

    onnx_check.save_atomic(path, fill)
