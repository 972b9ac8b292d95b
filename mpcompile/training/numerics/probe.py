"""What a plan's loss and gradients are off by, as a few numbers: what `mpcompile bisect` asks of each plan that it tries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.compiler import Settings
from mpcompile.training.gradients.batch import Batch
from mpcompile.training.numerics.compare import scale_of
from mpcompile.training.numerics.subject import Differentiable, Subject, fp32_settings, subject

MEASURED = ("loss", "gradient", "finite")


class Probe:
    """One model and batch under many plans.

    ``measure(settings)`` gives "loss" (its relative error against FP32's), "gradient" (the largest relative error of a
    parameter's gradient) and "finite" (1, or 0 where something is not).
    """

    def __init__(self, model: Any, args: Any, kwargs: Any, loss_fn: Callable[..., Any] | None = None) -> None:
        self.model, self.batch, self.loss = model, Batch(args, kwargs), loss_fn or Differentiable()
        self.state = torch.get_rng_state()
        self._full: dict[str, Tensor] | None = None

    def measure(self, settings: Settings) -> dict[str, float]:
        if self._full is None:
            self._full = self._run(subject(self.model, self.loss, self.batch, fp32_settings(settings)), 1.0)
        found = subject(self.model, self.loss, self.batch, settings)
        with torch.no_grad():
            scale, _ = scale_of(found, None, found.plan.policy.low)
        got = self._run(found, scale)
        finite = all(bool(torch.isfinite(value).all()) for value in got.values())
        errors = {name: _off(got[name], full) for name, full in self._full.items()}
        loss = errors.pop("")
        noise = _noise(self._full)
        gradient = max((error for name, error in errors.items() if name not in noise), default=0.0)
        return {"loss": loss, "gradient": gradient, "finite": float(finite)}

    def candidates(self, settings: Settings) -> dict[str, list[str]]:
        """Module -> its nodes that run low under `settings`."""
        found: dict[str, list[str]] = {}
        for node in subject(self.model, self.loss, self.batch, settings).plan.graph:
            if not node.is_cast and node.precision in ("fp16", "bf16") and node.decided_by != "user-cast":
                found.setdefault(node.module, []).append(node.id)
        return found

    def _run(self, found: Subject, scale: float) -> dict[str, Tensor]:
        """ "" -> the loss, and parameter -> its gradient, unscaled."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.set_rng_state(self.state)
            outputs: Any = fx.Interpreter(found.module).run(*found.inputs, torch.full((), scale, device=found.device()))
        result = {"": outputs[found.loss_at].float()}
        for place, name in found.gradients:
            part = outputs[place].double() / scale
            result[name] = result[name] + part if name in result else part
        return result


def _off(got: Tensor, want: Tensor) -> float:
    size = float(torch.linalg.vector_norm(want, dtype=torch.float64))
    error = float(torch.linalg.vector_norm(got.double() - want.double()))
    if error == 0:
        return 0.0
    return error / size if size and math.isfinite(error) else math.inf


def _noise(full: dict[str, Tensor]) -> set[str]:
    """Gradients that are zero but for rounding (see `mpcompile.report.comparison.mark_noise`)."""
    largest = {name: float(value.abs().max()) for name, value in full.items() if name and value.numel()}
    most = max(largest.values(), default=0.0)
    return {name for name, size in largest.items() if size < 2.0**-20 * most}


__all__ = ["MEASURED", "Probe"]
