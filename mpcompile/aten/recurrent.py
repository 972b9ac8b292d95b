"""LSTM, GRU and RNN as one operation of a compiled graph.

AOTAutograd decomposes ``aten.lstm`` into its time steps: 24 of them take Inductor a minute and a thousand are hopeless.
Here it stays one call of torch's own kernel (cuDNN, oneDNN, or ATen's loop), and so does its backward.

The forward runs that kernel with autograd on and hangs autograd's graph on a small tensor, the *token*, which the
compiled graph saves for its backward like any other.  So nothing is computed twice, and what the kernel keeps dies
with the token.  Operands and results are copies, since Inductor may write into the memory of its own values.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.errors import RuntimeFailure
from mpcompile.torch_internals.dynamo import rnn_traced
from mpcompile.torch_internals.operators import schema_of, wrap_trace_kernels
from mpcompile.torch_internals.tensors import flatten_rnn_weights

aten = torch.ops.aten
# Which: ATen's operation; the tail of each operation's arguments, from `has_biases` on, is the same but for batch_first.
_TARGETS = {
    overload: name
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for overload in (getattr(aten, name).input, getattr(aten, name).data)
}
_LIBRARY: Any = torch.library.Library("mpcompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPTIONS = "str which, int states, bool has_biases, int layers, float dropout, bool train, bool both, bool batch_first"
# The input stands alone: torch looks there for the device of an operation that draws random numbers.
_LIBRARY.define(f"recurrent(Tensor source, Tensor[] operands, Tensor? sizes, {_OPTIONS}, bool keep) -> Tensor[]",
                tags=(torch.Tag.nondeterministic_seeded,))  # fmt: skip
_LIBRARY.define(f"recurrent_backward(Tensor token, Tensor?[] grads, Tensor source, Tensor[] operands, Tensor? sizes, {_OPTIONS}, "
                "bool[] wanted) -> Tensor[]")  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """Autograd's graph of one forward: the leaves it started from, and its results."""

    leaves: list[Tensor]
    results: list[Tensor]


def _run(source: Tensor, operands: Sequence[Tensor], sizes: Tensor | None, which: str, states: int,
         *options: Any) -> list[Tensor]:  # fmt: skip
    """[output, hidden, …] by ATen's own operation. `operands` are the states, and the weights."""
    state, weights = list(operands[:states]), list(operands[states:])
    operation, given = getattr(aten, which), state if which == "lstm" else state[0]
    if sizes is not None:
        return list(operation.data(source, sizes, given, weights, *options[:-1]))
    return list(operation.input(source, given, weights, *options))


def _forward(source: Tensor, operands: Sequence[Tensor], sizes: Tensor | None, *rest: Any) -> list[Tensor]:
    *options, keep = rest
    if not keep:
        with torch.no_grad():
            return [*map(_fresh, _run(source, operands, sizes, *options)), source.new_empty(1)]
    kept = _run_kept(source, operands, sizes, *options)
    token = source.new_empty(1)
    token._mpcompile_kept = kept  # type: ignore[attr-defined]
    return [*(_fresh(r.detach()) for r in kept.results), token]


def _run_kept(source: Tensor, operands: Sequence[Tensor], sizes: Tensor | None, *options: Any) -> Kept:
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [_fresh(t.detach()) for t in (source, *operands)]
        _flatten(leaves, *options)
        for leaf in leaves:
            leaf.requires_grad_()
        return Kept(leaves, _run(leaves[0], leaves[1:], sizes, *options))


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _flatten(leaves: list[Tensor], which: str, states: int, has_biases: bool, layers: int, dropout: float, train: bool,
             both: bool, batch_first: bool) -> None:  # fmt: skip
    """On CUDA: the weights as views of one buffer, which is how cuDNN wants them."""
    weights = leaves[1 + states :]
    cudnn: Any = torch.backends.cudnn
    if weights[0].device.type != "cuda" or not cudnn.is_acceptable(weights[0]):
        return
    mode = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}[which]
    output, cell = leaves[1].shape[-1], leaves[states].shape[-1]
    projected = output if output != cell else 0
    each = (4 if has_biases else 2) + (projected > 0)
    with torch.no_grad():
        flatten_rnn_weights(weights, each, leaves[0].shape[-1], mode, cell, projected, layers, batch_first, both)


def _backward(token: Tensor, grads: Sequence[Tensor | None], source: Tensor, operands: Sequence[Tensor],
              sizes: Tensor | None, *rest: Any) -> list[Tensor]:  # fmt: skip
    *options, wanted = rest
    kept = getattr(token, "_mpcompile_kept", None)
    if kept is None:
        dropout, train = options[4:6]
        if dropout and train:
            raise RuntimeFailure("MP704", "a recurrent layer with dropout cannot be run backwards",
                                 why="what its forward kept was replaced", try_="backend='eager'")  # fmt: skip
        kept = _run_kept(source, operands, sizes, *options)
    pairs = [(r, g) for r, g in zip(kept.results, grads, strict=True) if g is not None]
    leaves = [leaf for leaf, want in zip(kept.leaves, wanted, strict=True) if want]
    with torch.inference_mode(False), torch.enable_grad():
        found = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs],
                                    retain_graph=True, allow_unused=True, materialize_grads=True)  # fmt: skip
    return [_fresh(g.detach()) for g in found]


