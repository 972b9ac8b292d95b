"""The one place that reaches into torch where torch has no public way: what is patched, for how long, and for whom."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import _C, Tensor, nn
from torch._C._dynamo import guards as _guards
from torch._dynamo import config as _dynamo_config
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import distributed_c10d
from torch.fx import GraphModule, Node
from torch.nn import Module
from torch.nn.modules import module as _module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as _optimizer
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

# Tracing and compiling keep their state in torch's modules: one thread at a time.
COMPILING = threading.RLock()
# What a graph calls where `torch.no_grad` begins or ends.
SET_GRAD_ENABLED = _C._set_grad_enabled


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """`owner` (a class or a module) with other attributes for a while. Hold `COMPILING`; act in your own thread alone."""
    before = {name: owner.__dict__[name] for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def masks_taken_as_given() -> Iterator[None]:
    """`nn.Transformer` compares a mask's elements with a causal one, to hint at a faster kernel; a trace cannot.

    Without the comparison the mask is read as it is: the same numbers. Seen in torch 2.11 to 2.14.
    """
    from torch.nn.modules import transformer

    if not hasattr(transformer, "_detect_is_causal_mask"):
        yield
        return
    told = {"_detect_is_causal_mask": lambda mask, is_causal=None, size=None: bool(is_causal)}
    with COMPILING, replaced(transformer, **told):
        yield


@contextlib.contextmanager
def hooks_guarded() -> Iterator[None]:
    """What Dynamo compiles inside is compiled again when hooks of a module come or go; by itself it does not look at them."""
    before = _dynamo_config.skip_nnmodule_hook_guards
    _dynamo_config.skip_nnmodule_hook_guards = False
    try:
        yield
    finally:
        _dynamo_config.skip_nnmodule_hook_guards = before


@contextlib.contextmanager
def graphs_whole() -> Iterator[None]:
    """Dynamo gives a backend its whole graph inside of a DistributedDataParallel too, not one piece per gradient bucket."""
    before = _dynamo_config.optimize_ddp
    _dynamo_config.optimize_ddp = False
    try:
        yield
    finally:
        _dynamo_config.optimize_ddp = before


def is_filled_anew(placeholder: Node) -> bool:
    """Whether Dynamo found this input of a graph in a module that FSDP manages."""
    source: Any = getattr(placeholder, "_dynamo_source", None)
    found = getattr(source, "guard_source", None)
    found = found() if callable(found) else found  # torch 2.11: a method; 2.13: a property
    return bool(found is not None and found.is_fsdp_module())


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward runs now in this process."""
    find: Any = DistributedDataParallel._get_active_ddp_module
    found: DistributedDataParallel | None = find()
    return found


def has_communication_hook(ddp: DistributedDataParallel) -> bool:
    """Whether `register_comm_hook` was called."""
    return bool(getattr(ddp, "_comm_hooks", ()))


def patience_of(group: Any, device: Any) -> Any:
    """How long a process group's collectives wait on a device (a timedelta); None where it does not say."""
    try:
        return group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None


_GROUP_ENDS = threading.RLock()


def before_groups_end(call: Callable[[Any], None]) -> Callable[[], None]:
    """Let `call(group)` run before torch shuts a process group down; returns what undoes this.

    `destroy_process_group` looks up what it calls at each call, so a user who imported it by name is heard too. Torch 2.11:
    a function of the module; 2.13: a method of the group.
    """
    owner: Any = distributed_c10d if hasattr(distributed_c10d, "_shutdown_backend") else distributed_c10d.ProcessGroup
    name = "_shutdown_backend" if owner is distributed_c10d else "shutdown"
    with _GROUP_ENDS:
        # A method in C is no function that would bind anew: it is put back as it lay in its class.
        lay, before = vars(owner)[name], getattr(owner, name)

        def ending(group: Any) -> None:
            call(group)
            before(group)

        setattr(owner, name, ending)

    def undo() -> None:
        with _GROUP_ENDS:
            if getattr(owner, name) is ending:
                setattr(owner, name, lay)

    return undo


@contextlib.contextmanager
def module_replaced(around: Module, inside: Module) -> Iterator[None]:
    """`around`, a DistributedDataParallel, calls `inside` for its module for a while."""
    held = around._modules
    before = held["module"]
    held["module"] = inside
    try:
        yield
    finally:
        held["module"] = before


def compile_pieces(
    module: GraphModule, pieces: Mapping[Node, int], fakes: Sequence[Any], compile_piece: Callable[..., Any]
) -> GraphModule:
    """`module` cut into pieces, each compiled for the layouts that the one before it gives, as torch's DDPOptimizer does it.

    Args:
      pieces: the number of each operation's piece; along the graph it never falls.
      compile_piece: gives what runs a piece, of (its graph, fake arguments).
    """
    from torch._dynamo.backends.distributed import SubmodCompiler
    from torch.fx.passes.split_module import split_module

    mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
    cut = split_module(module, None, pieces.__getitem__)  # type: ignore[arg-type]
    SubmodCompiler(cut, compile_piece, mode).run(*fakes)
    cut.recompile()
    return cut


