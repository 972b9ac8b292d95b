"""Capture: from a PyTorch model to one pre-autograd ATen `fx.GraphModule`.

Two entrances, one form.  `trace_dynamo` re-traces the graph that Dynamo hands to a backend (graph breaks and
symbolic shapes are Dynamo's business); `export` reads the whole model with `torch.export`.  Both stop before
autograd, where composites such as ``linear`` and ``layer_norm`` are still whole and where attention kernels are
chosen by dtype; autograd then gives the backward the right dtypes by itself.

Tracing runs with autocast off: the user's own autocast regions become hints on nodes (``meta["mp_region"]``).
Activation checkpoints are inlined with their recompute tags; every other higher-order op stays one opaque node.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from mpcompile.aten.facts import DTYPES
from mpcompile.aten.recurrent import rnn_kept_opaque
from mpcompile.aten.surroundings import quiet_torch
from mpcompile.aten.transforms import transformed, with_transforms_apart
from mpcompile.errors import CaptureError, MPCompileError
from mpcompile.torch_internals.dynamo import (
    TensorifyState,
    detect_fake_mode,
    is_held,
    is_parameter,
    source_name,
    tag_activation_checkpoint,
    tensorify_python_scalars,
)
from mpcompile.torch_internals.operators import ENTER_AUTOCAST, EXIT_AUTOCAST, HigherOrderOperator
from mpcompile.torch_internals.patches import masks_taken_as_given
from mpcompile.torch_internals.tensors import FakeTensor, FakeTensorMode, pytree

# Torch numbers its own checkpoints from 0; the partitioner only compares numbers within one graph.
_CHECKPOINTS = itertools.count(1 << 32)


class AtenTracer(fx.Interpreter):
    """Runs a torch-level graph under `make_fx`, and marks the ATen nodes that each of its nodes becomes."""

    def __init__(
        self, module: fx.GraphModule, marks: dict[str, Any] | None = None, paths: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(with_transforms_apart(module))
        self._paths = paths or {}
        self._regions: list[str] = []
        self._marks = marks or {}

    def run_node(self, n: fx.Node) -> Any:
        graph = _tracing_graph()
        last = next(iter(reversed(graph.nodes)), None)
        result = super().run_node(n)
        for node in _since(graph, last):
            self._mark(node, n)
        return result

    def _mark(self, node: fx.Node, origin: fx.Node) -> None:
        for key in ("stack_trace", "nn_module_stack"):
            if key in origin.meta:
                node.meta.setdefault(key, origin.meta[key])
        stack = origin.meta.get("nn_module_stack")
        # Dynamo keys its stack by the module's id; its own path is lost where a graph break left the module on the
        # interpreter's stack.
        if stack and (path := self._paths.get(list(stack)[-1].partition("@")[0])) is not None:
            node.meta.setdefault("mp_module", path)
        if self._regions:
            node.meta.setdefault("mp_region", self._regions[-1])
        for key, value in self._marks.items():
            node.meta.setdefault(key, value)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is ENTER_AUTOCAST:
            return self._enter(*args, **kwargs)
        if target is EXIT_AUTOCAST:
            return self._regions.pop()
        if target is tag_activation_checkpoint:
            return self._inline_checkpoint(args, kwargs)
        if isinstance(target, HigherOrderOperator) or target is transformed:
            return opaque_call(target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor that the graph holds as a constant becomes a `get_attr` of the traced graph, fake in the trace."""
        value = super().get_attr(target, args, kwargs)
        mode = proxy_tensor.get_proxy_mode()
        fake_mode = detect_fake_mode()
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or mode is None or fake_mode is None:
            return value
        tracer: Any = mode.tracer
        name = _attach(tracer.root, value, "constant")
        with proxy_tensor.disable_proxy_modes_tracing():
            fake = fake_mode.from_tensor(value, static_shapes=True)
        proxy = tracer.create_proxy("get_attr", name, (), {})
        return proxy_tensor.track_tensor_tree(fake, proxy, constant=None, tracer=tracer)

    def _enter(self, device: str, dtype: torch.dtype | None, enabled: bool = True, cache: Any = None) -> str:
        dtype = dtype or torch.get_autocast_dtype(device)
        self._regions.append(DTYPES.get(dtype, "off") if enabled else "off")
        return self._regions[-1]

    def _inline_checkpoint(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The body's nodes, tagged tagged as torch itself tags them for the partitioner."""
        body, *operands = args
        if "_checkpoint_context_fn" in body.meta:
            # A selective policy decides per op of the body: leave the whole checkpoint to torch.
            return opaque_call(tag_activation_checkpoint, args, kwargs)
        marks = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(_CHECKPOINTS)}
        inner = AtenTracer(body, {**self._marks, **marks}, self._paths)
        inner._regions = list(self._regions)
        return inner.run(*operands)


