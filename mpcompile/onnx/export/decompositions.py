"""Operations that torch's ONNX exporter translates wrongly, or not at all, in terms of those that it gets right.

- A training batch norm: the exporter takes the running statistics, as in inference.
- ``nll_loss_forward``: its ``total_weight`` is made up, and mean cross-entropy gradients come out N times too large.
- The backwards of convolution and of average pooling, and a few more that have no translation.

Each is tested against autograd.  Torch's own decompositions are used where they are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcompile.onnx.export import pooling as onnx_pool
from mpcompile.onnx.export.dropout import Counter
from mpcompile.torch_internals.inductor import decompositions_of

aten = torch.ops.aten
Shape = Sequence[int]


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Shape | None, stride: Shape, padding: Shape,
                         dilation: Shape, transposed: bool, output_padding: Shape, groups: int,
                         mask: Sequence[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`aten.convolution_backward` in convolutions that the exporter translates.

    The input's gradient is the opposite convolution.  The weight's is a convolution of input and gradient with batch
    and channels exchanged, stride and dilation exchanged too, narrowed to the kernel's size.
    """
    dims = x.dim() - 2
    stride, padding, dilation = (_spread(one, dims) for one in (stride, padding, dilation))
    grad_x = grad_w = grad_b = None
    if mask[0]:
        if transposed:
            grad_x = aten.convolution(grad, weight, None, stride, padding, dilation, False, [0] * dims, groups)
        else:
            out = [_lost(x, grad, weight, d, stride, padding, dilation) for d in range(dims)]
            grad_x = aten.convolution(grad, weight, None, stride, padding, dilation, True, out, groups)
    if mask[1]:
        ends = (grad, x) if transposed else (x, grad)
        grad_w = _weight_gradient(*ends, weight, stride, padding, dilation, groups)
    if mask[2]:
        grad_b = grad.float().sum([0, *range(2, grad.dim())]).to(grad.dtype)
    return grad_x, grad_w, grad_b


def _spread(values: Shape, dims: int) -> list[int]:
    return list(values) if len(values) == dims else [int(values[0])] * dims


def _lost(x: Tensor, grad: Tensor, weight: Tensor, d: int, stride: Shape, padding: Shape, dilation: Shape) -> int:
    """Rows of the input that the kernel never reached, because the stride did not divide."""
    reach = (grad.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (weight.shape[2 + d] - 1) + 1
    return int(x.shape[2 + d] - reach)


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, stride: Shape, padding: Shape, dilation: Shape,
                     groups: int) -> Tensor:  # fmt: skip
    """Gradient of a weight (out, in / groups, *kernel) from what slid under it (`x`) and what came out (`grad`)."""
    batch, spatial = x.shape[0], list(x.shape[2:])
    per_group = x.shape[1] // groups
    # Channels become the batch; the groups are kept apart as groups of the new convolution.
    left = x.reshape([batch, groups, per_group, *spatial]).transpose(0, 2)
    left = left.reshape([per_group, groups * batch, *spatial])
    right = grad.transpose(0, 1)
    made = aten.convolution(left, right, None, dilation, padding, stride, False, [0] * len(spatial), groups)
    for d, size in enumerate(weight.shape[2:]):
        made = made.narrow(2 + d, 0, size)
    turned: Tensor = made.transpose(0, 1)
    return turned


def avg_pool2d_backward(grad: Tensor, x: Tensor, kernel: Shape, stride: Shape, padding: Shape, ceil_mode: bool,
                        count_include_pad: bool, divisor: int | None) -> Tensor:  # fmt: skip
    """`aten.avg_pool2d_backward`: every element of a window gets its share, by a depthwise transposed convolution.
    With ``ceil_mode`` windows reach beyond the padding, and fixed matrices say what each of them sees.
    """
    kernel, padding = _spread(kernel, 2), _spread(padding, 2)
    stride = _spread(stride, 2) if len(stride) else kernel
    if ceil_mode:
        return onnx_pool.avg_pool2d_backward(grad, x, kernel, stride, padding, count_include_pad, divisor)
    channels = x.shape[1]
    if divisor or count_include_pad or not any(padding):
        shared = grad / float(divisor or kernel[0] * kernel[1])
    else:
        inside = torch.ones([1, 1, *x.shape[2:]], dtype=grad.dtype, device=grad.device)
        count = aten.convolution(inside, torch.ones([1, 1, *kernel], dtype=grad.dtype, device=grad.device), None,
                                 stride, padding, [1, 1], False, [0, 0], 1)  # fmt: skip
        shared = grad / count
    ones = torch.ones([channels, 1, *kernel], dtype=grad.dtype, device=grad.device)
    out = [int(x.shape[2 + d] - ((grad.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + kernel[d])) for d in (0, 1)]
    summed: Tensor = aten.convolution(shared, ones, None, stride, padding, [1, 1], True, out, channels)
    return summed


def amax(x: Tensor, dim: Shape = (), keepdim: bool = False) -> Any:
    """`aten.amax` over everything; the exporter knows it with dimensions only."""
    return NotImplemented if dim or keepdim else aten.max.default(x)


def where(condition: Tensor, one: Tensor, other: Tensor) -> Any:
    """`aten.where` of bools, for which runtimes have no kernel, as logic."""
    if one.dtype != torch.bool or other.dtype != torch.bool:
        return NotImplemented
    return aten.logical_or(aten.logical_and(condition, one), aten.logical_and(aten.logical_not(condition), other))


REFUSED = ("aten._embedding_bag", "aten._ctc_loss", "aten.prod", "mpcompile.quantise")


def forward_table() -> dict[Any, Callable[..., Any]]:
    """What the forward needs."""
    names = ("_native_batch_norm_legit_functional", "_native_batch_norm_legit", "native_batch_norm")
    return dict(decompositions_of([getattr(aten, name) for name in names]))


def step_table(random: Counter) -> dict[Any, Callable[..., Any]]:
    """What a training step needs: after autograd, everything that the exporter gets wrong or lacks.

    Args:
      random: where random numbers come from.
    """
    names = (
        "nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward", "embedding_dense_backward",
        "_softmax_backward_data", "_log_softmax_backward_data", "native_layer_norm_backward", "native_group_norm_backward",
        "native_batch_norm_backward", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "native_batch_norm",
        "gelu_backward", "silu_backward", "tanh_backward", "sigmoid_backward", "threshold_backward", "hardtanh_backward",
        "hardswish_backward", "hardsigmoid_backward", "leaky_relu_backward", "elu_backward", "softplus_backward",
        "mish_backward", "select_backward", "slice_backward", "max_pool2d_with_indices_backward", "native_dropout_backward",
        "addcmul", "addcdiv", "lerp", "linalg_vector_norm", "_fused_rms_norm", "_fused_rms_norm_backward", "mse_loss_backward",
        "smooth_l1_loss_backward", "huber_loss_backward", "binary_cross_entropy_backward", "_prelu_kernel_backward",
        "upsample_nearest2d_backward", "upsample_bilinear2d_backward", "addmm", "baddbmm",
        "unfold_backward", "glu_backward", "index_add", "logit_backward", "frac", "rsub", "native_group_norm",
    )  # fmt: skip
    found = [getattr(aten, name) for name in names if hasattr(aten, name)]
    table: dict[Any, Callable[..., Any]] = dict(decompositions_of(found))
    table[aten.convolution_backward.default] = convolution_backward
    table[aten.avg_pool2d_backward.default] = avg_pool2d_backward
    table[aten.amax.default] = amax
    table[aten.where.self] = where
    return {**table, **onnx_pool.table(), **random.table()}