def _fake_forward(source: Tensor, operands: Sequence[Tensor], sizes: Tensor | None, which: str, states: int,
                  has_biases: bool, layers: int, dropout: float, train: bool, both: bool, *_: Any) -> list[Tensor]:  # fmt: skip
    state = operands[:states]
    output = source.new_empty((*source.shape[:-1], state[0].shape[-1] * (2 if both else 1)))
    return [output, *(source.new_empty(s.shape) for s in state), source.new_empty(1)]


def _fake_backward(token: Tensor, grads: Sequence[Tensor | None], source: Tensor, operands: Sequence[Tensor],
                   *rest: Any) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t, want in zip((source, *operands), rest[-1], strict=True) if want]


for _name, _real, _fake in (("recurrent", _forward, _fake_forward), ("recurrent_backward", _backward, _fake_backward)):
    _LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mpcompile::{_name}", _fake, lib=_LIBRARY)


class _Recurrent(torch.autograd.Function):
    """The two operations as one differentiable one: (sizes, options, input, *operands) -> (output, *states)."""

    @staticmethod
    def forward(ctx: Any, sizes: Tensor | None, options: tuple[Any, ...], source: Tensor,
                *operands: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        *results, token = torch.ops.mpcompile.recurrent(source, operands, sizes, *options, True)
        ctx.save_for_backward(token, sizes, source, *operands)
        ctx.options = options
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        token, sizes, source, *operands = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[2:])
        made = torch.ops.mpcompile.recurrent_backward(token, grads, source, operands, sizes, *ctx.options, wanted)
        rest = iter(made)
        return (None, None, *(next(rest) if want else None for want in wanted))


def recurrent(sizes: Tensor | None, options: tuple[Any, ...], source: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    """An LSTM, GRU or RNN; `options` are `_OPTIONS`, `operands` the states and the weights."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (source, *operands)):
        return _Recurrent.apply(sizes, options, source, *operands)  # type: ignore[no-any-return,no-untyped-call]
    return tuple(torch.ops.mpcompile.recurrent(source, operands, sizes, *options, False)[:-1])


def _arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of `recurrent` from those of ATen's operation."""
    given = dict(zip((a.name for a in schema_of(target).arguments), args, strict=False)) | dict(kwargs)
    source, sizes = given.get("input", given.get("data")), given.get("batch_sizes")
    states: Any = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
    flags = [given[name] for name in ("has_biases", "num_layers", "dropout", "train", "bidirectional")]
    options = (_TARGETS[target], len(states), *flags, given.get("batch_first", False))
    return (sizes, options, source, *states, *given["params"])


def with_whole_layers(module: fx.GraphModule) -> fx.GraphModule:
    """`module` with ATen's recurrent operations replaced, for a compiler; itself where it has none."""
    if not any(module.graph.find_nodes(op="call_function", target=target) for target in _TARGETS):
        return module
    made = fx.GraphModule(module, copy.deepcopy(module.graph))
    made.meta.update(module.meta)
    for node in made.graph.nodes:
        if node.op == "call_function" and node.target in _TARGETS:
            node.args, node.kwargs = _arguments(node.target, node.args, node.kwargs), {}
            node.target = recurrent
    made.graph.lint()
    made.recompile()
    return made


class _Traced(threading.local):
    """Whether this thread traces a graph in which recurrent layers are to stay whole."""

    whole = False


_TRACED = _Traced()


@contextlib.contextmanager
def rnn_kept_opaque() -> Iterator[None]:
    """While tracing: recurrent layers are one step, whatever the length of the sequence.

    Dynamo traces `nn.LSTM`, `nn.GRU` and `nn.RNN` here; by default it leaves the rest of a function that touches one to
    eager FP32.  And what a trace needs to know of their results comes from their shapes: torch's own decomposition
    walks through the time steps, which takes long and makes each length of a sequence a graph of its own.
    """
    whole, _TRACED.whole = _TRACED.whole, True
    try:
        with rnn_traced():
            yield
    finally:
        _TRACED.whole = whole


def _in_traces(target: Any, usual: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if _TRACED.whole:
            return recurrent(*_arguments(target, args, kwargs))
        return usual(*args, **kwargs)

    return kernel


for _target in _TARGETS:
    wrap_trace_kernels(_target, functools.partial(_in_traces, _target))


__all__ = ["recurrent", "rnn_kept_opaque", "with_whole_layers"]