def opaque_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record `target` as one node, and compute its fake outputs outside the trace."""
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None
    tracer = mode.tracer
    proxies, proxy_kwargs = pytree.tree_map(lambda x: _proxy_of(tracer, x), (args, kwargs))
    name = getattr(target, "__name__", str(target))
    proxy = tracer.create_proxy("call_function", target, proxies, proxy_kwargs, name=name)
    with proxy_tensor.disable_proxy_modes_tracing():
        result = target(*args, **kwargs)
    return proxy_tensor.track_tensor_tree(result, proxy, constant=None, tracer=tracer)


def _proxy_of(tracer: Any, item: Any) -> Any:
    if isinstance(item, fx.GraphModule):
        name = _attach(tracer.root, item, "body")
        return tracer.create_proxy("get_attr", name, (), {})
    return tracer.unwrap_proxy(item)


def _attach(root: torch.nn.Module, item: fx.GraphModule | torch.Tensor, stem: str) -> str:
    number = next(n for n in itertools.count() if not hasattr(root, f"_{stem}_{n}"))
    if isinstance(item, torch.Tensor):
        root.register_buffer(f"_{stem}_{number}", item)
    else:
        setattr(root, f"_{stem}_{number}", item)
    return f"_{stem}_{number}"


def _tracing_graph() -> fx.Graph:
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None, "AtenTracer runs under make_fx"
    return mode.tracer.graph


def _since(graph: fx.Graph, last: fx.Node | None) -> Iterator[fx.Node]:
    node = last.next if last is not None else next(iter(graph.nodes), None)
    while node is not None and node.op != "root":
        yield node
        node = node.next


@contextlib.contextmanager
def autocast_off() -> Iterator[None]:
    """No ambient autocast for CPU and CUDA: our graph holds every cast itself."""
    with torch.amp.autocast("cpu", enabled=False), torch.amp.autocast("cuda", enabled=False):
        yield


def trace_dynamo(
    module: fx.GraphModule, inputs: Sequence[Any], paths: Mapping[str, str] | None = None
) -> fx.GraphModule:
    """The pre-autograd ATen graph of a Dynamo graph; placeholders keep names, order and Dynamo's facts.

    Args:
      module: what Dynamo gives a backend.
      inputs: fake tensors (or SymInts), one per placeholder.
      paths: ``str(id(module))`` -> the module's path in the user's model, where the model is known.
    """
    tracer = AtenTracer(module, paths=paths)
    fake_mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None) or contextlib.nullcontext()
    with autocast_off(), fx.traceback.preserve_node_meta(), fake_mode:
        traced = make_fx(tracer.run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)
    if isinstance(fake_mode, FakeTensorMode):
        _numbers_as_tensors(traced, fake_mode)
    before = [n for n in module.graph.nodes if n.op == "placeholder"]
    after = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for old, new in zip(before, after, strict=True):
        new.meta["mp_name"] = _input_name(old)
        new.meta["mp_role"] = _input_role(old)
    return traced


def _numbers_as_tensors(traced: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
    """A Python number that changes from call to call enters as a tensor and is read by `item`: compute with the tensor.

    Where that cannot be (a size, a probability), torch asks Dynamo to trace again for this number alone.
    """
    found = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.item.default)
    shapes = fake_mode.shape_env
    if not found or shapes is None:
        return
    numbers = {str(symbol) for node in found for symbol in node.meta["val"].node.expr.free_symbols}
    for node in found:
        node.target = torch.ops.aten._local_scalar_dense.default
    tensorify_python_scalars(traced, shapes, fake_mode)
    traced.meta["mp_numbers"] = numbers
    traced.recompile()


@contextlib.contextmanager
def numbers_settled(traced: fx.GraphModule) -> Iterator[None]:
    """While `traced` is compiled: AOTAutograd, which finds no `item` any more, must not ask for another trace."""
    numbers = traced.meta.get("mp_numbers", set()) - TensorifyState.force_specializations
    TensorifyState.force_specializations |= numbers
    try:
        yield
    finally:
        TensorifyState.force_specializations -= numbers


def _input_role(node: fx.Node) -> str:
    if is_parameter(node):
        return "parameter"
    # Dynamo marks what a module holds; what is not a parameter then is a buffer.
    return "buffer" if is_held(node) else "input"


def _input_name(node: fx.Node) -> str:
    """The user's own name of a Dynamo input: "encoder.0.fc1.weight" for a parameter, "x" for an argument."""
    name = source_name(node)
    if name is None:
        return str(node.target)
    path = re.findall(r"\['?([\w.]+)'?\]", re.sub(r"(\._modules|\._parameters|\._buffers)", "", name))
    return ".".join(path[1:] or path) or str(node.target)


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> torch.export.ExportedProgram:
    """The whole model as one program (pre-autograd ATen, training ops kept as they are).

    Raises:
      CaptureError: MP101, with torch's own message.
    """
    with autocast_off(), rnn_kept_opaque(), masks_taken_as_given():
        program = _guarded(
            lambda: torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        )
    if any(spec.kind == InputKind.CUSTOM_OBJ for spec in program.graph_signature.input_specs):
        raise CaptureError(
            "MP101", "the model holds an object that no graph can", why="a torch.Generator, or another object of torch's",
            try_="draw with torch's own generator, or outside of the model and pass the numbers as an argument",
        )  # fmt: skip
    return program


