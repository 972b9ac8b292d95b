"""Of Dynamo: what it says of a graph and of its breaks, and its switches, for a while."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch._dynamo import config
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mpcompile.torch_internals.names import found

if TYPE_CHECKING:
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._dynamo.symbolic_convert import TensorifyState
    from torch._guards import detect_fake_mode
    from torch._higher_order_ops.wrap import tag_activation_checkpoint
    from torch.fx.passes._tensorify_python_scalars import tensorify_python_scalars
else:
    BackendCompilerFailed = found("torch._dynamo.exc", "BackendCompilerFailed")
    TensorifyState = found("torch._dynamo.symbolic_convert", "TensorifyState")
    detect_fake_mode = found("torch._guards", "detect_fake_mode")
    tag_activation_checkpoint = found("torch._higher_order_ops.wrap", "tag_activation_checkpoint")
    tensorify_python_scalars = found("torch.fx.passes._tensorify_python_scalars", "tensorify_python_scalars")


@contextlib.contextmanager
def _switched(**switches: Any) -> Iterator[None]:
    """Dynamo's configuration with other values; a switch that this torch has not is none to turn."""
    before = {name: getattr(config, name) for name in switches if hasattr(config, name)}
    for name in before:
        setattr(config, name, switches[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def hooks_guarded() -> contextlib.AbstractContextManager[None]:
    """What Dynamo compiles inside is compiled again when hooks of a module come or go; by itself it does not look at them."""
    return _switched(skip_nnmodule_hook_guards=False)


def graphs_whole() -> contextlib.AbstractContextManager[None]:
    """Dynamo gives a backend its whole graph inside of a DistributedDataParallel too, not one piece per gradient bucket."""
    return _switched(optimize_ddp=False)


def rnn_traced() -> contextlib.AbstractContextManager[None]:
    """Dynamo traces LSTM, GRU and RNN; by default it leaves the function that calls one to eager."""
    return _switched(allow_rnn=True)


def recompile_limit() -> int:
    """After how many compilations of one function Dynamo gives it up."""
    return int(config.recompile_limit)


def graph_breaks() -> Counter[str]:
    """The graph breaks of this process until now: Dynamo's text of each, and how often."""
    return Counter(found("torch._dynamo.utils", "counters")["graph_break"])


def source_name(placeholder: Node) -> str | None:
    """How Dynamo writes where an input of its graph came from: "L['self']._modules['fc'].weight"; None: it does not say."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    # torch 2.11: name() is a method; 2.13: a property.
    return str(source.name() if callable(source.name) else source.name)


def copy_source(placeholder: Node, copy: Node) -> None:
    """`copy`, of another graph, comes from where `placeholder` does."""
    if hasattr(placeholder, "_dynamo_source"):
        copy._dynamo_source = placeholder._dynamo_source


def is_held(placeholder: Node) -> bool:
    """Whether Dynamo found an input of its graph in a module, as a parameter or a buffer."""
    return "_dynamo_static_input_type" in (placeholder.meta.get("tensor_dict") or {})


def is_parameter(placeholder: Node) -> bool:
    """Whether an input of Dynamo's graph is a parameter."""
    return isinstance(placeholder.meta.get("example_value"), nn.Parameter)


def is_filled_anew(placeholder: Node) -> bool:
    """Whether Dynamo found this input of a graph in a module that FSDP manages."""
    source: Any = getattr(placeholder, "_dynamo_source", None)
    place = getattr(source, "guard_source", None)
    place = place() if callable(place) else place  # torch 2.11: a method; 2.13: a property
    return bool(place is not None and place.is_fsdp_module())


def frame_compiled() -> str:
    """The name of the function that Dynamo compiles now; what follows a graph break is named after its function, too."""
    translator = found("torch._dynamo.symbolic_convert", "InstructionTranslator")
    return str(translator.current_tx().f_code.co_name)


def is_watched() -> bool:
    """A mode of the user's sees every operation (FlopCounterMode): Dynamo runs nothing compiled under it."""
    return bool(is_in_torch_dispatch_mode(include_infra_modes=False))


def codegen_of(graph: Graph) -> Any:
    """What writes a graph's Python: an exported program's takes and gives the user's own structures."""
    return graph._codegen


__all__ = [
    "BackendCompilerFailed",
    "TensorifyState",
    "codegen_of",
    "copy_source",
    "detect_fake_mode",
    "frame_compiled",
    "graph_breaks",
    "graphs_whole",
    "hooks_guarded",
    "is_filled_anew",
    "is_held",
    "is_parameter",
    "is_watched",
    "recompile_limit",
    "rnn_traced",
    "source_name",
    "tag_activation_checkpoint",
    "tensorify_python_scalars",
]
