"""What one value of the plan is off by: numbers of three tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpcompile.aten.facts import dtype_name
from mpcompile.formats import LARGEST, LOW, ROUNDS_TO_ZERO
from mpcompile.report.comparison import ErrorRow, headroom


@dataclass(slots=True)
class Lanes:
    """One value: in the plan, in the FP32 run, and from a node that was fed the FP32 run's values."""

    plan: Any
    full: Any
    fed: Any


def row(name: str, node: str, op: str, phase: str, module: str, source: str, lanes: Lanes, low: str,
        dtype: str = "") -> ErrorRow:  # fmt: skip
    """What there is to say of one value; see `ErrorRow`. `dtype`: in which the plan holds it, where the tensor is wider."""
    plan, full, fed = lanes.plan.detach(), lanes.full.detach(), lanes.fed.detach()
    dtype = dtype or dtype_name(plan.dtype)
    finite = torch.isfinite(full)
    held = full if bool(finite.all()) else torch.where(finite, full, 0)
    size = norm(held)
    sizes = held.abs()
    largest = float(sizes.max()) if held.numel() else 0.0
    same = plan is full
    overflow = 0 if same else int((finite & ~torch.isfinite(plan)).sum())
    underflow = int(((sizes < ROUNDS_TO_ZERO[dtype]) & (held != 0)).sum()) if dtype in LOW else 0
    return ErrorRow(
        name, node, op, phase, module, source, dtype,
        error=0.0 if same else relative(plan, full, finite, size),
        own=0.0 if fed is full else relative(fed, full, finite, size),
        inherited=0.0 if fed is plan or same else relative(plan, fed, finite, size),
        underflow=underflow, overflow=overflow, elements=int(held.numel()), largest=largest,
        headroom=headroom(largest, LARGEST[low] if low in LOW else LARGEST["fp32"]),
    )  # fmt: skip


def relative(got: Tensor, want: Tensor, finite: Tensor, size: float) -> float:
    """Norm of the difference, over `size`; infinite where one has a number and the other none."""
    off = torch.where(finite, got.to(torch.float64) - want.to(torch.float64), 0.0)
    error = norm(off)
    if error == 0:
        return 0.0
    return error / size if size and math.isfinite(error) else math.inf


def norm(tensor: Tensor) -> float:
    found = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    return found if math.isfinite(found) else math.inf
