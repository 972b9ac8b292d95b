"""The training step on ONNX Runtime: the emitted step as one model, its state kept between steps.

DoubleBuffer lives in two buffers per tensor: a step reads one and writes the other, and then they change places; nothing is
copied.  The torch parameters and the optimizer's state are brought up to date on demand (`sync`), and taken in again
when somebody edited them.  Where no provider has the low type's kernels, the step's simulation runs: FP32 operators
and rounded values, the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from mpcompile.errors import RuntimeFailure
from mpcompile.formats import FORMATS, LOW
from mpcompile.onnx.export.step import OnnxStep, step_to_onnx
from mpcompile.onnx.export.whole_step import emit_step, write_step
from mpcompile.onnx.run.session import has_provider
from mpcompile.onnx.run.session import session as make_session
from mpcompile.onnx.write import check as onnx_check
from mpcompile.onnx.write.simulate import simulate
from mpcompile.torch_internals.tensors import version
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.result import StepResult
from mpcompile.training.step import TrainStep

ONNX_TYPES = {
    **{getattr(torch, one.torch): onnx.TensorProto.DataType.Value(one.onnx) for one in FORMATS if one.storable},
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.int64: onnx.TensorProto.INT64, torch.int32: onnx.TensorProto.INT32, torch.bool: onnx.TensorProto.BOOL,
    torch.uint8: onnx.TensorProto.UINT8, torch.int8: onnx.TensorProto.INT8, torch.int16: onnx.TensorProto.INT16,
}  # fmt: skip


@dataclass
class CompiledStep:
    """The step for one signature of the batch.

    Fields:
      places: input name -> the live torch tensor, for the state; batch: input name -> number among the tensors.
    """

    step: OnnxStep
    session: ort.InferenceSession
    updater: Any
    live: dict[str, Tensor]
    batch: dict[str, int]
    numbers: str


@dataclass
class DoubleBuffer:
    """Two buffers of one tensor: `now` is read, `then` is written."""

    now: ort.OrtValue
    then: ort.OrtValue
    live: Tensor
    written: bool = False


class OrtTrainStep:
    """`mp.train_step(optimizer, …, backend="onnxruntime")`: called as `TrainStep` is.

    Raises:
      RuntimeFailure: MP711. OnnxError: MP607, MP608, for operations without an ONNX form.
    """

    def __init__(self, owner: Any, optimizer: Any, loss_fn: Callable[..., Any] | None = None,
                 *, accumulate: int = 1, masters: str = "full", states: str = "fp32", cuda_graph: Any = "auto",
                 providers: Any = None, **options: Any) -> None:  # fmt: skip
        if accumulate != 1 or masters != "full" or states != "fp32" or cuda_graph is True:
            only = "accumulate=1, masters='full' and states='fp32' only"
            raise RuntimeFailure("MP711", f"backend='onnxruntime' has {only}")
        options.pop("backend", None)
        self.torch_step = TrainStep(owner, optimizer, loss_fn, backend="eager", **{**options, "chunk_loss": False})
        if self.torch_step.ranks is not None:
            raise RuntimeFailure("MP711", "backend='onnxruntime' trains in one process", why="ONNX has no collectives",
                                 try_="backend='inductor'")  # fmt: skip
        self._device = "cuda" if has_provider("cuda") and self.torch_step.device.type == "cuda" else "cpu"
        self.low, self.optimizer, self.providers = self.torch_step.policy.low, optimizer, providers
        # Counts the steps for dropout: part of the state, so that a step that is run again drops the same.
        self.dropout_seed = torch.tensor(torch.initial_seed() % 2**31)
        self._compiled: dict[Any, CompiledStep] = {}
        self._state: dict[int, DoubleBuffer] = {}
        self._versions: dict[int, int] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> StepResult:
        """Run one batch; the state stays with ONNX Runtime until `sync`."""
        batch = Batch(args, kwargs)
        held = self._find(batch)
        self._take_edits()
        binding = held.session.io_binding()
        for name in held.step.inputs:
            binding.bind_ortvalue_input(name, self._input(held, name, batch))
        for name in ("loss", "finite", "grad_norm", "scale"):
            binding.bind_output(name)
        for name, output in held.step.written:
            binding.bind_ortvalue_output(output, self._state[id(held.live[name])].then)
        held.session.run_with_iobinding(binding)
        for name, _ in held.step.written:
            state = self._state[id(held.live[name])]
            state.now, state.then, state.written = state.then, state.now, True
            if state.then.device_name() != self._device:  # what came from torch, in the host's memory
                state.then = _buffer(state.live, self._device)
        loss, finite, norm, scale = (torch.from_numpy(np.array(v.numpy())) for v in binding.get_outputs()[:4])
        self.torch_step.optimizers.note_step()
        return StepResult(loss, finite, finite, scale, norm)

    def sync(self) -> None:
        """Bring the torch parameters, buffers and optimizer state up to date."""
        with torch.no_grad():
            for state in self._state.values():
                if state.written:
                    state.live.copy_(_tensor(state.now).reshape(state.live.shape))
                    state.written = False
        self._note_versions()
        for counters in self.torch_step.monitor.counters:
            counters.note()

    def state_dict(self) -> dict[str, Any]:
        """The torch step's, and ``dropout_seed``. Reads the device."""
        self.sync()
        return {**self.torch_step.state_dict(), "dropout_seed": int(self.dropout_seed)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.sync()
        self.torch_step.load_state_dict(saved)
        self.dropout_seed.fill_(saved.get("dropout_seed", int(self.dropout_seed)))
        self._compiled.clear()
        self._state.clear()

    def export_onnx(self, path: str | os.PathLike[str]) -> OnnxStep:
        """Write the step of the last batch as one ONNX model, whose state goes in and comes out."""
        if not self._compiled:
            raise RuntimeFailure("MP711", "the step has not run yet", try_="call it once with a batch")
        step = list(self._compiled.values())[-1].step
        write_step(step, path)
        return step

    @property
    def context(self) -> Any:
        return self.torch_step.context

    # -------------------------------------------------------------------------------------------------------- inside

    def _find(self, batch: Batch) -> CompiledStep:
        if self.torch_step.follow() or self.torch_step.monitor.look_at_state():
            # Another model, or another state of the optimizer, than what ONNX Runtime holds.
            self._take_edits()
            self.sync()
            self._compiled.clear()
            self._state.clear()
        key = (batch.signature(), batch.shapes(), self.torch_step.identity.modes())
        held = self._compiled.get(key)
        if held is None or not held.updater.holds():
            self.sync()
            held = self._compiled[key] = self._compile(batch)
        return held

    def _compile(self, batch: Batch) -> CompiledStep:
        emitted, updater = emit_step(self.torch_step, batch)
        step = step_to_onnx(emitted.module, emitted.arguments(batch.tensors), self.low)
        model = step.model
        if self.low in LOW and self._device == "cpu":
            onnx_check.check_types(ir.to_proto(model))
            model = simulate(model)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        made = make_session(ir.to_proto(model), self.providers, options)
        state = [*emitted.inputs, self.dropout_seed] if step.seeded else emitted.inputs
        live = {name: held for name, held in zip(step.inputs, state, strict=True) if held is not None}
        numbers = next((name for name, held in live.items() if held is updater.numbers), "")
        batched = {step.inputs[place]: number for place, number in emitted.batch.items()}
        for tensor in live.values():
            self._adopt(tensor)
        self._note_versions()
        self.torch_step.monitor.accept()
        return CompiledStep(step, made, updater, live, batched, numbers)

    def _input(self, held: CompiledStep, name: str, batch: Batch) -> ort.OrtValue:
        if name in held.batch:
            return _ortvalue(batch.tensors[held.batch[name]])
        if name == held.numbers:
            return _ortvalue(held.updater.numbers)
        return self._state[id(held.live[name])].now

    def _adopt(self, tensor: Tensor) -> None:
        if id(tensor) not in self._state:
            self._state[id(tensor)] = DoubleBuffer(_ortvalue(tensor), _buffer(tensor, self._device), tensor)

    def _take_edits(self) -> None:
        """Somebody changed a live tensor (a loaded checkpoint, an edit in place): take in all, shadows refreshed."""
        edited = [s for key, s in self._state.items() if self._versions.get(key) != version(s.live)]
        if not edited:
            return
        for state in edited:
            state.written = False  # the edit counts, not what the last step wrote
        self.sync()
        self.torch_step.context.shadows.refresh()
        for state in self._state.values():
            state.now = _ortvalue(state.live)
        self._note_versions()

    def _note_versions(self) -> None:
        self._versions = {key: version(state.live) for key, state in self._state.items()}


def _ortvalue(tensor: Tensor) -> ort.OrtValue:
    """A copy of `tensor` that ONNX Runtime owns."""
    held = tensor.detach().cpu().contiguous()
    if held.dtype == torch.bfloat16:
        bits = held.view(torch.uint16).numpy().copy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(held.numpy().copy())


def _buffer(tensor: Tensor, device: str) -> ort.OrtValue:
    """Memory of ONNX Runtime for a tensor like this one."""
    return ort.OrtValue.ortvalue_from_shape_and_type(list(tensor.shape), ONNX_TYPES[tensor.dtype], device, 0)


def _tensor(value: ort.OrtValue) -> Tensor:
    import torch.utils.dlpack

    return torch.utils.dlpack.from_dlpack(value._ortvalue)
