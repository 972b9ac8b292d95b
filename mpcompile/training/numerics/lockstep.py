"""Two runs of one graph at once: as the plan has it, and with every low type raised to FP32.

The joint graph of a plan is the FP32 program plus casts, so the same graph, with each low type in it read as FP32, *is*
the FP32 run, node by node (FP8 copies: `fp8_lanes`).  A third lane says what a node does wrong by itself: it is fed the
FP32 run's values, rounded as the plan rounds what the node reads.  Values are freed after their last reader, so what is
held at any time is what one training step holds of each run, and no more.

Random numbers are the same in all lanes: a mask is drawn under one state of the generator, and what is noise from the
start (`randn`) is the plan's.

A graph without a backward may write in place.  Its lanes then share no storage: what one of them writes, no other reads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import LOW_DTYPES, op_name
from mpcompile.aten.graphs import inputs_of
from mpcompile.rules.hazards import CASTS, base
from mpcompile.torch_internals.operators import schema_of
from mpcompile.torch_internals.tensors import pytree
from mpcompile.training.numerics import fp8_lanes
from mpcompile.training.numerics.measure import Lanes

# They hand on what they read, element by element or in part: no error of their own.
MOVES = frozenset({
    "view", "reshape", "unsafe_view", "expand", "t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select",
    "detach", "alias", "clone", "contiguous", "split", "split_with_sizes", "unbind", "chunk", "narrow", "flatten",
    "unflatten", "as_strided", "lift_fresh_copy", "flip", "numpy_t", "view_as", "expand_as", "getitem", "tensor_split",
})  # fmt: skip
# What they make is noise and nothing else; other random operations draw a mask for what they read.
NOISE = frozenset({"rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "bernoulli",
                   "normal", "uniform", "exponential", "poisson", "multinomial", "geometric", "cauchy", "log_normal",
                   "random"})  # fmt: skip


Observer = Callable[[fx.Node, Lanes], None]


class Lockstep(fx.Interpreter):
    """Runs a graph in three lanes.

    Args:
      module: a flat ATen graph whose nodes have their fake results in ``meta["val"]``.
      group: node -> the node of the plan that it belongs to; inside of one group the fed lane reads itself.
      rounded: casts to a low type that the program itself asks for: FP32 rounds there too.
      observer: called after each node that gives a floating tensor.
    """

    def __init__(self, module: fx.GraphModule, group: Mapping[fx.Node, Any], rounded: frozenset[fx.Node],
                 observer: Observer) -> None:  # fmt: skip
        super().__init__(module)
        self.inputs = inputs_of(module)
        self.group, self.rounded, self.observer = group, rounded, observer
        self.held = held_types(module.graph)
        self.copies = fp8_lanes.copies(module.graph, MOVES)
        # Lanes that share what is alike save a run of it, and are right where nothing is written in place.
        self._apart = any(map(_writes, module.graph.nodes))
        self.full_inputs: dict[fx.Node, Any] = {}

    def compare(self, inputs: Sequence[Any], full: Sequence[Any]) -> list[Lanes]:
        """The graph's outputs, for the plan's inputs and those of the FP32 run."""
        self.full_inputs = dict(zip(self.inputs, full, strict=True))
        found: Any = self.run(*inputs)
        return list(found)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return super().run_node(n)
        if n.op == "placeholder":
            lanes = self._own(super().run_node(n), self.full_inputs[n])
        elif n.op == "get_attr":
            plan = super().run_node(n)
            lanes = self._own(plan, raised(plan))
        else:
            lanes = self._called(n)
        if isinstance(lanes.plan, Tensor) and lanes.plan.is_floating_point():
            self.observer(n, lanes)
        return lanes

    def _own(self, plan: Any, full: Any) -> Lanes:
        """The lanes of what is given: of their own where the graph writes in place."""
        return Lanes(_copied(plan), _copied(full), _copied(full)) if self._apart else Lanes(plan, full, full)

    def _called(self, n: fx.Node) -> Lanes:
        same = all(self.env[a].plan is self.env[a].full for a in n.all_input_nodes) and not self._apart
        named = names_low(n)
        if _is_noise(n) and not _writes(n):
            plan = self._call(n, lambda a: self.env[a].plan)
            full = plan if not named and same else pytree.tree_map_only(Tensor, raised, plan)
            return self._own(plan, full)
        state = _state(n)
        full = self._full(n)
        if same and not named:
            return Lanes(full, full, full)
        _restore(state)
        plan = self._call(n, lambda a: self.env[a].plan)
        read = {a: self._fed(a, n) for a in n.all_input_nodes}
        if self._apart:
            read = {a: _copied(value) for a, value in read.items()}
        elif not named and all(read[a] is self.env[a].full for a in read):
            return Lanes(plan, full, full)
        _restore(state)
        return Lanes(plan, full, self._call(n, read.__getitem__))

    def _fed(self, read: fx.Node, n: fx.Node) -> Any:
        """What `n` reads in the fed lane: its own group's value, or FP32's rounded as the plan's is."""
        lanes, group = self.env[read], self.group.get(n)
        if read in self.copies or (group is not None and self.group.get(read) == group):
            return lanes.fed
        return _rounded_like(lanes.full, lanes.plan, self.held.get(read))

    def _full(self, n: fx.Node) -> Any:
        if n in self.rounded:
            given = self.env[n.all_input_nodes[0]].full
            return given.to(n.meta["val"].dtype).to(given.dtype)
        if is_cast(n) and n.meta["val"].dtype in (*LOW_DTYPES, torch.float32):
            given = self.env[n.all_input_nodes[0]].full
            if given.dtype == torch.float32 and given.device == n.meta["val"].device:
                return _copied(given) if self._apart else given
        return self._call(n, lambda a: self.env[a].full, full=True)

    def _call(self, n: fx.Node, value: Callable[[fx.Node], Any], *, full: bool = False) -> Any:
        args: Any = fx.node.map_arg(n.args, value)
        kwargs: Any = fx.node.map_arg(n.kwargs, value)
        if full:
            args, kwargs = fx.node.map_aggregate((args, kwargs), _raise_type)
            args = _without_widening(n, args)
            if fp8_lanes.is_quantise(n):
                return fp8_lanes.full_quantise(*args, **kwargs)
            if fp8_lanes.is_product(n):
                return fp8_lanes.full_product(n, args)
        if n.op == "call_module":
            return self.fetch_attr(str(n.target))(*args, **kwargs)
        if n.op == "call_method":
            return getattr(args[0], str(n.target))(*args[1:], **kwargs)
        return n.target(*args, **kwargs)  # type: ignore[operator]