# What torch says -> (why, what to try). The first that is found is told.
_CAUSES = (
    (r"pack_padded|pad_packed|PackedSequence|batch_sizes", "a packed sequence: its lengths are read from the data",
     "pass padded sequences and a mask, or train by the drop-in: loss = mp(...); loss.backward()"),
    (r"ctc_loss|input_lengths|target_lengths", "a CTC loss whose lengths are tensors: torch reads them from the data",
     "take the CTC loss outside of the step, by the drop-in: loss = mp(...); loss.backward()"),
    (r"data-dependent|GuardOnDataDependent|\.item\(\)|nonzero|_local_scalar_dense",
     "Python decides by what a tensor holds (an if, a loop, a size, a check of arguments)",
     "torch.where or torch.cond in place of the branch; turn checks of arguments off (validate_args=False); or the drop-in, "
     "which allows graph breaks"),
    (r"size mismatch|same reduction dim|shapes cannot be multiplied|must match the size|Expected .* but got|dimension",
     "the example's shapes or types do not fit the model", "call the model itself with the same arguments first"),
    (r"missing a required argument|positional argument|unexpected keyword", "the arguments are not those of forward",
     "call the model itself with the same arguments first"),
)  # fmt: skip


def _cause(error: Exception) -> tuple[str, str]:
    """(why, what to try) of a failed export, from what torch says and from where it says it."""
    frames = traceback.extract_tb(error.__traceback__)
    told = "\n".join([str(error), *(f"{frame.name} {frame.line}" for frame in frames)])
    for pattern, why, advice in _CAUSES:
        if re.search(pattern, told):
            return why, advice
    return "", "mp(...) allows graph breaks; for one graph, remove what torch names"


def _own_line(error: Exception) -> str:
    """The last place of the user's own code that the error came through: file:line."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if not _LIBRARIES.search(f.filename)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def outside_torch(frames: Sequence[traceback.FrameSummary]) -> str:
    """The last place of code that is neither torch's nor this package's, the user's or a model library's: file:line."""
    found = [f for f in frames if not _TORCH_OR_OURS.search(f.filename)]
    return f"{found[-1].filename}:{found[-1].lineno}" if found else ""


# Code that is no user's: this package, what is installed, what has no file.
_PACKAGE = re.escape(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_TORCH_OR_OURS = re.compile(rf"[\\/]torch[\\/]|^{_PACKAGE}|^<frozen|[\\/]lib[\\/]python3[.\\d]+[\\/](?!site-packages)")
_LIBRARIES = re.compile(rf"site-packages|dist-packages|^{_PACKAGE}|^<|[\\/]lib[\\/]python3")


def _guarded(call: Callable[[], torch.export.ExportedProgram]) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings(), quiet_torch():
            # What `nn.LSTM` and its kin do to themselves in a trace.
            warnings.filterwarnings("ignore", message="The tensor attributes? .* assigned during export")
            return call()
    except MPCompileError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        why, advice = _cause(error)
        raise CaptureError(
            "MP101",
            "torch.export could not read the model as one graph",
            where=_own_line(error),
            why="; ".join(filter(None, (why, f"{type(error).__name__}: {first[0]}"))),
            try_=advice,
        ) from error
