"""Python of the user's that has a say in the backward: kept whole in the captured graph, called again for the joint one.

`torch.export` reads a program's forward and no more: of an autograd function it would keep the forward's operations and
lose the backward, of a hook on a tensor nothing at all.  So while it reads, such a call is recorded as one node
(`record`); `make_calls` turns the node's target into a function that makes the very call.  AOTAutograd, which traces
forward and backward of the rewritten graph, then runs the user's own Python, and both halves become ATen.

What cannot be traced (a kernel that asks for addresses, control flow that asks for values) is made `opaque`: one
operation that runs the call with autograd on, and hangs autograd's graph on a small tensor, the token, for its backward.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

_LIBRARY: Any = torch.library.Library("mpcompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("traced_call(Tensor[] operands, SymInt[] sizes, int number) -> Tensor[]")
# The first operand stands alone: torch looks there for the device of an operation that may draw random numbers.
_SEEDED = (torch.Tag.nondeterministic_seeded,)
_LIBRARY.define("opaque_call(Tensor first, Tensor[] rest, int number, bool keep) -> Tensor[]", tags=_SEEDED)
_LIBRARY.define("opaque_call_backward(Tensor token, Tensor?[] grads, Tensor first, Tensor[] rest, int number, "
                "bool[] wanted) -> Tensor[]")  # fmt: skip

# Calls that only act on gradients.
HOOKS = frozenset({"autograd.gradient_hook", "autograd.module_hook"})
_NUMBERS = itertools.count()
_OPAQUE: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()


@dataclass(eq=False)
class Call:
    """One call of the user's Python.

    Fields:
      op: what reports and overrides call it: "autograd.GeLUFunction".
      run: operands (tensors, then sizes) -> results.
      samples: fake tensors such as the results are.
      autocast: the float type that its author wants its operands in ("fp16"); "" for none.
      is_hook: gives its one operand back, and acts on the gradient alone.
      dtypes: the float type of each result as the plan has it; None: as the function gives them.
      opaque: runs as it is, each time, instead of what a trace of it made.
      host: and must run on the host each time: a replay of its kernels alone would be wrong.
      dropped: the program took it back (a hook's handle was removed).
    """

    op: str
    run: Callable[..., Sequence[Tensor]]
    samples: Sequence[Tensor]
    autocast: str = ""
    is_hook: bool = False
    dtypes: Sequence[torch.dtype | None] | None = None
    opaque: bool = False
    host: bool = False
    dropped: bool = False
    number: int = field(default_factory=lambda: next(_NUMBERS))

    def __post_init__(self) -> None:
        _OPAQUE[self.number] = self

    def __call__(self, *operands: Any) -> list[Tensor]:
        results = _run_opaque(self, operands) if self.opaque else list(self.run(*operands))
        if self.dtypes is None:
            return results
        return [r if d is None else r.to(d) for r, d in zip(results, self.dtypes, strict=True)]

    def target(self) -> Callable[..., Any]:
        """A function for a graph's node: fx names what it calls."""

        def call(*operands: Any) -> list[Tensor]:
            return self(*operands)

        call.__name__ = call.__qualname__ = self.op.rpartition(".")[2]
        marked: Any = call
        marked.mp_op, marked.mp_autocast, marked.mp_call = self.op, self.autocast, self
        return call


class _Recording(threading.local):
    calls: list[Call] | None = None


_RECORDING = _Recording()


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """While active in this thread, `record` may be called by what the capture runs."""
    before, _RECORDING.calls = _RECORDING.calls, []
    try:
        yield _RECORDING.calls
    finally:
        _RECORDING.calls = before


def is_recording() -> bool:
    return _RECORDING.calls is not None


def record(call: Call, operands: Sequence[Any]) -> list[Tensor]:
    """Put `call` into the trace as one node; its results have the samples' types."""
    assert _RECORDING.calls is not None
    _RECORDING.calls.append(call)
    tensors = [o for o in operands if isinstance(o, Tensor)]
    sizes = [o for o in operands if not isinstance(o, Tensor)]
    results: list[Tensor] = torch.ops.mpcompile.traced_call(tensors, sizes, len(_RECORDING.calls) - 1)
    return results


def _like(sample: Tensor) -> Tensor:
    return torch.empty_strided(sample.size(), sample.stride(), dtype=sample.dtype, device=sample.device)


def _fake_traced(operands: Sequence[Tensor], sizes: Sequence[Any], number: int) -> list[Tensor]:
    assert _RECORDING.calls is not None
    return [_like(sample) for sample in _RECORDING.calls[number].samples]


torch.library.register_fake("mpcompile::traced_call", _fake_traced, lib=_LIBRARY)
# A hook's result is read by no one in the program.
fx.node.has_side_effect(torch.ops.mpcompile.traced_call.default)


def make_calls(module: fx.GraphModule, calls: Sequence[Call]) -> None:
    """Let the recorded nodes of `module` make their calls; a hook's tensor is read through the hook by all its readers."""
    nodes = list(module.graph.find_nodes(op="call_function", target=torch.ops.mpcompile.traced_call.default))
    hooks = list[fx.Node]()
    for node in nodes:
        operands, sizes, number = list[Any](node.args)
        call = calls[number]
        node.target, node.args = call.target(), (*operands, *sizes)
        if call.is_hook:
            hooks.append(node)
    # Autograd calls the hooks of one tensor in the order in which they are set: a later one reads an earlier one's.
    for node in hooks:
        _let_pass(module.graph, node)
    module.recompile()


def _let_pass(graph: fx.Graph, node: fx.Node) -> None:
    source: Any = node.args[0]
    for item in list(node.users):
        graph.erase_node(item)
    if getattr(node.target, "mp_call").dropped:  # noqa: B009
        graph.erase_node(node)
        return
    _after(graph, source).append(node)
    with graph.inserting_after(node):
        through = graph.call_function(operator.getitem, (node, 0))
    # The very fake: who looks for views of one storage must find it.
    node.meta["val"], through.meta["val"] = [source.meta["val"]], source.meta["val"]
    source.replace_all_uses_with(through, delete_user_cb=lambda user: user is not node)


def _after(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The last node of those that must stay before what reads `node`."""
    if node.op != "placeholder":
        return node
    return graph.find_nodes(op="placeholder")[-1]  # type: ignore[no-any-return]


def insert(graph: fx.Graph, source: fx.Node, call: Call) -> fx.Node:
    """Let all readers of `source` read it through the hook `call`: through the node that is given back."""
    with graph.inserting_after(_after(graph, source)):
        node = graph.call_function(call.target(), (source,))
    node.meta = {key: source.meta[key] for key in ("stack_trace", "nn_module_stack") if key in source.meta}
    node.meta["val"] = [source.meta["val"]] if "val" in source.meta else None
    with graph.inserting_after(node):
        through = graph.call_function(operator.getitem, (node, 0))
    source.replace_all_uses_with(through, delete_user_cb=lambda user: user is not node)
    return through


def calls_of(module: fx.GraphModule) -> dict[fx.Node, Call]:
    """Node -> call, of the calls in a graph whose calls are made."""
    return {n: call for n in module.graph.nodes if (call := getattr(n.target, "mp_call", None)) is not None}


@dataclass(frozen=True)
class _Kept:
    """Autograd's graph of one opaque call: the leaves that it started from, and its results."""

    leaves: list[Tensor]
    results: list[Tensor]


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.preserve_format)


def _opaque(first: Tensor, rest: Sequence[Tensor], number: int, keep: bool) -> list[Tensor]:
    kept = _run_kept(first, rest, number)
    token = first.new_empty(1)
    if keep:
        token._mpcompile_kept = kept  # type: ignore[attr-defined]
    return [*map(_fresh, kept.results), token]


def _run_kept(first: Tensor, rest: Sequence[Tensor], number: int) -> _Kept:
    # Copies: Inductor may write into the memory of its own values.
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [_fresh(t).requires_grad_(t.is_floating_point()) for t in (first, *rest)]
        return _Kept(leaves, list(_OPAQUE[number].run(*leaves)))


def _opaque_backward(token: Tensor, grads: Sequence[Tensor | None], first: Tensor, rest: Sequence[Tensor], number: int,
                     wanted: Sequence[bool]) -> list[Tensor]:  # fmt: skip
    kept = getattr(token, "_mpcompile_kept", None) or _run_kept(first, rest, number)
    pairs = [(r, g) for r, g in zip(kept.results, grads, strict=True) if g is not None and r.requires_grad]
    leaves = [leaf for leaf, want in zip(kept.leaves, wanted, strict=True) if want]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    with torch.inference_mode(False), torch.enable_grad():
        found = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs], retain_graph=True,
                                    allow_unused=True, materialize_grads=True)  # fmt: skip
    # A compiler was told that they lie as the operands do.
    given = [t for t, want in zip((first, *rest), wanted, strict=True) if want]
    return [torch.empty_like(t).copy_(g) for t, g in zip(given, found, strict=True)]


