"""A converted ONNX model: its plan, its report, its sessions and its file."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from mpcompile.errors import OnnxError
from mpcompile.formats import LOW
from mpcompile.garbage import no_garbage_collection
from mpcompile.graph import PrecisionGraph
from mpcompile.onnx.options import Options, row_of
from mpcompile.onnx.read import reader as frontend
from mpcompile.onnx.run import calibrate as calibrate_room
from mpcompile.onnx.run import session as ort
from mpcompile.onnx.run.calibrate import OutputError
from mpcompile.onnx.run.generate import NotRun, on_generated
from mpcompile.onnx.write import check as onnx_check
from mpcompile.onnx.write import edits as onnx_write
from mpcompile.onnx.write.message import Written
from mpcompile.passes.base import Pass
from mpcompile.passes.measured_hazards import Measured
from mpcompile.pipeline import History, StepRecord
from mpcompile.policy import Policy

if TYPE_CHECKING:
    from mpcompile.report.comparison import Comparison


# ONNX Runtime's CPU provider puts casts around FP16 nodes and looks through all nodes for the name of each: the time to
# load goes with the square of their number (0.6 s at 1,000, 6 s at 4,000, some minutes at 20,000).
FP16_NODES = 2000
SLOW_TO_LOAD = "the CPU provider's time to load FP16 goes with the square of its nodes"


@dataclass
class OnnxMixedPrecision:
    """A converted ONNX model.

    Fields:
      policy, options: what was asked for.
      capture: the model as it was read; its graph is the one before the passes.
      graph: the precision graph after the passes.
      steps: what each pass did.
      notes: lines for the user: a raised opset, checks that could not be made, unknown operators.
      ranges: what the values were on the sample inputs, when there were any.
      errors: how far each output is off on the sample inputs, worst first, in true low-precision numerics.
      kept: nodes that `auto` keeps FP32.
      passes: what decided, in order.
      replan: decides again on a capture, of (policy, options, capture).
    """

    policy: Policy
    options: Options
    capture: frontend.OnnxCapture
    graph: PrecisionGraph
    steps: list[StepRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ranges: dict[str, Measured] = field(default_factory=dict)
    errors: list[OutputError] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    passes: Sequence[Pass] = field(default=(), repr=False)
    replan: Callable[..., OnnxMixedPrecision] | None = field(default=None, repr=False)

    @cached_property
    def _written(self) -> Written:
        return self.written(self.options.simulate)

    @property
    def ir_model(self) -> ir.Model:
        """The rewritten model; large weights are converted when they are read."""
        return self._written.ir()

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The rewritten model as one message.

        Raises:
          OnnxError: MP604, above 2 GB.
        """
        if self.is_large:
            size = self._written.weight_bytes / 1e9
            raise OnnxError("MP604", f"the model has {size:.1f} GB of weights", try_=".save(path)")
        return self._written.message()

    @property
    def is_large(self) -> bool:
        """True when the weights go to a data file."""
        return self._written.weight_bytes > onnx_check.EXTERNAL_FROM

    def simulated(self) -> onnx.ModelProto:
        """The same plan with FP32 operators and rounded values: its numbers are the low type's, on any provider."""
        return self.model if self.options.simulate else self.written(True).message()

    def _stand_in(self) -> Any:
        """The simulation, as a session takes it."""
        return (self._written if self.options.simulate else self.written(True)).loadable()

    def compare(self, samples: Any) -> list[OutputError]:
        """How far each output is off on `samples`, worst first, in true low-precision numerics (simulated)."""
        feeds = calibrate_room.samples(samples)
        return calibrate_room.compare(self._stand_in(), feeds, calibrate_room.reference(self.capture.source, feeds))

    def compare_nodes(self, samples: Any = None, *, autocast: bool = False) -> Comparison:
        """Every value of the plan beside FP32's, on `samples` or generated inputs; `autocast`: its decisions beside them.

        Raises:
          OnnxError: MP606, for samples that cannot be read, or a model that does not run on generated ones.
        """
        from mpcompile.onnx.compare import compare

        notes = list[str]()
        if samples is not None:
            feeds = calibrate_room.samples(samples)
        else:
            try:
                said, feeds = on_generated(self.capture, lambda feeds, _: (
                    calibrate_room.reference(self.capture.source, feeds), feeds)[1])  # fmt: skip
            except NotRun as why:
                raise OnnxError("MP606", f"there are no samples, and {why}", try_="samples='data.npz'") from why
            notes.append(f"on {said}")
        found = compare(self, feeds, notes)
        if not autocast or self.policy.low not in LOW or self.replan is None:
            return found
        plain = replace(self.options, keep_fp32=(), low=())
        other = self.replan(replace(self.policy, plan="autocast"), plain, self.capture)
        if not any(node.precision in LOW for node in other.graph):
            return replace(found, notes=(*found.notes, "plan=autocast runs nothing low here"))
        return replace(found, autocast=compare(other, feeds))

    def verify(self, samples: Any = None) -> list[OutputError]:
        """`compare` on `samples`, or on generated inputs, with what is not finite an error; empty when nothing ran.

        Raises:
          OnnxError: MP605.
        """
        if samples is not None:
            self.errors = self.compare(samples)
        else:
            stand_in, source = self._stand_in(), self.capture.source
            try:
                said, self.errors = on_generated(self.capture, lambda feeds, bounds: calibrate_room.compare(
                    stand_in, feeds, calibrate_room.reference(source, feeds, bounds), bounds))  # fmt: skip
            except NotRun as why:
                self.notes.append(f"outputs not compared, {why}: give samples")
                return []
            self.notes.append(f"outputs compared on {said}, in true {self.policy.low} numerics")
        if not math.isfinite(worst(self)):
            bad = ", ".join(error.name for error in self.errors if not math.isfinite(error.relative))
            raise OnnxError("MP605", f"outputs are not finite where the model's own are: {bad}",
                            try_="calibrate= with samples and auto=True, or keep_fp32 on what overflows")  # fmt: skip
        return self.errors

    def written(self, simulate: bool) -> Written:
        """The plan as a model, plain or simulated."""
        low_inputs = "" if self.options.keep_io or self.policy.low not in LOW else self.policy.low
        with no_garbage_collection():
            return onnx_write.write(self.capture, self.graph, simulate=simulate, annotated=self.options.annotate,
                                    low_inputs=low_inputs)  # fmt: skip

    def report(self) -> Any:
        """What was decided for each node, and why. See `mpcompile.report.model.Report`."""
        from mpcompile.report.model import build_report

        return build_report(self.graph, self.policy, row_of(self.policy, self.options), steps=self.steps,
                            before=self.capture.graph, history=self.history)  # fmt: skip

    def _repr_html_(self) -> str:
        """For notebooks: the report, and the notes."""
        from mpcompile.report.html import fragment

        return fragment(self.report(), self.notes)

    @property
    def history(self) -> History:
        """The graph as it was read, and the passes that decided on it."""
        return History(self.capture.graph, self.passes)

    def session(self, providers: Sequence[str] | None = None, options: Any = None) -> Any:
        """An `onnxruntime.InferenceSession` of the converted model, on CUDA and the CPU unless `providers` says else.

        One line about where it runs goes to the logger "mpcompile".
        """
        held = ort.session(self.model, providers, options or self.options.session_options)
        logging.getLogger("mpcompile").info(ort.placed(held, ort.wanted(providers)))
        return held

    def run(self, **feeds: Any) -> dict[str, Any]:
        """Run the converted model once, on the providers installed here: name of each output -> array."""
        return ort.run(self._session, feeds)

    @cached_property
    def _session(self) -> Any:
        return self.session()

    def check(self) -> None:
        """The full checker, strict shape inference and a session of ONNX Runtime.

        Raises:
          OnnxError: MP602, MP603.
        """
        if not self.is_large:  # if it is, `save` checks the file
            self._check(self._written.loadable())

    def _check(self, model: Any) -> None:
        loads = None
        if self._needs_stand_in:
            loads = self.written(True).loadable()
            if self.policy.low == "fp16":
                self.notes.append(f"loaded as its simulation, without {self.options.provider} here: {SLOW_TO_LOAD}")
        self.notes += onnx_check.check(model, lambda: self.capture.source, loads, self.options.session_options)

    @property
    def _needs_stand_in(self) -> bool:
        """For a provider that is not installed here: BF16, which the CPU has no kernels for, and much FP16."""
        if self.options.simulate or not self.options.provider or ort.has_provider(self.options.provider):
            return False
        low = sum(node.precision == "fp16" for node in self.graph) if self.policy.low == "fp16" else 0
        return self.policy.low == "bf16" or low > FP16_NODES

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model; weights beyond 2 GB go to ``<name>.data`` beside it, one tensor at a time.

        The file appears whole or not at all, and only after every check.

        Raises:
          OnnxError: MP602, MP603.
        """
        name = Path(path).name

        def fill(folder: Path) -> None:
            if not self.is_large:
                (folder / name).write_bytes(self.model.SerializeToString())
                return
            ir.save(self.ir_model, folder / name, external_data=f"{name}.data")
            self._check(folder / name)

        onnx_check.save_atomic(path, fill)


def worst(made: OnnxMixedPrecision) -> float:
    """The largest relative error of an output."""
    return made.errors[0].relative if made.errors else 0.0
