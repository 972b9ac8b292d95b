"""The Dynamo backend: each graph that Dynamo finds is re-traced to ATen, rewritten, compiled, and given its shadows.

Registered as ``torch.compile(model, backend="mpcompile", options={"policy": "fp16"})``; `mpcompile.mpcompile` uses
the same function with a `Compiler` of its own.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import fx

from mpcompile.aten.capture import numbers_settled, trace_dynamo
from mpcompile.aten.facts import LOW_DTYPES, TORCH_DTYPES
from mpcompile.aten.graphs import outputs_of
from mpcompile.aten.read import FxCapture
from mpcompile.aten.rewrites.align import align_linears
from mpcompile.aten.rewrites.statistics import keep_finite
from mpcompile.aten.write import has_user_low_cast, read_apart, read_shadows, write
from mpcompile.compiler import Plan, Settings, decide, log_plan, settings_of
from mpcompile.errors import RuntimeFailure, suggest
from mpcompile.graph import PrecisionGraph
from mpcompile.hardware import device_of, emulated_kinds
from mpcompile.passes.classify import refuse_unmatched, unmatched
from mpcompile.progress import stage
from mpcompile.runtime.buckets import Piece, bucket_bytes, split_at_buckets
from mpcompile.runtime.compiled import CompiledGraph
from mpcompile.runtime.coverage import warn_of_recurrent_break
from mpcompile.runtime.fp8_linear import FP8_LINEAR
from mpcompile.runtime.inductor import compile_inductor, run_eagerly
from mpcompile.runtime.sharded import refuse_wrapped_inputs, say_gathered
from mpcompile.shadows.table import use_shadow
from mpcompile.torch_internals.dynamo import frame_compiled, is_filled_anew
from mpcompile.torch_internals.tensors import real_tensors

# Elements from which a shadow's gradient is cast outside the compiled backward.
LARGE = 1 << 18
# Elements that are cast together. On a CPU one by one: a gradient that is added to its sum at once stays in the cache.
TOGETHER = {"cpu": 1, "cuda": 1 << 22}


class Compiler:
    """Dynamo's backend for one model: keeps the plan of every graph that it compiled.

    `paths` gives the paths of the model's modules by ``str(id(module))``, `gathered` whether its parameters are filled anew at
    each forward; both are read at each compilation.
    """

    def __init__(
        self,
        settings: Settings,
        on_plan: Callable[[Plan], None] | None = None,
        paths: Callable[[], Mapping[str, str]] = dict,
        gathered: Callable[[], bool] = bool,
    ) -> None:
        self.settings, self.on_plan, self.paths, self.gathered = settings, on_plan, paths, gathered
        self.plans: list[Plan] = []
        # What this backend added to torch's own compilation: tracing again, the passes, writing the graph.
        self.seconds = 0.0
        # Ids of the parameters that the compiled graphs were called with.
        self.parameters: set[int] = set()
        # Names of the functions that call the whole model, and whether a part of it gave low what the program gives low.
        self.entries: set[str] = set()
        self.gave_low = False

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        fakes = [n.meta.get("example_value", given) for n, given in zip(placeholders, inputs, strict=True)]
        refuse_wrapped_inputs(fakes)
        fresh = self.gathered() or any(is_filled_anew(node) for node in placeholders)
        traced = trace_dynamo(module, fakes, self.paths())
        plan = decide(traced, self.settings, device_of(fakes), partial=True, piece=self._is_piece(module),
                      held=_held(traced, fakes))  # fmt: skip
        self.plans.append(plan)
        if self.on_plan is not None:
            self.on_plan(plan)
        with stage("compiling a graph"), numbers_settled(plan.capture.module):
            given = _dtypes_given(module) if fresh or self._is_part(module) else []
            emitted = self._emit(plan, fakes, fresh, given)
        self.seconds += time.perf_counter() - start
        return emitted

    def _is_part(self, module: fx.GraphModule) -> bool:
        """Whether code that runs as it is written goes on with the results: a graph broke, here or around this function."""
        if not self.entries or hasattr(module, "compile_subgraph_reason"):
            return hasattr(module, "compile_subgraph_reason")
        name = frame_compiled()
        return not any(name == one or f"_in_{one}_at_" in name for one in self.entries)

    def _is_piece(self, module: fx.GraphModule) -> bool:
        """Whether the graph begins or ends where a graph of the model broke."""
        broke = getattr(getattr(module, "compile_subgraph_reason", None), "graph_break", False)
        return broke or (bool(self.entries) and frame_compiled() not in self.entries)

    def check_overrides(self) -> None:
        """After a whole forward: an override that matched in no graph of it is an error.

        Raises:
          RuleError: MP203, with near names.
        """
        for option, globs in self.settings.overrides().items():
            known = {
                name for plan in self.plans for node in plan.graph for name in (node.module, node.op, node.id) if name
            }
            refuse_unmatched(
                unmatched([plan.graph for plan in self.plans], globs), option, sorted(known), self.paths().values()
            )

    def _emit(self, plan: Plan, fakes: list[Any], fresh: bool, given: list[Any]) -> Callable[..., Any]:
        """The compiled graph.

        Args:
          fresh: its weights are filled anew before each forward, so no shadow could follow them: they are cast in the graph.
          given: the dtypes that the program gives, where what it does next counts on them: weights gathered low, and a
            frozen BF16 layer that runs between two parts of a broken graph.
        """
        compiled = self.settings.inner == "inductor"
        emulate = emulated_kinds(plan.device, plan.policy.low, compiled=compiled)
        read = None if fresh else use_shadow
        written = write(plan.capture, plan.graph, use_shadow=read, emulate=emulate, linear=FP8_LINEAR)
        if plan.policy.low == "fp16":
            keep_finite(written.module)
        if fresh:
            say_gathered()
        self.gave_low |= _give_low(written.module, given)
        places = {name: i for i, name in enumerate(plan.capture.graph.inputs)}
        order = _argument_places(plan.capture)
        shadows = [(order[places[name]], TORCH_DTYPES[low]) for name, low in written.shadows]
        buffers = [order[places[name]] for name in written.low_buffers]
        if not compiled:
            read_apart(written.module, use_shadow)
            eager = run_eagerly(written.module, fp32_matmul=plan.policy.fp32_matmul)
            return CompiledGraph(eager, shadows, self.parameters, differentiable_twice=True, buffers=buffers)
        align_linears(written.module, plan.capture, plan.graph, plan.device)
        pieces = self._in_pieces(plan, written.module, fakes, shadows)
        if pieces is not None:
            return pieces
        several = read_apart(written.module, use_shadow)
        lifted = _lift_large(written.module, [fakes[i] for i, _ in shadows], several)
        extended = [*fakes, *(_fake_shadow(fakes[i], dtype, n in lifted) for n, (i, dtype) in enumerate(shadows))]
        inner = self._compiled(plan, written.module, extended)
        groups = _groups([fakes[i] for i, _ in shadows], lifted)
        return CompiledGraph(inner, shadows, self.parameters, groups, differentiable_twice=False, buffers=buffers)

    def _compiled(self, plan: Plan, module: fx.GraphModule, fakes: Sequence[Any]) -> Callable[..., Any]:
        start, rounding = time.perf_counter(), has_user_low_cast(plan.graph)
        try:
            return compile_inductor(module, fakes, keep_rounding=rounding, fp32_matmul=plan.policy.fp32_matmul)
        finally:
            self.seconds -= time.perf_counter() - start

    def _in_pieces(
        self, plan: Plan, module: fx.GraphModule, fakes: list[Any], shadows: list[tuple[int, torch.dtype]]
    ) -> CompiledGraph | None:
        """Compiled piece by piece, where a DistributedDataParallel reduces the gradients in several buckets."""
        cap = bucket_bytes() if torch.is_grad_enabled() else None
        if cap is None:
            return None
        extended = [*fakes, *(_fake_shadow(fakes[i], dtype, False) for i, dtype in shadows)]
        inner = split_at_buckets(module, extended, cap, functools.partial(self._piece, plan))
        return inner and CompiledGraph(inner, shadows, self.parameters, differentiable_twice=False)

    def _piece(self, plan: Plan, module: fx.GraphModule, fakes: Sequence[Any]) -> Piece:
        places = {node: i for i, node in enumerate(module.graph.find_nodes(op="placeholder"))}
        several = read_apart(module, use_shadow)
        pairs = [(places[n.args[0]], places[n.args[1]])
                 for n in module.graph.find_nodes(op="call_function", target=use_shadow)
                 if n.args[1].name not in several]  # fmt: skip
        masters, names = [fakes[i] for i, _ in pairs], [node.name for node in places]
        lifted = [n for n, master in enumerate(masters) if master.numel() >= LARGE]
        read_shadows(module, use_shadow, [names[pairs[n][1]] for n in lifted])
        given = list(fakes)
        for n in lifted:
            given[pairs[n][1]] = _fake_shadow(masters[n], fakes[pairs[n][1]].dtype, True)
        inner = self._compiled(plan, module, given)
        groups = [([pairs[n][0] for n in group], [pairs[n][1] for n in group]) for group in _groups(masters, lifted)]
        return Piece(inner, groups)


def _dtypes_given(module: fx.GraphModule) -> list[Any]:
    """The dtype of each output of Dynamo's graph; None for what is no tensor."""
    values = [getattr(n, "meta", {}).get("example_value") for n in outputs_of(module)]
    return [v.dtype if isinstance(v, torch.Tensor) else None for v in values]


