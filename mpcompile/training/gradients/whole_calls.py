"""What no trace can enter, and a step runs as it is: a CTC loss by lengths, draws from a generator of the program's.

Inside, shapes depend on what tensors hold, or an object is read that no graph can; what comes out has a known shape.  Each
is recorded as one opaque call (`mpcompile.training.gradients.traced_calls`): torch's own code runs it at every step, in
FP32, with its own backward.  Lengths are read on the host, as torch reads them: on a GPU the step waits for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import proxy_tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mpcompile.errors import TrainingError
from mpcompile.torch_internals import COMPILING, replaced
from mpcompile.training.gradients.traced_calls import Call, is_recording, record


@contextlib.contextmanager
def taken_whole() -> Iterator[None]:
    """While active in this thread, such calls of a capture are recorded."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(COMPILING)
        stack.enter_context(replaced(F, ctc_loss=_ctc(F.ctc_loss)))
        stack.enter_context(_Draws())
        yield


def _recorded(
    op: str, run: Callable[..., Sequence[Tensor]], samples: Sequence[Tensor], operands: Sequence[Tensor]
) -> list[Tensor]:
    if any(isinstance(size, torch.SymInt) for sample in samples for size in sample.shape):
        # The capture is made again for the sizes that this batch has.
        raise TrainingError("MP534", f"{op} is run as it is, for known sizes alone", try_="dynamic=False")
    return record(Call(f"autograd.{op}", run, samples, autocast="fp32", opaque=True, host=True), operands)


def _sample(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of that shape that is in no trace."""
    with proxy_tensor.disable_proxy_modes_tracing():
        return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)


# ------------------------------------------------------------------------------------------------------------------ CTC


def _ctc(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def ctc_loss(
        log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any, blank: int = 0,
        reduction: str = "mean", zero_infinity: bool = False,
    ) -> Tensor:  # fmt: skip
        lengths = input_lengths, target_lengths
        if not is_recording() or not any(isinstance(one, Tensor) for one in lengths):
            return plain(log_probs, targets, *lengths, blank, reduction, zero_infinity)
        counted = [one if isinstance(one, Tensor) else torch.tensor(one) for one in lengths]

        def run(logs: Tensor, labels: Tensor, *both: Tensor) -> list[Tensor]:
            return [plain(logs, labels, *both, blank, reduction, zero_infinity)]

        shape = log_probs.shape[1:2] if reduction == "none" and log_probs.dim() == 3 else ()
        return _recorded("ctc_loss", run, [_sample(log_probs, shape, torch.float32)], [log_probs, targets, *counted])[0]

    return ctc_loss


# ----------------------------------------------------------------------------------------------------------- generators


class _Draws(TorchFunctionMode):
    """Records what is drawn from a generator that is passed by name: it is drawn anew at each step."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_recording() or not isinstance(kwargs.get("generator"), torch.Generator):
            return func(*args, **kwargs)
        return _drawn(func, args, kwargs)


def _drawn(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, places = func.__name__, [i for i, one in enumerate(args) if isinstance(one, Tensor)]
    with proxy_tensor.disable_proxy_modes_tracing():
        own = [torch.empty_like(args[i]) for i in places]
        like = func(*_filled(args, places, own), **{**kwargs, "generator": None}).detach()

    def run(first: Tensor, *operands: Tensor) -> list[Tensor]:
        with torch.no_grad():
            given = [one.detach().clone() for one in operands]
            return [func(*_filled(args, places, given), **kwargs)]

    first = torch.zeros(1, device=like.device)
    made = _recorded("draw", run, [like], [first, *(args[i].detach() for i in places)])[0]
    return args[0].copy_(made) if name.endswith("_") and places[:1] == [0] else made


def _filled(args: Sequence[Any], places: Sequence[int], tensors: Sequence[Tensor]) -> list[Any]:
    filled = list(args)
    for place, tensor in zip(places, tensors, strict=True):
        filled[place] = tensor
    return filled


__all__ = ["taken_whole"]