def _fake_opaque(first: Tensor, rest: Sequence[Tensor], number: int, keep: bool) -> list[Tensor]:
    return [*map(_like, _OPAQUE[number].samples), first.new_empty(1)]


def _fake_opaque_backward(token: Tensor, grads: Any, first: Tensor, rest: Sequence[Tensor], number: int,
                          wanted: Sequence[bool]) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t, want in zip((first, *rest), wanted, strict=True) if want]


for _name, _real, _fake in (("opaque_call", _opaque, _fake_opaque),
                            ("opaque_call_backward", _opaque_backward, _fake_opaque_backward)):  # fmt: skip
    _LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mpcompile::{_name}", _fake, lib=_LIBRARY)


class _Opaque(torch.autograd.Function):
    """The two operations as one differentiable one."""

    @staticmethod
    def forward(ctx: Any, number: int, *operands: Tensor) -> tuple[Tensor, ...]:
        first, *rest = operands
        *results, token = torch.ops.mpcompile.opaque_call(first, rest, number, True)
        ctx.save_for_backward(token, *operands)
        ctx.number = number
        ctx.mark_non_differentiable(*(r for r in results if not (r.is_floating_point() or r.is_complex())))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        token, first, *rest = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[1:])
        made = iter(torch.ops.mpcompile.opaque_call_backward(token, grads, first, rest, ctx.number, wanted))
        return (None, *(next(made) if want else None for want in wanted))


def _run_opaque(call: Call, operands: Sequence[Any]) -> list[Tensor]:
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        return list(_Opaque.apply(call.number, *operands))  # type: ignore[no-untyped-call]
    first, *rest = operands
    return list(torch.ops.mpcompile.opaque_call(first, rest, call.number, False)[:-1])


__all__ = ["HOOKS", "Call", "calls_of", "insert", "is_recording", "make_calls", "record", "recording"]
