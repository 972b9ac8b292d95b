"""AdamW, Adam and SGD for the drop-in: torch's own, which also read low gradients and clip.

    mp = mpcompile(model)
    optimizer = mpcompile.optim.AdamW(model.parameters(), lr=3e-4, max_grad_norm=1.0)
    mp(x).backward(); optimizer.step(); optimizer.zero_grad()

The gradients of large weights then stay in the low type on their masters: they are half as large, nothing casts them,
and on CUDA one pass over memory reads them and writes master, moments and shadow.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpcompile.errors import TrainingError
from mpcompile.shadows.low_gradients import READERS
from mpcompile.training.optimizer.reading_low import ReadingLow


class _ReadsLow(torch.optim.Optimizer):
    """What the three have beside torch's classes.

    Fields:
      max_grad_norm: clip the gradients of all groups together to this norm; None: not. May be set at any time.
      grad_norm: 0-dim FP32, the unscaled gradients' norm before clipping at the last step; None where nothing is clipped.
    """

    # A `torch.amp.GradScaler` then leaves it to `step` to divide by the scale and to skip.
    _step_supports_amp_scaling = True
    # The class of torch that it is.
    torch_class: ClassVar[type[torch.optim.Optimizer]]
    max_grad_norm: float | None = None
    grad_norm: Tensor | None = None

    def _clip_to(self, norm: float | None) -> None:
        if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
            raise TrainingError("MP541", f"{type(self).__name__}(max_grad_norm={norm!r})",
                                try_="a number above 0; None clips nothing")  # fmt: skip
        self.max_grad_norm = norm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._take_low()

    def _take_low(self) -> None:
        READERS.add([p for group in self.param_groups for p in group["params"]], self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_low()

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        way = vars(self).get("_reading")
        if way is None:
            way = self.__dict__["_reading"] = ReadingLow(self, self.torch_class)
        with torch.no_grad():
            way.step()
        return loss


def _like(cls: type[torch.optim.Optimizer]) -> Callable[[Any], Any]:
    """`step` stands for that of torch's class: `mpcompile.train_step` traces that one."""
    return functools.wraps(inspect.unwrap(cls.step))


class AdamW(_ReadsLow, torch.optim.AdamW):
    """`torch.optim.AdamW`, with its arguments, states and `state_dict`, which reads low gradients.

    Args:
      params, …: as torch's; on CUDA `fused` is True where none of `foreach`, `fused`, `differentiable` is given.
      max_grad_norm: clip the gradients of all groups together to this norm, as `clip_grad_norm_` does; where the norm
        is not finite, the step changes nothing.

    Raises:
      TrainingError: MP541, for a norm that is no number above 0.
    """

    torch_class = torch.optim.AdamW

    def __init__(self, params: Any, *args: Any, max_grad_norm: float | None = None, **options: Any) -> None:
        params = list(params)
        super().__init__(params, *args, **_fused(params, options))
        self._clip_to(max_grad_norm)

    @_like(torch.optim.AdamW)
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._step(closure)


class Adam(_ReadsLow, torch.optim.Adam):
    """`torch.optim.Adam` likewise: see `AdamW`."""

    torch_class = torch.optim.Adam

    def __init__(self, params: Any, *args: Any, max_grad_norm: float | None = None, **options: Any) -> None:
        params = list(params)
        super().__init__(params, *args, **_fused(params, options))
        self._clip_to(max_grad_norm)

    @_like(torch.optim.Adam)
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._step(closure)


class SGD(_ReadsLow, torch.optim.SGD):
    """`torch.optim.SGD` likewise: see `AdamW`."""

    torch_class = torch.optim.SGD

    def __init__(self, params: Any, *args: Any, max_grad_norm: float | None = None, **options: Any) -> None:
        params = list(params)
        super().__init__(params, *args, **_fused(params, options))
        self._clip_to(max_grad_norm)

    @_like(torch.optim.SGD)
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._step(closure)


def _fused(params: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    """The counters of steps then lie on the device, where the kernels read them."""
    tensors = [t for one in params for t in _tensors(one)]
    chosen = any(options.get(name) for name in ("foreach", "differentiable")) or options.get("fused") is not None
    on_gpu = bool(tensors) and all(t.is_cuda and t.is_floating_point() for t in tensors)
    return options if chosen or not on_gpu else {**options, "fused": True}


def _tensors(given: Any) -> list[Any]:
    """The tensors of one entry of `params`: a tensor, a (name, tensor), or a group of such."""
    if isinstance(given, dict):
        inner = given["params"] = [given["params"]] if isinstance(given["params"], Tensor) else list(given["params"])
        return [t for one in inner for t in _tensors(one)]
    return [given[1] if isinstance(given, tuple) else given]


__all__ = ["SGD", "Adam", "AdamW"]