def _give_low(module: fx.GraphModule, dtypes: Sequence[Any]) -> bool:
    """Give low what the program gives low; whether there was anything."""
    if not any(dtype in LOW_DTYPES for dtype in dtypes):
        return False
    outputs, output = outputs_of(module), module.graph.output_node()
    with module.graph.inserting_before(output):
        for i, dtype in enumerate(dtypes):
            if dtype in LOW_DTYPES:
                outputs[i] = module.graph.call_function(torch.ops.aten.to.dtype, (outputs[i], dtype))
    output.args = (tuple(outputs),)
    module.recompile()
    return True


def _lift_large(module: fx.GraphModule, masters: Sequence[torch.Tensor], several: Container[str]) -> frozenset[int]:
    """Numbers of the shadows that the graph is differentiated by itself, because they are large.

    The gradient of such a shadow leaves the compiled backward in the low type, and autograd casts it outside: a few
    after the other, each low one freed. Inside, Inductor casts all of them at the end, and holds every gradient twice.
    Those that `several` nodes read stay: their gradients add up in FP32.
    """
    names = {f"shadow_{i}": i for i, master in enumerate(masters) if master.numel() >= LARGE}
    places = {name: i for name, i in names.items() if name not in several}
    read_shadows(module, use_shadow, places)
    return frozenset(places.values())


