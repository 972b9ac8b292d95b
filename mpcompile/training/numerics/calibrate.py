"""Ranges of values and gradients: the FP32 program's forward and backward on some batches, node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.aten.graphs import outputs_of
from mpcompile.compiler import Settings
from mpcompile.errors import TrainingError
from mpcompile.measured_graph import keyed, measured_graph
from mpcompile.ranges import Call, Ranges, Spread
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.numerics.subject import Differentiable, Subject, fp32_settings, phase_of, subject


def calibrate(
    model: nn.Module, settings: Settings, batches: Iterable[Any], loss_fn: Callable[..., Any] | None = None
) -> Ranges:
    """Ranges of all values and gradients over `batches`. Nothing is changed: no weight, no buffer, no random number.

    Batches of one signature share one graph.

    Raises:
      CaptureError: MP101. TrainingError: MP561.
    """
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = Ranges(parameters=parameters)
    plain = fp32_settings(settings)
    known: dict[Any, Subject] = {}
    with torch.random.fork_rng():
        for given in batches:
            batch = Batch(*as_call(given))
            key = batch.signature(), batch.shapes()
            if key not in known:
                known[key] = subject(model, loss_fn or Differentiable(), batch, plain)
            _measure(known[key], batch, found)
            found.batches += 1
    if not found.batches:
        raise TrainingError("MP561", "calibrate() was given no batch", try_="calibrate([(x, labels), ...])")
    return found


def as_call(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as (args, kwargs): a dict is keywords, a tuple or list is arguments, anything else is the one argument."""
    if isinstance(given, Call):
        return given.args, dict(given.kwargs)
    if isinstance(given, dict):
        return (), given
    return (tuple(given), {}) if isinstance(given, (tuple, list)) else ((given,), {})


def _measure(found: Subject, batch: Batch, ranges: Ranges) -> None:
    read = found.plan.capture
    keys = {node.id: key for key, node in keyed(read.graph, read.outside)}
    ranges.note_graph(measured_graph(read.graph, read.outside))
    inputs = found.full_inputs(batch)
    with torch.no_grad():
        outputs: Any = _Measuring(found, keys, ranges).run(*inputs, torch.ones((), device=found.device()))
    if bool(torch.isnan(outputs[found.loss_at])):
        raise TrainingError("MP561", "the loss of a batch is NaN in FP32: its ranges say nothing",
                            try_="batches and weights on which the model itself is finite")  # fmt: skip


class _Measuring(fx.Interpreter):
    """Runs the graph and notes the spread of each result, and of each gradient at a result."""

    def __init__(self, found: Subject, keys: dict[str, str], ranges: Ranges) -> None:
        super().__init__(found.module)
        self.found, self.keys, self.ranges = found, keys, ranges
        self.ends = {n for n in outputs_of(found.module) if isinstance(n, fx.Node)}
        # Where a gradient is read by more nodes of its group, it is measured once.
        self.seen = set[tuple[fx.Node, str]]()

    def run_node(self, n: fx.Node) -> Any:
        key = self._key(n)
        if key and phase_of(n) == "backward":
            for read in n.all_input_nodes:
                self._gradient(read, key, n)
        result = super().run_node(n)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        if key and phase_of(n) == "forward" and n in self.found.exits:
            self.ranges.note(key, spread(result))
        elif key and n in self.ends:
            self.ranges.note(f"{key}|parameters", spread(result), gradient=True)
        return result

    def _gradient(self, read: fx.Node, key: str, reader: fx.Node) -> None:
        outside = self.found.group.get(read) != self.found.group[reader]
        value = self.env[read]
        floats = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
        if outside and phase_of(read) == "backward" and floats and (read, key) not in self.seen:
            self.seen.add((read, key))
            self.ranges.note(key, spread(value), gradient=True)

    def _key(self, n: fx.Node) -> str:
        planned = self.found.planned(n)
        return self.keys.get(planned.id, "") if planned is not None else ""


def spread(tensor: Tensor) -> Spread:
    """Ends, and how many elements there are of each power of two. Two passes over the tensor, and one transfer."""
    value = tensor.detach().float()
    finite = value[value.isfinite()]
    if not finite.numel():
        return Spread()
    least, most = torch.aminmax(finite)
    sizes = finite[finite != 0].abs()
    powers = torch.frexp(sizes).exponent.long() - 1  # a size is in [2**power, 2 * 2**power)
    kinds, counts = torch.unique(powers, return_counts=True)
    table = dict(zip(kinds.tolist(), counts.tolist(), strict=True))
    return Spread(float(least), float(most), table)


__all__ = ["as_call", "calibrate", "spread"]
