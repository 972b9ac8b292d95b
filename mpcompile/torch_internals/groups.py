"""Of process groups and DistributedDataParallel."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed import _functional_collectives, distributed_c10d
from torch.fx import GraphModule, Node
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from mpcompile.torch_internals.names import found
from mpcompile.torch_internals.tensors import FakeTensor

# The collectives of graphs. The module above is imported for what a trace computes of their results.
collectives: Any = torch.ops._c10d_functional
assert _functional_collectives


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
    from torch.fx.passes.split_module import split_module

    mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
    cut = split_module(module, None, pieces.__getitem__)  # type: ignore[arg-type]
    compiler = found("torch._dynamo.backends.distributed", "SubmodCompiler")
    compiler(cut, compile_piece, mode).run(*fakes)
    cut.recompile()
    return cut


__all__ = [
    "active_ddp",
    "before_groups_end",
    "collectives",
    "compile_pieces",
    "has_communication_hook",
    "module_replaced",
    "patience_of",
]
