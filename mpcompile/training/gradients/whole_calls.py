"""What no trace can enter, and a step runs as it is: a CTC loss by lengths, draws from a generator, masks of speech models.

Inside, shapes depend on what tensors hold, or an object is read that no graph can; what comes out has a known shape.  Each
is recorded as one opaque call (`mpcompile.training.gradients.traced_calls`): torch's own code runs it at every step, in
FP32, with its own backward.  Lengths are read on the host, as torch reads them: on a GPU the step waits for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.patches import COMPILING, replaced
from mpcompile.training.gradients import speech_masks
from mpcompile.training.gradients.chosen_labels import Selected, is_choice_of_labels, is_selected
from mpcompile.training.gradients.traced_calls import Call, is_recording, record


@contextlib.contextmanager
def taken_whole(model: nn.Module) -> Iterator[None]:
    """While active in this thread, such calls of a capture are recorded."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(COMPILING)
        stack.enter_context(replaced(F, ctc_loss=_ctc(F.ctc_loss)))
        for module in speech_masks.modules_of(model):
            plain = vars(module)[speech_masks.NAME]
            told = {speech_masks.NAME: _masks(plain, _first_device(model.parameters()))}
            stack.enter_context(replaced(module, **told))
        stack.enter_context(_WholeCalls())
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
        log_probs: Tensor, targets: Any, input_lengths: Any, target_lengths: Any, blank: int = 0,
        reduction: str = "mean", zero_infinity: bool = False,
    ) -> Tensor:  # fmt: skip
        lengths = input_lengths, target_lengths
        if not is_recording() or not any(isinstance(one, Tensor) for one in lengths):
            return plain(log_probs, targets, *lengths, blank, reduction, zero_infinity)
        counted = [one if isinstance(one, Tensor) else torch.tensor(one) for one in lengths]
        chosen = is_selected(targets)
        labels = [targets.source, targets.mask] if chosen else [targets]

        def run(logs: Tensor, *rest: Tensor) -> list[Tensor]:
            *labels, frames, letters = rest
            one = labels[0].masked_select(labels[1]) if chosen else labels[0]
            return [plain(logs, one, frames, letters, blank, reduction, zero_infinity)]

        shape = log_probs.shape[1:2] if reduction == "none" and log_probs.dim() == 3 else ()
        return _recorded("ctc_loss", run, [_sample(log_probs, shape, torch.float32)], [log_probs, *labels, *counted])[0]

    return ctc_loss


# ---------------------------------------------------------------------------------------------------------------- modes


class _WholeCalls(TorchFunctionMode):
    """Records what is drawn from a generator that is passed by name, and holds back a choice of labels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_recording():
            return func(*args, **kwargs)
        if isinstance(kwargs.get("generator"), torch.Generator):
            return _drawn(func, args, kwargs)
        if func is torch.tensor and isinstance(args[0], Tensor):
            # Of a mask that the program takes for an array; torch would warn of the copy.
            return args[0].detach().clone().to(kwargs.get("device"), kwargs.get("dtype"))
        if func in _CHOICES and not kwargs and is_choice_of_labels(*args):
            return Selected(func, *args)
        return func(*args, **kwargs)


_CHOICES = frozenset({Tensor.masked_select, torch.masked_select, Tensor.__getitem__})


# ---------------------------------------------------------------------------------------------------------------- masks


def _first_device(tensors: Iterator[Tensor]) -> torch.device:
    return next((one.device for one in tensors), torch.device("cpu"))


def _masks(plain: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def masks(
        shape: Sequence[int],
        mask_prob: float,
        mask_length: int,
        attention_mask: Tensor | None = None,
        min_masks: int = 0,
    ) -> Any:
        if not is_recording():
            return plain(shape, mask_prob, mask_length, attention_mask, min_masks)
        given = [] if attention_mask is None else [attention_mask.detach()]

        def run(first: Tensor, *mask: Tensor) -> list[Tensor]:
            made = plain(tuple(shape), mask_prob, mask_length, mask[0] if mask else None, min_masks)
            return [torch.as_tensor(made, dtype=torch.bool, device=first.device)]

        first = torch.zeros(1, device=device)
        return _recorded("speech_mask", run, [_sample(first, shape, torch.bool)], [first, *given])[0]

    return masks


# ----------------------------------------------------------------------------------------------------------- generators


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
