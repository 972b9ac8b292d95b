"""The device side of the loss over a large vocabulary: one program a row, read twice (memory, then cache), written once.

`loss_row` finds the row's maximum and sum of exponentials on its way over the columns, and on the second way writes the
gradient of the row's logits.  All arithmetic is FP32; logits and gradient are of any float type.
"""

from __future__ import annotations

import triton
import triton.language as tl


# `debug` keeps the check of the labels: one that is no class ends the program, as in torch's own kernel.  Where a device
# has no such check, the row's loss is NaN.
@triton.jit(debug=True)
def loss_row(
    logits,  # [rows, width], row stride `stride`
    targets,  # [rows] int64
    unit,  # [] FP32: the gradient that arrives at a row's loss
    gradient,  # [rows, width], contiguous, the type of the logits
    losses,  # [rows] FP32
    stride,
    classes,
    width,
    ignore,
    smoothing,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(targets + row)
    counted = label != ignore
    known = (label >= 0) & (label < classes)
    tl.device_assert(known | (label == ignore), "a target that is no class")
    at = logits + row * stride
    offsets = tl.arange(0, BLOCK)

    top = -float("inf")
    total = 0.0
    straight = 0.0
    for start in range(0, classes, BLOCK):
        inside = start + offsets < classes
        x = tl.load(at + start + offsets, mask=inside, other=-float("inf")).to(tl.float32)  # [BLOCK]
        higher = tl.maximum(top, tl.max(x, 0))
        # Where nothing above minus infinity was met yet, minus infinity is no number to take from.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = higher
        if SMOOTH:
            straight += tl.sum(tl.where(inside, x, 0.0), 0)
    # log(sum exp(x)) = top + rest
    rest = tl.log(total)
    own = tl.load(at + tl.where(known, label, 0)).to(tl.float32)
    own = tl.where(known, own, float("nan"))
    loss = (top - own) + rest
    spread = 0.0
    if SMOOTH:
        spread = smoothing / classes
        loss = (1.0 - smoothing) * loss + smoothing * ((top - straight / classes) + rest)
    tl.store(losses + row, tl.where(counted, loss, 0.0))

    arriving = tl.load(unit)
    into = gradient + row * width
    for start in range(0, width, BLOCK):
        column = start + offsets
        x = tl.load(at + column, mask=column < classes, other=-float("inf")).to(tl.float32)  # [BLOCK]
        share = tl.exp((x - top) - rest) - spread
        share = tl.where(column == label, share - (1.0 - smoothing), share)
        share = tl.where((column < classes) & counted, share * arriving, 0.0)
        tl.store(into + column, share.to(gradient.dtype.element_ty), mask=column < width)
