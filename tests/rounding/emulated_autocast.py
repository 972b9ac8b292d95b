"""torch.autocast with CUDA's lists, computed on a CPU: the yardstick of the suite, independent of this library's rules.

The CPU's autocast key takes kernels of CUDA's lists for as long as the context lasts; so the dispatcher itself decides
which operation meets a list, inside composites too, as on CUDA. An operation of the `lower` list rounds its
operands to the low type, computes in FP32 and rounds the result, which is what tensor cores do; its backward does the same.
`fp32` operations read low operands as FP32; `promote` ones take the widest; what is on no list follows torch's own promotion.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from autocast_lists import header_lists, registered
from torch import Tensor
from torch.utils import _pytree as pytree

LOW = (torch.float16, torch.bfloat16)
# cuDNN's recurrent cells, which CUDA autocast runs low through `_cudnn_rnn`; on a CPU they have these names.
RECURRENT = ("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
# CUDA refuses these under autocast; users call them in FP32.
_KEY = "AutocastCPU"
_BELOW = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


@dataclass
class Emulation:
    """One region: its low type, its casts of parameters (made once, as torch's cache does), and what ran low."""

    low: torch.dtype
    ran: Counter[str] = field(default_factory=Counter)
    _casts: dict[int, Tensor] = field(default_factory=dict)

    def rounded(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, *LOW) or value.dtype == self.low:
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(self.low)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(self.low)
        return self._casts[id(value)]

    def kernel(self, op: Any, group: str) -> Callable[..., Any]:
        act = {"lower": self._lower, "promote": self._promote}.get(group, self._fp32)

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_BELOW):
                return act(op, args, kwargs)

        return run

    def _lower(self, op: Any, args: Any, kwargs: Any) -> Any:
        self.ran[str(op)] += 1
        args, kwargs = pytree.tree_map(lambda v: _full(self.rounded(v)), (args, kwargs))
        return pytree.tree_map(self.rounded, op(*args, **kwargs))

    def _fp32(self, op: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(_full, (args, kwargs))
        return op(*args, **kwargs)

    def _promote(self, op: Any, args: Any, kwargs: Any) -> Any:
        floats = [
            v.dtype
            for v in pytree.tree_leaves((args, kwargs))
            if isinstance(v, Tensor) and v.dtype in (torch.float32, *LOW)
        ]
        wide = torch.float32 in floats
        args, kwargs = pytree.tree_map(lambda v: _full(v) if wide else v, (args, kwargs))
        return op(*args, **kwargs)


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    found = getattr(torch.ops.aten, packet, None)
    return getattr(found, overload, None)


def _groups() -> dict[str, str]:
    lists = header_lists() | dict.fromkeys(RECURRENT, "lower")
    lists |= dict.fromkeys(registered("CPU") - lists.keys(), "none")
    return lists


@contextlib.contextmanager
def emulated_autocast(low: torch.dtype) -> Iterator[Emulation]:
    """Autocast of CUDA for everything called inside; `ran` of what it gives counts the operations that ran low."""
    emulation = Emulation(low)
    library = torch.library.Library("aten", "IMPL")
    was = torch.is_autocast_enabled("cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each kernel of the CPU's own lists is said to be overridden
            _register(library, emulation)
        torch.set_autocast_enabled("cpu", True)
        yield emulation
    finally:
        torch.set_autocast_enabled("cpu", was)
        library._destroy()


def _register(library: torch.library.Library, emulation: Emulation) -> None:
    for name, group in _groups().items():
        op = _overload(name)
        if op is None:
            continue
        short = name.removesuffix(".default")
        if group == "none":
            library.impl(short, torch.library.fallthrough_kernel, _KEY)
        else:
            library.impl(short, emulation.kernel(op, group), _KEY)