def raised(value: Any) -> Any:
    """A low tensor in FP32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW_DTYPES else value


def is_cast(n: Any) -> bool:
    """A change of the float type and of nothing else."""
    if not isinstance(n, fx.Node) or n.op != "call_function" or base(op_name(n.target)) not in CASTS:
        return False
    value = n.meta.get("val")
    source = n.all_input_nodes[0].meta.get("val") if n.all_input_nodes else None
    floats = all(isinstance(t, Tensor) and t.is_floating_point() for t in (value, source))
    return floats and value.shape == source.shape and value.device == source.device  # type: ignore[union-attr]


def is_move(n: fx.Node) -> bool:
    return n.op == "call_function" and (n.target is operator.getitem or base(op_name(n.target)) in MOVES)


def held_types(graph: fx.Graph) -> dict[fx.Node, torch.dtype]:
    """The low type that each value is rounded to: its own, or where it was widened or moved, that before."""
    found = dict[fx.Node, torch.dtype]()
    for n in graph.nodes:
        value = n.meta.get("val")
        dtype = value.dtype if isinstance(value, Tensor) else None
        if dtype in LOW_DTYPES:
            found[n] = dtype
        elif n.all_input_nodes and n.all_input_nodes[0] in found and (is_cast(n) or is_move(n)):
            found[n] = found[n.all_input_nodes[0]]
    return found


def names_low(n: fx.Node) -> bool:
    """True where the node itself is told to make a low type, or never makes another."""
    if fp8_lanes.is_quantise(n) or fp8_lanes.is_product(n):
        return True
    found = list[Any]()
    fx.node.map_aggregate((n.args, n.kwargs), found.append)
    return any(a in LOW_DTYPES for a in found if isinstance(a, torch.dtype))


def _raise_type(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in LOW_DTYPES else argument


def _without_widening(n: fx.Node, args: Any) -> Any:
    """Softmaxes that are told to give FP32 for low input: theirs is FP32 already."""
    if base(op_name(n.target)) not in ("softmax", "log_softmax") or len(args) < 3 or args[2] is not True:
        return args
    return (*args[:2], args[0].dtype in LOW_DTYPES, *args[3:])


def _rounded_like(full: Any, plan: Any, held: torch.dtype | None) -> Any:
    if isinstance(full, (tuple, list)):
        return type(full)(_rounded_like(f, p, held) for f, p in zip(full, plan, strict=True))
    if not isinstance(full, Tensor) or not full.is_floating_point():
        return full
    rounded = full if held is None else full.to(held)
    return rounded.to(plan.dtype)


def _writes(n: fx.Node) -> bool:
    """True where a node writes to what it reads."""
    if n.op in ("placeholder", "get_attr", "output") or n.target is operator.getitem:
        return False
    schema, name = schema_of(n.target), op_name(n.target)
    # Their schemas do not say that running statistics are written.
    statistics = "batch_norm" in name or "instance_norm" in name
    return statistics or (bool(schema.is_mutable) if schema is not None else n.op == "call_method")


def _copied(value: Any) -> Any:
    """Tensors of storage of their own, laid out alike."""
    return pytree.tree_map_only(Tensor, torch.clone, value)


def _is_noise(n: fx.Node) -> bool:
    return _is_random(n) and base(op_name(n.target)) in NOISE


def _is_random(n: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())


def _state(n: fx.Node) -> Any:
    """The generators' states, where `n` may draw from one."""
    if not _is_random(n):
        return None
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda


def _restore(state: Any) -> None:
    if state is None:
        return
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
