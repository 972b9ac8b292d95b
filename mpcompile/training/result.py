"""What a call of the training step gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