def _groups(masters: Sequence[torch.Tensor], lifted: Iterable[int]) -> list[list[int]]:
    """The lifted shadows whose masters are trained, in groups of at most `TOGETHER` elements (or of one).

    A node of autograd for each would cost a ResNet-50 a millisecond of the host's time per step.
    """
    groups, room = list[list[int]](), 0
    most = max((TOGETHER.get(master.device.type, 1) for master in masters), default=1)
    for number in sorted(lifted):
        if not masters[number].requires_grad:
            continue
        size = masters[number].numel()
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(number)
        room -= size
    return groups


def _held(traced: fx.GraphModule, fakes: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Placeholder -> the tensor behind its fake."""
    placeholders = traced.graph.find_nodes(op="placeholder")
    pairs = zip(placeholders, real_tensors(fakes), strict=True)
    return {node.name: real for node, real in pairs if real is not None}


def _argument_places(capture: FxCapture) -> list[int]:
    """Position among the call's arguments of each graph input of the reading (constants have -1)."""
    placeholders = [n for n in capture.module.graph.nodes if n.op == "placeholder"]
    place = {node: i for i, node in enumerate(placeholders)}
    return [place.get(capture.origin[name][0], -1) for name in capture.graph.inputs]


def _fake_shadow(master: torch.Tensor, dtype: torch.dtype, lifted: bool) -> torch.Tensor:
    with master.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_like(master, dtype=dtype, requires_grad=lifted and master.requires_grad)


def backend(module: fx.GraphModule, inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
    """The registered backend: ``options`` are `policy`, `keep_fp32`, `low`, `fp8`, `strict` and `inner`.

    Raises:
      RuntimeFailure: MP702, for an unknown option.
    """
    options = dict(given.pop("options", None) or {})
    options.update(given)
    options.pop("mode", None)
    known = [f.name for f in fields(Settings)]
    for name in options:
        if name not in known:
            near = suggest(name, known)
            raise RuntimeFailure("MP702", f"the mpcompile backend has no option {name!r}",
                                 try_=f"did you mean {near}?" if near else f"the options are {', '.join(known)}")  # fmt: skip
    settings = settings_of(**options)
    warn_of_recurrent_break()
    compiler = Compiler(settings, log_plan)
    compiled = compiler(module, inputs)
    _warn_of_unmatched(settings, [plan.graph for plan in compiler.plans])
    return compiled


def _warn_of_unmatched(settings: Settings, graphs: list[PrecisionGraph]) -> None:
    """A glob may match in another graph of the model, which this entrance does not know: so no error."""
    for option, globs in settings.overrides().items():
        for one in unmatched(graphs, globs):
            warnings.warn(
                f"mpcompile: {option}={one!r} matches no module, operation or node of this graph; right if the model has "
                "graph breaks and another graph has it. mpcompile(model) checks the whole model",
                stacklevel=2,
            )
