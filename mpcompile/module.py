"""The model in mixed precision: what `mpcompile(model)` gives."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import fx, nn

from mpcompile.aten.capture import export
from mpcompile.aten.exported import inline_regions
from mpcompile.aten.facts import LOW_DTYPES
from mpcompile.aten.recurrent import rnn_kept_opaque
from mpcompile.aten.write import write
from mpcompile.compiler import Plan, Settings, decide, log_plan
from mpcompile.errors import CaptureError, MPCompileError
from mpcompile.graph import joined
from mpcompile.hardware import device_of, emulated_kinds
from mpcompile.likeness import class_like
from mpcompile.policy import Policy
from mpcompile.runtime.buckets import bucket_bytes
from mpcompile.runtime.compiled import CompiledGraph
from mpcompile.runtime.coverage import (
    counting_breaks,
    warn_of_eager_call,
    warn_of_gaps,
    warn_of_watched_call,
    watched_method,
)
from mpcompile.runtime.dynamo import Compiler
from mpcompile.runtime.fp8_linear import FP8_LINEAR
from mpcompile.runtime.sharded import is_gathered, refuse_sharded, refuse_shared_out
from mpcompile.shadows.table import SHADOWS
from mpcompile.torch_internals.dynamo import BackendCompilerFailed, graphs_whole, hooks_guarded, is_watched
from mpcompile.torch_internals.groups import module_replaced
from mpcompile.torch_internals.modules import CALL_OF_A_WRAPPER, SHARED_TABLES, are_calls_taken, calls_taken
from mpcompile.torch_internals.tensors import pytree

if TYPE_CHECKING:
    from mpcompile.onnx.train_step import OrtTrainStep
    from mpcompile.ranges import Ranges
    from mpcompile.report.comparison import Comparison
    from mpcompile.report.model import Report
    from mpcompile.training.options import StepOptions
    from mpcompile.training.step import TrainStep


_ENTRIES = itertools.count()
# What a host replaces on a wrapper: hooks of its own stand around the call of the wrapper, and not of the model.
_OWN = frozenset({"forward", "training", *CALL_OF_A_WRAPPER})


class MixedPrecisionModule(nn.Module):
    """The model in mixed precision. Shares the model's parameters, buffers, submodules and names.

    Whoever asks takes it for its model: `isinstance`, its name, the signature of its ``forward``, its attributes (read,
    set and deleted) and its methods are the model's (`mpcompile.likeness`). ``type(mp)`` tells.
    """

    def __init__(self, model: nn.Module, settings: Settings, *, dynamic: bool | None, backend: str) -> None:
        super().__init__()
        hidden = self.__dict__
        hidden.update({name: getattr(model, name) for name in SHARED_TABLES})
        hidden["_model"], hidden["settings"], hidden["backend"] = model, settings, backend
        hidden["dynamic"] = dynamic
        hidden["_compiler"] = Compiler(
            settings, log_plan, functools.partial(_paths, model), functools.partial(is_gathered, model)
        )
        hidden["_calls"] = {}
        hidden["_inside"] = _inside(model, settings, dynamic, backend, hidden["_compiler"])
        hidden["_recurrent"] = False
        hidden["training"] = model.training

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The model's class, for `isinstance`; every question of Python's own goes by ``type(mp)``."""
        return type(self.__dict__.get("_model", self))

    @property
    def model(self) -> nn.Module:
        """The model that was given."""
        return self.__dict__["_model"]  # type: ignore[no-any-return]

    @property
    def policy(self) -> Policy:
        settings: Settings = self.settings
        return settings.policy

    @property
    def plans(self) -> list[Plan]:
        """What was decided for each graph compiled so far."""
        compiler: Compiler = self._compiler
        return compiler.plans

    @property
    def compile_seconds(self) -> float:
        """Seconds that mpcompile itself added to torch's compilation so far: tracing again, passes, writing."""
        compiler: Compiler = self._compiler
        return compiler.seconds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_watched():
            # Dynamo would take the model for one that it cannot compile, and never try again.
            warn_of_watched_call()
            return self.model(*args, **kwargs)
        refuse_shared_out(self.model)
        if self._inside is not None:
            with module_replaced(self.model, self._inside):
                return self.model(*args, **kwargs)
        # Under DistributedDataParallel a graph is cut at the buckets, and is another one.
        cap = bucket_bytes()
        call = self._calls.get(cap)
        if call is None:
            return self._first(cap, args, kwargs)
        before = CompiledGraph.runs
        result = self._full(self._run(call, args, kwargs))
        if CompiledGraph.runs == before and self.plans:
            refuse_sharded(self.model)
            warn_of_eager_call()
        return result

    def _full(self, result: Any) -> Any:
        """`result` in FP32, where the policy promises it and the graph broke: its last part gives what the program gives."""
        if not self._compiler.gave_low or self.policy.output != "fp32":
            return result
        return pytree.tree_map(lambda one: one.float() if getattr(one, "dtype", None) in LOW_DTYPES else one, result)

    def _run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            with hooks_guarded(), graphs_whole(), rnn_kept_opaque() if self._recurrent else contextlib.nullcontext():
                return call(*args, **kwargs)
        except BackendCompilerFailed as error:
            raise _own(error) from error

    def _first(self, cap: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entry = _entry(self.model)
        self._compiler.entries.add(entry.__code__.co_name)
        compiled = torch.compile(entry, backend=self._compiler, dynamic=self.dynamic)
        self.__dict__["_recurrent"] = any(isinstance(m, nn.RNNBase) for m in self.model.modules())
        refuse_sharded(self.model)
        with counting_breaks() as breaks:
            result = self._full(self._run(compiled, args, kwargs))
        self._compiler.check_overrides()
        # What FSDP2 gathers stands in the model while a part of it runs, and is none of its parameters afterwards.
        if not (self.plans and is_gathered(self.model)):
            warn_of_gaps(self.model, len(self.plans), self._compiler.parameters, breaks, result)
        self._calls[cap] = compiled
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__["_model"]
            found = getattr(model, name)
            own = inspect.ismethod(found) and found.__self__ is model and not are_calls_taken(self.model)
            return watched_method(model, name, found) if own else found

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it on the model, which runs and is saved; what is the wrapper's own (``forward`` too) stays here."""
        if name in self.__dict__ or name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self.model, name)

    def __reduce__(self) -> Any:
        """Copies and pickles are of the model and its settings; compiled graphs are made again."""
        return rewrapped, (self.model, self.settings, self.dynamic, self.backend)

    def train(self, mode: bool = True) -> MixedPrecisionModule:
        self.model.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MixedPrecisionModule:
        self.model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def taking_calls(self) -> contextlib.AbstractContextManager[None]:
        """Inside, what the model's own methods call is this: ``with mp.taking_calls(): mp.generate(ids)`` runs low."""
        return calls_taken(self.model, self)

    def refresh(self) -> None:
        """Cast the shadows again now: needed on a GPU after edits through ``parameter.data`` outside training."""
        refuse_shared_out(self.model)
        SHADOWS.refresh(self.parameters())

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Decide on the whole model as one graph, for these example arguments (their shapes; nothing is run).

        Raises:
          CaptureError: MP101, when torch.export cannot read the model as one graph.
        """
        module = export(self.model, args, kwargs).module()
        inline_regions(module)
        return decide(module, self.settings, device_of(self.parameters()))

    def graph(self, *args: Any, **kwargs: Any) -> fx.GraphModule:
        """The rewritten graph, callable with the example's own arguments; it shares the model's parameters."""
        plan = self.plan(*args, **kwargs)
        emulate = emulated_kinds(plan.device, plan.policy.low, compiled=False)
        return write(plan.capture, plan.graph, emulate=emulate, linear=FP8_LINEAR).module

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """What was decided for each node, and why. See `mpcompile.report.model.Report`.

        With example arguments: of the whole model as one graph. Without: of the graphs compiled so far, graph breaks
        and all.

        Raises:
          CaptureError: MP101, when torch.export cannot read the model; MP106, without arguments before the first call.
        """
        from mpcompile.report.model import build_report

        if args or kwargs:
            plan = self.plan(*args, **kwargs)
            return build_report(plan.graph, plan.policy, plan.row, steps=plan.steps, before=plan.capture.graph,
                                history=plan.history, code=plan.capture.code)  # fmt: skip
        if not self.plans:
            raise CaptureError("MP106", "report() without example arguments, and nothing is compiled yet",
                               try_="mp.report(*example), or call mp(...) first")  # fmt: skip
        last = self.plans[-1]
        graph = joined({f"graph{i}": plan.graph for i, plan in enumerate(self.plans)})
        return build_report(graph, last.policy, last.row, steps=[s for plan in self.plans for s in plan.steps])

    def compare(self, *args: Any, **kwargs: Any) -> Comparison:
        """Every value and every gradient of the plan beside FP32's, for one batch and the same random numbers.

        Nothing is changed. `loss_fn`, `gradients`, `autocast`, `scale` are options
        (`mpcompile.training.numerics.compare.Options`); the other arguments are the batch. Where the model has a keyword of
        such a name, the batch is a `mpcompile.Call`: ``mp.compare(Call((x,), {"scale": s}), scale=1024.0)``.

        Raises:
          CaptureError: MP101. TrainingError: MP561, MP562.
        """
        from mpcompile.training.numerics.compare import compare

        return compare(self.model, self.settings, args, kwargs)

    def calibrate(self, batches: Iterable[Any], loss_fn: Callable[..., Any] | None = None) -> Ranges:
        """Ranges of the model's values and gradients on `batches` (each a tensor, a tuple, or a dict of keywords), in FP32.

        Save them, and give them to ``mpcompile(model, "fp16", ranges=...)``. `loss_fn` as in `compare`.

        Raises:
          CaptureError: MP101. TrainingError: MP561.
        """
        from mpcompile.training.numerics.calibrate import calibrate

        return calibrate(self.model, self.settings, batches, loss_fn)

    @overload
    def train_step(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        loss_fn: Callable[..., Any] | None = None,
        *,
        backend: Literal["onnxruntime"],
        providers: Sequence[Any] | None = None,
        **options: Unpack[StepOptions],
    ) -> OrtTrainStep: ...
    @overload
    def train_step(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        loss_fn: Callable[..., Any] | None = None,
        *,
        backend: Literal["inductor", "eager"] | None = None,
        **options: Unpack[StepOptions],
    ) -> TrainStep: ...
    def train_step(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        loss_fn: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Any:
        """The training step as one emitted graph. See `mpcompile.training.step.TrainStep` for the options.

        Several optimizers are stepped on one loss: one norm, one clip, one skip for all.

        With backend="onnxruntime" it is an `mpcompile.onnx.train_step.OrtTrainStep`.
        """
        from mpcompile.training.options import Options, check_names
        from mpcompile.training.step import TrainStep

        known = {one.name: one for one in dataclasses.fields(Options)}
        if options.get("backend", self.backend) == "onnxruntime":
            from mpcompile.onnx.train_step import OrtTrainStep

            check_names(options, known | dict(inspect.signature(OrtTrainStep).parameters))
            return OrtTrainStep(self, optimizer, loss_fn, **options)
        check_names(options, known)
        return TrainStep(self, optimizer, loss_fn, **options)

    def export_onnx(self, path: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """Write the rewritten forward as an ONNX model whose nodes carry their verdicts and reasons."""
        from mpcompile.onnx.export.forward import export_onnx

        return export_onnx(self, path, *args, **options)


def rewrapped(model: nn.Module, settings: Settings, dynamic: bool | None, backend: str) -> MixedPrecisionModule:
    """`model` in mixed precision, in a class that looks like its own."""
    kind: Any = class_like(MixedPrecisionModule, model)
    return kind(model, settings, dynamic=dynamic, backend=backend)  # type: ignore[no-any-return]


def _inside(
    model: nn.Module, settings: Settings, dynamic: bool | None, backend: str, compiler: Compiler
) -> MixedPrecisionModule | None:
    """The model inside a DistributedDataParallel, in mixed precision: what runs in its place while the wrapper is called.

    Dynamo does not trace the reducer's part of the forward, and would compile what it finds below it, piece by piece.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return None
    inside = rewrapped(model.module, settings, dynamic, backend)
    inside.__dict__["_compiler"] = compiler
    return inside


def _paths(model: nn.Module) -> dict[str, str]:
    """The paths of the modules, asked for at each compilation: a model may be sharded after it was wrapped."""
    refuse_sharded(model)
    return {str(id(m)): name for name, m in model.named_modules()}


def _own(error: BackendCompilerFailed) -> Exception:
    """Our own error, where Dynamo wrapped one of ours."""
    return error.inner_exception if isinstance(error.inner_exception, MPCompileError) else error


def _entry(model: nn.Module) -> Callable[..., Any]:
    """A function of its own code object and name that calls the model.

    Dynamo caches by code object and gives up, running eagerly, after eight compilations of one; models of one class
    under many policies must not exhaust each other's cache.  And it remembers by name which sizes have changed: those
    of one model must not make another's symbolic.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"{type(model).__name__}_{next(_ENTRIES)}")
    return call


__all__ = ["MixedPrecisionModule", "rewrapped"]
