"""How far a case is from FP32: in loss, in what the model returns and in every gradient; ours, and CUDA autocast's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile import mpcompile
from rounding.emulated_autocast import emulated_autocast
from rounding.registry import Batch, Case

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16}
# One rounding to nearest, relative to the number.
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}
WORSE, ROUNDINGS = 1.5, 2.0
# A gradient this much smaller than the model's largest is a difference that cancels: measured against this floor.
CANCELLED = 1e-2
# Where autocast itself loses a third of a tensor both sides are noise, whose sizes differ by luck.
NOISE, LUCK = 0.33, 4.0
# The device row of the plans.
FORCED = Path(__file__).with_name("forced.toml")
PRODUCTS = ("matmul", "convolution", "attention", "rnn")

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Run:
    """What one run gave.

    Fields:
      tensors: "loss", "output 0"…, "gradient NAME" -> the tensor, unscaled, FP32.
      low: products that ran low.
    """

    tensors: dict[str, Tensor]
    low: int


@dataclass(frozen=True)
class Distance:
    """One tensor of a case: relative distances to FP32 in the 2-norm."""

    what: str
    ours: float
    autocast: float

    def excess(self, low: str, roundings: float = ROUNDINGS) -> float:
        """How many times the bound it is; at most 1 is right."""
        if math.isnan(self.autocast):
            return 0.0
        times = WORSE if self.autocast < NOISE else LUCK
        bound = times * self.autocast + roundings * ROUNDING[low]
        return math.inf if math.isnan(self.ours) else self.ours / bound


def reference(case: Case) -> Run:
    """The case in FP32, eager."""
    model, batch, loss = case.make()
    return _trained(model, model, batch, loss, 1.0, 0)


def autocast(case: Case, low: str) -> Run:
    """The case under CUDA's autocast, emulated."""
    model, (inputs, targets), loss = case.make()
    with emulated_autocast(TORCH[low]) as emulation:
        output = model(*inputs)
        value = loss(output, *targets)
    scale = _scale(case, low)
    (value * scale).backward()
    return Run(_tensors(model, output, value, scale), sum(emulation.ran.values()))


def policy(low: str, **fields: str) -> str:
    """A plan in which low products cost nothing and bytes much, so that all that may be low is."""
    return ",".join([f"low={low}", f"device={FORCED}", *(f"{k}={v}" for k, v in fields.items())])


def drop_in(case: Case, low: str, backend: str = "eager", **fields: str) -> Run:
    """The case as a wrapped model in a loop of the user's, with the loss outside."""
    model, batch, loss = case.make()
    wrapped = mpcompile(model, policy(low, **fields), backend=backend)
    run = _trained(wrapped, model, batch, loss, _scale(case, low), 0)
    return Run(run.tensors, sum(low_products(plan.graph) for plan in wrapped.plans))


def step(case: Case, low: str, backend: str = "eager", **fields: str) -> Run:
    """The case as one emitted step, with the loss inside; its gradients are the momentum after one step."""
    model, (inputs, targets), loss = case.make()
    wrapped = mpcompile(model, policy(low, **fields), backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    many = len(inputs)

    def whole(net: nn.Module, *args: Any) -> Tensor:
        return loss(net(*args[:many]), *args[many:])

    stepping = wrapped.train_step(optimizer, whole, scale=_scale(case, low) if low == "fp16" else "auto")
    result = stepping(*inputs, *targets)
    found = {"loss": result.loss.detach().float().clone()}
    for name, parameter in model.named_parameters():
        held = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if held is not None:
            found[f"gradient {name}"] = (
                held.detach().float() if bool(result.finite) else torch.full_like(held, math.nan)
            )
    if not bool(result.finite):
        found["loss"] = torch.full_like(found["loss"], math.nan)
    return Run(found, low_products(next(iter(stepping.specializations)).joint.forward.plan.graph))


WAYS: dict[str, Callable[..., Run]] = {"drop-in": drop_in, "step": step}


def low_products(graph: Any) -> int:
    """Products, convolutions and attentions of a plan that run low."""
    return sum(node.kind in PRODUCTS and node.precision in TORCH for node in graph)


def distances(wanted: Run, peer: Run, ours: Run) -> list[Distance]:
    """Each tensor that ours has, beside autocast's."""
    floors = _floors(wanted.tensors)
    return [
        Distance(
            what,
            _far(got, wanted.tensors[what], floors[what]),
            _far(peer.tensors[what], wanted.tensors[what], floors[what]),
        )
        for what, got in ours.tensors.items()
    ]


def _floors(tensors: dict[str, Tensor]) -> dict[str, float]:
    largest = max((float(t.norm()) for what, t in tensors.items() if what.startswith("gradient")), default=0.0)
    return {what: largest * CANCELLED if what.startswith("gradient") else 0.0 for what in tensors}


def _far(got: Tensor, wanted: Tensor, floor: float) -> float:
    """Relative distance; NaN where a finite number became none."""
    finite = wanted.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return math.nan
    error = float((got - wanted)[finite].double().norm())
    return error / max(float(wanted[finite].double().norm()), floor, 1e-30) if error else 0.0


def _scale(case: Case, low: str) -> float:
    return case.scale if low == "fp16" else 1.0


def _trained(called: nn.Module, model: nn.Module, batch: Batch, loss: Loss, scale: float, low: int) -> Run:
    inputs, targets = batch
    output = called(*inputs)
    value = loss(output, *targets)
    (value * scale).backward()
    return Run(_tensors(model, output, value, scale), low)


def _tensors(model: nn.Module, output: Any, loss: Tensor, scale: float) -> dict[str, Tensor]:
    found = {"loss": loss.detach().float()}
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    found |= {f"output {i}": leaf.detach().float() for i, leaf in enumerate(leaves)}
    grads = ((name, p.grad) for name, p in model.named_parameters())
    found |= {f"gradient {name}": g.float() / scale for name, g in grads if g is not None}
    return found
