"""Pooling whose windows differ in size, in operations that the exporter translates.

Averages over windows are matrix products with a fixed matrix for each dimension: row i has ones where window i looks.
Their backward is the transposed product.  It serves adaptive average pools, and average pools with ``ceil_mode``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten
Window = tuple[int, int]


def adaptive(size: int, out: int) -> list[Window]:
    """The windows of an adaptive pool: (start, end) of each."""
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def strided(size: int, out: int, kernel: int, stride: int, padding: int) -> list[Window]:
    """The windows of a plain pool, which may reach beyond the ends."""
    return [(i * stride - padding, i * stride - padding + kernel) for i in range(out)]


def adaptive_avg_pool2d(x: Tensor, output_size: Sequence[int]) -> Tensor:
    windows = [adaptive(x.shape[d], int(output_size[d])) for d in (-2, -1)]
    left, right = (_matrix(one, x.shape[d], x, mean=True) for one, d in zip(windows, (-2, -1), strict=True))
    return (left @ x.float() @ right.t()).to(x.dtype)


def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    windows = [adaptive(x.shape[d], grad.shape[d]) for d in (-2, -1)]
    left, right = (_matrix(one, x.shape[d], x, mean=True) for one, d in zip(windows, (-2, -1), strict=True))
    return (left.t() @ grad.float() @ right).to(grad.dtype)


def avg_pool2d_backward(grad: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                        count_include_pad: bool, divisor: int | None) -> Tensor:  # fmt: skip
    """The backward of an average pool with any windows; counts are those of torch."""
    spans = [strided(x.shape[2 + d], grad.shape[2 + d], kernel[d], stride[d], padding[d]) for d in (0, 1)]
    counts = [[_count(w, x.shape[2 + d], padding[d], count_include_pad) for w in spans[d]] for d in (0, 1)]
    left, right = (_matrix(spans[d], x.shape[2 + d], x) for d in (0, 1))
    if divisor:
        shared = grad.float() / float(divisor)
    else:
        down, across = (torch.tensor(one, dtype=torch.float32, device=x.device) for one in counts)
        shared = grad.float() / (down[:, None] * across)
    return (left.t() @ shared @ right).to(grad.dtype)


def adaptive_max_pool2d(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Values, and their places in the flattened image: a window is gathered, short ones repeat their last element."""
    height, width = x.shape[-2], x.shape[-1]
    rows, columns = _places(adaptive(height, int(output_size[0]))), _places(adaptive(width, int(output_size[1])))
    flat = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).to(x.device)
    held = x.flatten(-2)[..., flat]
    values, index = held.max(-1)
    lead = [1] * (x.dim() - 2)
    places = flat.reshape([*lead, *flat.shape]).expand(held.shape).gather(-1, index[..., None])[..., 0]
    return values, places


def adaptive_max_pool2d_backward(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    made = torch.zeros([*x.shape[:-2], x.shape[-2] * x.shape[-1]], dtype=torch.float32, device=x.device)
    return made.scatter_add(-1, indices.flatten(-2), grad.float().flatten(-2)).reshape(x.shape).to(grad.dtype)


def _places(windows: list[Window]) -> Tensor:
    longest = max(end - start for start, end in windows)
    return torch.tensor([[min(start + k, end - 1) for k in range(longest)] for start, end in windows])


def _matrix(windows: list[Window], size: int, like: Tensor, *, mean: bool = False) -> Tensor:
    rows = [[float(start <= i < end) / ((end - start) if mean else 1) for i in range(size)] for start, end in windows]
    return torch.tensor(rows, dtype=torch.float32, device=like.device)


def _count(window: Window, size: int, padding: int, count_include_pad: bool) -> int:
    start, end = window
    if count_include_pad:
        return min(end, size + padding) - start
    return max(min(end, size) - max(start, 0), 1)


def table() -> dict[object, object]:
    return {
        aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
        aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,
        aten.adaptive_max_pool2d.default: adaptive_max_pool2d,
        aten.adaptive_max_pool2d_backward.default: adaptive_max_pool2d_backward,
    }
