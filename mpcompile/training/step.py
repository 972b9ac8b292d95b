"""The training step: forward, backward and update, emitted as one graph and run without asking the device anything.

`TrainStep` owns what lives between steps (loss scale, gradient buffers, shadows) and what is compiled: one forward and
backward per signature of the batch (`Artefact`), one update per set of gradients.  Everything it does per step is a
fixed number of calls, however many parameters there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpcompile.errors import TrainingError, page
from mpcompile.runtime.device import settle_policy
from mpcompile.training.forward import Input, capture
from mpcompile.training.joint import Joint
from mpcompile.training.joint import trace as trace_joint
from mpcompile.training.optim import Binding, bind
from mpcompile.training.parts import Run, decompositions, run_joint, run_update
from mpcompile.training.scaler import LossScale, ScaleState
from mpcompile.training.shadows import SHADOWS
from mpcompile.training.update import Operands, Spec, in_place
from mpcompile.training.update import trace as trace_update

page(
    "MP541",
    "A training step option that does not exist",
    "An argument of `train_step` has a value that it cannot take.",
    "accumulate is 1 or more, masters 'full' or 'split', backend 'inductor' or 'eager', cuda_graph 'auto', True or False.",
)


class StepResult(NamedTuple):
    """What one call gave: 0-dim tensors on the device; reading one is the caller's choice to wait for it.

    Fields:
      loss: FP32, of this call's batch, not scaled.
      stepped: True when the masters were updated by this call.
      finite: False when a gradient of this call's window was not finite, so that the update was skipped.
      scale: the loss scale after the call.
      grad_norm: FP32 norm of the window's unscaled gradients before clipping; NaN on a call that does not update.
    """

    loss: Tensor
    stepped: Tensor
    finite: Tensor
    scale: Tensor
    grad_norm: Tensor


@dataclass
class Artefact:
    """Forward and backward, ready to run for batches of one signature.

    Fields:
      fixed: the inputs that are not of the batch, in their places (None where the batch goes).
      args: (place, number of the leaf) of each tensor of the batch.
      layout: what each gradient is: (parameter's name, dtype).
      buffers: the model's tensors that the forward's leading outputs replace.
    """

    joint: Joint
    run: Run
    fixed: list[Any]
    args: list[tuple[int, int]]
    layout: tuple[tuple[str, torch.dtype], ...]
    buffers: list[Tensor]

    def __call__(self, leaves: Sequence[Any], seed: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """(loss, gradients) for a batch; buffers are brought up to date."""
        inputs = [*self.fixed, seed]
        for place, leaf in self.args:
            inputs[place] = leaves[leaf]
        outputs = self.run(inputs)
        count = len(self.buffers)
        if count:
            torch._foreach_copy_(self.buffers, list(outputs[:count]))
        return outputs[count], outputs[count + 1 :]


@dataclass
class Updater:
    """One update, ready to run: its binding, and every input in its place but the gradients."""

    binding: Binding
    run: Run
    before: list[Any]
    after: list[Any]
    numbers: Tensor
    seen: list[float]
    shadows: list[tuple[Tensor, Tensor]]

    def __call__(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """(finite, norm, scale); the gradients may be freed as they are read."""
        now = self.binding.numbers()
        if now != self.seen:
            self.numbers.copy_(torch.tensor(now, dtype=torch.float64))
            self.seen = now
        return self.run([*self.before, *grads, *self.after])


class TrainStep:
    """`mp.train_step(optimizer, …)`: one call is one (micro)batch.

    Args:
      owner: the `MixedPrecisionModule`.
      optimizer: any dense `torch.optim` optimizer on the model's parameters.
      loss_fn: ``loss_fn(model, *args, **kwargs) -> scalar``; without it the model's output is or has the loss.
      scale: "auto" (dynamic for FP16, none for BF16), a number, or a `LossScale`.
      max_grad_norm: clip the unscaled gradients to this global norm.
      accumulate: calls per update; gradients are averaged over them.
      masters: "full" (the model's FP32 parameters) or "split" (BF16 shadow and 16 low bits).
      backend: "inductor" or "eager"; the module's own by default.
      cuda_graph: "auto" captures the step in a CUDA graph where shapes are static.

    Raises:
      TrainingError: MP5xx.
    """

    def __init__(self, owner: Any, optimizer: torch.optim.Optimizer, loss_fn: Callable[..., Any] | None = None, *,
                 scale: str | float | LossScale = "auto", max_grad_norm: float | None = None, accumulate: int = 1,
                 masters: Literal["full", "split"] = "full", backend: str | None = None,
                 cuda_graph: Literal["auto"] | bool = "auto") -> None:  # fmt: skip
        self.owner, self.model, self.optimizer, self.loss_fn = owner, owner.model, optimizer, loss_fn
        self.device = next(p.device for p in self.model.parameters())
        self.backend = backend or owner.backend
        _check_options(self.backend, accumulate, masters)
        self.policy = settle_policy(owner.settings.policy, self.device.type)
        self.rule = LossScale.of(scale, self.policy.low)
        self.accumulate, self.max_grad_norm = accumulate, max_grad_norm
        self.state: ScaleState = self.rule.initial(self.device)
        self.seed = self.state.scale * (1.0 / accumulate)
        self._artefacts: dict[Any, Artefact] = {}
        self._updaters: dict[Any, Updater] = {}
        self._shadows: dict[tuple[str, torch.dtype], Tensor] = {}
        self._micro = 0
        self._sums: list[Tensor] | None = None
        self._no = torch.zeros((), dtype=torch.bool, device=self.device)
        self._nan = torch.full((), float("nan"), device=self.device)
        optimizer.register_load_state_dict_post_hook(lambda _: self._updaters.clear())

    def __call__(self, *args: Any, **kwargs: Any) -> StepResult:
        """Run one (micro)batch; update at the end of the window."""
        leaves, tree = pytree.tree_flatten((args, kwargs))
        artefact = self._artefact(leaves, tree, args, kwargs)
        loss, grads = artefact(leaves, self.seed)
        self._micro += 1
        if self._micro < self.accumulate:
            self._collect(artefact, grads)
            return StepResult(loss, self._no, ~self._no, self.state.scale.clone(), self._nan)
        self._micro = 0
        if self._sums is not None:
            self._collect(artefact, grads)
            grads, self._sums = self._sums, None
        finite, norm, scale = self._updater(artefact)(list(grads))
        return StepResult(loss, finite, finite, scale, norm)

    def _artefact(self, leaves: list[Any], tree: Any, args: Any, kwargs: Any) -> Artefact:
        key = (tree, tuple(_signature(leaf) for leaf in leaves), self.model.training)
        found = self._artefacts.get(key)
        if found is None:
            found = self._artefacts[key] = self._compile(args, kwargs)
        return found

    def _compile(self, args: Any, kwargs: Any) -> Artefact:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        forward = capture(self.model, self.loss_fn, args, kwargs, self.owner.settings, held)
        joint = trace_joint(forward, decompositions(self.backend))
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        tensors.update(self.model.named_buffers(remove_duplicate=False))
        tensors.update(forward.constants)
        fixed = [self._fixed(one, tensors) for one in forward.inputs]
        places = [(i, one.index) for i, one in enumerate(forward.inputs) if one.kind == "arg"]
        layout = tuple((forward.inputs[i].name, forward.inputs[i].dtype) for i in joint.grads)
        buffers = [fixed[i] for i in joint.mutated]
        return Artefact(joint, run_joint(joint, self.backend), fixed, places, layout, buffers)

    def _fixed(self, one: Input, tensors: dict[str, Tensor]) -> Any:
        if one.kind == "arg":
            return None
        if one.kind != "shadow":
            return tensors[one.name]
        key = (one.name, one.dtype)
        if key not in self._shadows:
            self._shadows[key] = SHADOWS.get(tensors[one.name], one.dtype)
            self._updaters.clear()
        return self._shadows[key]

    def _collect(self, artefact: Artefact, grads: Sequence[Tensor]) -> None:
        """Add a microbatch's gradients to the window's sums, FP32 unless the policy says low."""
        if self._sums is None:
            low = self.policy.grads == "low"
            self._sums = [g.clone() if low else g.to(torch.float32, copy=True) for g in grads]
        else:
            torch._foreach_add_(self._sums, list(grads))

    def _updater(self, artefact: Artefact) -> Updater:
        key = artefact.layout
        found = self._updaters.get(key)
        if found is None or not found.binding.holds(found.binding.numbers()):
            found = self._updaters[key] = self._build(artefact)
        return found

    def _build(self, artefact: Artefact) -> Updater:
        names = {id(p): name for name, p in self.model.named_parameters()}
        parts: dict[int, list[int]] = {}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for position, (name, _) in enumerate(artefact.layout):
            parts.setdefault(id(parameters[name]), []).append(position)
        trained = [p for p in self.model.parameters() if id(p) in parts]
        binding = bind(self.optimizer, trained)
        index = {id(p): i for i, p in enumerate(binding.params)}
        held = [(index[id(parameters[n])], d, s) for (n, d), s in self._shadows.items() if id(parameters[n]) in index]
        spec = Spec(self.rule, tuple(tuple(parts[id(p)]) for p in binding.params), tuple((i, d) for i, d, _ in held),
                    self.max_grad_norm, self.accumulate)  # fmt: skip
        numbers = torch.tensor(binding.numbers(), dtype=torch.float64, device=self.device)
        grads = [self._gradient_like(artefact.joint, i) for i in range(len(artefact.layout))]
        given = Operands(numbers, self.state, [s.base for s in binding.shared], binding.params,
                         binding.state_tensors(), grads)  # fmt: skip
        traced = trace_update(spec, binding, given, decompositions(self.backend))
        shadows = [s for _, _, s in held]
        emitted = in_place(traced, given, shadows, self.seed)
        before = pytree.tree_leaves(given._replace(grads=[]))
        return Updater(binding, run_update(emitted, self.backend), before, [self.seed, *shadows], numbers,
                       binding.numbers(), [(binding.params[i], s) for i, _, s in held])  # fmt: skip

    def _gradient_like(self, joint: Joint, position: int) -> Tensor:
        output = joint.module.graph.output_node().args[0][len(joint.mutated) + 1 + position]
        value: Tensor = output.meta["val"]
        summed = self.accumulate > 1 and self.policy.grads != "low"
        with value.fake_mode:
            return torch.empty_like(value, dtype=torch.float32 if summed else value.dtype)


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _check_options(backend: str, accumulate: int, masters: str) -> None:
    wrong = {"backend": backend not in ("inductor", "eager"), "accumulate": accumulate < 1,
             "masters": masters not in ("full", "split")}  # fmt: skip
    for name, bad in wrong.items():
        if bad:
            given = {"backend": backend, "accumulate": accumulate, "masters": masters}[name]
            raise TrainingError("MP541", f"train_step({name}={given!r}) is not possible")