@contextlib.contextmanager
def calls_taken(module: Module, call: Callable[..., Any]) -> Iterator[None]:
    """Whoever calls `module` calls `call` for a while; inside of `call`, `module` is itself."""

    def taken(*args: Any, **kwargs: Any) -> Any:
        vars(module)["_compiled_call_impl"] = before
        try:
            return call(*args, **kwargs)
        finally:
            vars(module)["_compiled_call_impl"] = taken

    before = module._compiled_call_impl
    vars(module)["_compiled_call_impl"] = taken
    try:
        yield
    finally:
        vars(module)["_compiled_call_impl"] = before


def are_calls_taken(module: Module) -> bool:
    """Whether `calls_taken` is at work on `module`."""
    return getattr(module._compiled_call_impl, "__qualname__", "").startswith(calls_taken.__name__)


def is_watched() -> bool:
    """A mode of the user's sees every operation (FlopCounterMode): Dynamo runs nothing compiled under it."""
    return bool(is_in_torch_dispatch_mode(include_infra_modes=False))


def hooks_of_all_optimizers() -> tuple[dict[int, Any], dict[int, Any]]:
    """(before, after) a step: `torch.optim.optimizer.register_optimizer_step_pre_hook` and its twin."""
    return _optimizer._global_optimizer_pre_hooks, _optimizer._global_optimizer_post_hooks


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """Inside, operations on real tensors run as they are, in the middle of a trace."""
    with _disable_current_modes():
        yield


# A module's tables of what it owns, and of what it calls around itself.
MODULE_TENSORS = ("_parameters", "_buffers", "_modules")
MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Tables of hooks on every module of the process.
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def real_tensors(fakes: Sequence[Any]) -> list[Tensor | None]:
    """The tensor that each fake was made from, where its mode remembers it and it still lives."""
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    if mode is None:
        return [None] * len(fakes)
    made: Any = mode.fake_tensor_converter.meta_converter
    known = {id(made.tensor_memo.get(number)): real for real, number in made.describer.lookup_tensor.items()}
    return [known.get(id(fake)) if isinstance(fake, FakeTensor) else None for fake in fakes]


# A value that a module has none of.
ABSENT = object()
# What a capture itself sets before it reads it: nothing that lasts from one call to the next.
WRITTEN = object()


Accesses = dict[Any, tuple[nn.Module, str, Any]]


@contextlib.contextmanager
def module_reads() -> Iterator[tuple[Accesses, Accesses]]:
    """What is read of modules inside, with the first values, and what is assigned after it was read. Hold `COMPILING`."""
    found: Accesses = {}
    written: Accesses = {}
    assign, mine = nn.Module.__setattr__, threading.get_ident()

    def read(self: nn.Module, name: str) -> Any:
        if threading.get_ident() != mine:  # another thread's modules are none of this capture's
            return object.__getattribute__(self, name)
        try:
            value = object.__getattribute__(self, name)
        except AttributeError:
            found.setdefault((id(self), name), (self, name, ABSENT))
            raise
        found.setdefault((id(self), name), (self, name, value))
        return value

    def write(self: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == mine:
            if (id(self), name) in found:
                written[id(self), name] = self, name, value
            else:
                found[id(self), name] = self, name, WRITTEN
        assign(self, name, value)

    nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        with replaced(nn.Module, __setattr__=write):
            yield found, written
    finally:
        del nn.Module.__getattribute__


class TensorGuards:
    """Whether tensors are of the sizes, strides, dtype, device and `requires_grad` that they were, in one call of C++.

    What the thread's dispatcher adds (an autocast, a dispatch mode) makes it say no as well.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._made: Any = _guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def hold(self) -> bool:
        return bool(self._made.check(*self._tensors))


def frame_compiled() -> str:
    """The name of the function that Dynamo compiles now; what follows a graph break is named after its function, too."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return str(InstructionTranslator.current_tx().f_code.co_name)


__all__ = [
    "ABSENT",
    "COMPILING",
    "GLOBAL_HOOKS",
    "MODULE_HOOKS",
    "MODULE_TENSORS",
    "WRITTEN",
    "TensorGuards",
    "active_ddp",
    "are_calls_taken",
    "calls_taken",
    "compile_pieces",
    "frame_compiled",
    "graphs_whole",
    "has_communication_hook",
    "hooks_guarded",
    "hooks_of_all_optimizers",
    "is_filled_anew",
    "is_watched",
    "masks_taken_as_given",
    "module_reads",
    "module_replaced",
    "outside_of_modes",
    "real_tensors",
    "replaced",
]


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Write `payload` (JSON) into the trace that TORCH_TRACE asks for, where tlparse shows it as a file of its own."""
    if os.environ.get("TORCH_TRACE"):
        trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=payload)
