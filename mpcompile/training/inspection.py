"""What a training step shows of itself: its emitted graph, the report, the exports, the cause of an overflow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from mpcompile.errors import TrainingError
from mpcompile.training.accumulation import Layout
from mpcompile.training.distributed.gathered import first_of, joined
from mpcompile.training.distributed.ranks import Ranks
from mpcompile.training.distributed.reduce import Reducer
from mpcompile.training.distributed.scatter import Scatterer
from mpcompile.training.emitted.weave import Emitted, emit, origins, precision_graph
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.gradients.joint import Joint
from mpcompile.training.gradients.specialization import Specialization, SpecializationCache, compiling
from mpcompile.training.loss_scale.overflow import Overflow, explain
from mpcompile.training.loss_scale.scale import LossScale
from mpcompile.training.optimizer.build import UpdateContext
from mpcompile.training.optimizer.update_cache import Like, UpdateCache
from mpcompile.training.runner import Runner
from mpcompile.training.step_log import StepLog, writer_of

if TYPE_CHECKING:
    from mpcompile.ranges import Ranges
    from mpcompile.training.numerics.fp8_counts import CopyCount


class Inspection:
    """The views of a step; it runs nothing of them in a call."""

    specializations: SpecializationCache
    context: UpdateContext
    rule: LossScale
    runner: Runner
    updates: UpdateCache
    _log: StepLog | None = None
    ranks: Ranks | None
    sums_reducer: Reducer | Scatterer | None

    @property
    def graph(self) -> fx.GraphModule:
        """The emitted step, as it stands after the last call: one graph; calling it runs a step.

        Its inputs are `self.emitted()[0].arguments(batch tensors)`; call it under ``torch.no_grad()``.

        Raises:
          TrainingError: MP542, before the first update.
        """
        return self.emitted()[0].module

    def emitted(self) -> tuple[Emitted, Joint]:
        """The emitted step with its live inputs, and the joint graph that it was woven from."""
        specialization, layout, like = self._latest()
        strides = specialization.strides if self.context.accumulate == 1 else None
        updater = self.updates.find(*self.context.of_rank(layout, strides, like))
        key = id(specialization), id(updater)
        if key not in self.updates.emitted:
            window = dict(zip((n for n, _ in layout), like(), strict=True)) if self.context.accumulate > 1 else None
            with compiling():
                made = emit(specialization, updater, window, self.sums_reducer)
            self.updates.emitted.clear()
            self.updates.emitted[key] = made
        return self.updates.emitted[key]

    @property
    def compile_seconds(self) -> float:
        """Seconds that the passes took for the graphs compiled so far."""
        return sum(specialization.joint.forward.plan.seconds for specialization in self.specializations)

    @property
    def saved_bytes(self) -> tuple[int, int]:
        """(all, those in FP32): what the last call's forward kept for its backward, parameters and shadows apart.

        Known where forward and backward are compiled; zero with backend="eager".

        Raises:
          TrainingError: MP542, before the first update.
        """
        return self._latest()[0].saved_bytes()

    def export_onnx(self, path: Any) -> Any:
        """Write the step of the last batch as one plain ONNX model, whose state goes in and comes out.

        Raises:
          TrainingError: MP542. OnnxError: MP602, MP603 (nothing is written), MP607, MP608.
        """
        from mpcompile.onnx.export.whole_step import export_step

        if self.ranks is not None:
            raise TrainingError("MP535", "the step of several ranks has no ONNX form", why="ONNX has no collectives",
                                try_="export a step of one process, without process_group= and DDP")  # fmt: skip
        whole: Any = self
        return export_step(whole, self._latest()[0], path)

    def report(self) -> Any:
        """What was decided for each node of the emitted step, and why. See `mpcompile.report.model.Report`."""
        from mpcompile.report.model import build_report

        emitted, joint = self.emitted()
        plan = joint.forward.plan
        graph = precision_graph(emitted, joint)
        return build_report(graph, plan.policy, plan.row, steps=plan.steps, history=plan.history,
                            code=plan.capture.code)  # fmt: skip

    def log_to(self, writer: Any, every: int = 10) -> StepLog | None:
        """Write the step's numbers to `writer` from now on: loss, loss scale, gradient norm, skipped updates, seconds.

        They are read every `every` updates at once; in between nothing waits for the device. Where the last update of a
        period was skipped, the node and module that overflowed are looked for in its batch. Call ``.read()`` of what this
        returns at the end of a training. Of several ranks one alone may log: it looks in its own batch, and asks no other.

        Args:
          writer: a path (a file for `mpcompile watch`), TensorBoard's `SummaryWriter`, MLflow, a Weights & Biases run, or an
            object with ``scalar(tag, value, step)`` and ``text(tag, text, step)``; None ends the log.

        Raises:
          TrainingError: MP563, for anything else.
        """
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise TrainingError("MP563", f"every={every!r}: a number of updates", try_="step.log_to(writer, every=10)")
        made = StepLog(writer_of(writer), every, self._own_overflow) if writer is not None else None
        self._log = made
        return made

    def calibrate(self, batches: Iterable[Any]) -> Ranges:
        """Measure values and gradients on `batches` with the weights as they are, and plan anew by what was measured.

        What FP16 cannot hold stays FP32 from the next call on (it compiles again); so it does in what `mp` plans later. A
        batch is a tensor, a tuple of arguments or a dict of keywords. No weight, state or random number changes.
        With several ranks all must call it, each with its batches: what any of them saw is the plan of all.

        Raises:
          CaptureError: MP101. TrainingError: MP561.
        """
        from mpcompile.training.numerics.calibrate import calibrate

        whole: Any = self
        owner, specializations = whole._made_of[0], self.specializations
        with whole.full_masters():
            found = calibrate(specializations.model, specializations.settings, batches, specializations.loss_fn)
        found = found if self.ranks is None else joined(self.ranks, found)
        specializations.settings = replace(specializations.settings, ranges=found)
        owner.__dict__["settings"] = replace(owner.settings, ranges=found)
        whole._renew()
        whole.team.forget()
        return found

    def explain_overflow(self, *args: Any, **kwargs: Any) -> Overflow | None:
        """Run a batch again, node by node, and name the first node that makes a non-finite number; None if none does.

        The run is made with the loss scale before the last back-off, then with the present one. Nothing is changed:
        no weight, no state, no random number. Dropout draws anew, so name the batch of the step that was skipped.
        With several ranks all must call it, each with its batch; all are told of the first rank that overflows.
        """
        found = self._own_overflow(args, kwargs)
        return found if self.ranks is None else first_of(self.ranks, found)

    def fp8_counts(self, *args: Any, **kwargs: Any) -> list[CopyCount]:
        """Run a batch again, node by node, and count what each FP8 copy loses: elements that became zero or reached the
        format's end, by layer and operand; empty where nothing reads FP8.

        Nothing is changed: no weight, no state, no random number. The batch is the caller's own, with several ranks too.
        """
        from mpcompile.training.numerics.fp8_counts import counted

        with self._again(args, kwargs) as (specialization, joint, inputs):
            return counted(joint, specialization.seeded(inputs, self.context.seed), self.context.seed, origins(joint))

    @contextlib.contextmanager
    def _again(self, args: Any, kwargs: Any) -> Iterator[tuple[Specialization, Joint, list[Any]]]:
        """Inside, a batch can run again without a trace: (what is compiled for it, its plain graph, copies of its inputs)."""
        batch = Batch(args, kwargs)
        specialization = self.specializations.find(batch)
        with compiling():
            joint = specialization.plain_joint()
        shares = self.context.shares
        with (
            torch.random.fork_rng(),
            torch.no_grad(),
            contextlib.nullcontext() if shares is None else shares.readable(),
        ):
            self.context.shadows.bring_up_to_date()
            inputs = [t.clone() if isinstance(t, Tensor) else t for t in specialization.inputs(batch.tensors)]
            yield specialization, joint, inputs

    def _own_overflow(self, args: Any, kwargs: Any) -> Overflow | None:
        with self._again(args, kwargs) as (specialization, joint, inputs):
            names = origins(joint)
            for factor in (1.0 / self.rule.backoff, 1.0) if self.rule.kind == "dynamic" else (1.0,):
                found = explain(
                    joint, specialization.seeded(inputs, self.context.seed * factor), self.context.seed * factor, names
                )
                if found is not None:
                    return found
        return None

    def _latest(self) -> tuple[Specialization, Layout, Like]:
        """What the last update ran.

        Raises:
          TrainingError: MP542.
        """
        if self.runner.last is None:
            raise TrainingError("MP542", "the step has no graph yet", try_="call it once with a batch")
        return self.runner.last
