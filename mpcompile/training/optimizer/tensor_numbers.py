"""Let an optimizer's own Python code run on numbers that are tensors.

torch.optim computes with Python floats: ``1 - beta ** step``, ``add_(grad, alpha=-lr)``, ``step_t.item()``.  In an
emitted step those numbers live on the device, as 0-dim FP64 tensors, which hold what Python's floats hold.  The mode
below gives such tensors the places that take numbers only, and settles comparisons of the groups' own numbers.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mpcompile.torch_internals.patches import COMPILING, replaced

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
Test = Callable[[Sequence[float]], bool]


class UndecidableError(Exception):
    """Python code asked a tensor of the trace for a truth value."""


class NumbersAsTensors(TorchFunctionMode):
    """While active, 0-dim tensors may stand where torch's signatures take numbers.

    Args:
      numbers: the groups' numbers as traced 0-dim tensors, with their present values; they must stay alive.
      guards: receives (test, outcome) for each comparison among numbers that Python code made.
    """

    def __init__(self, numbers: Sequence[tuple[Tensor, float]], guards: list[tuple[Test, bool]]) -> None:
        super().__init__()
        self._slot = {id(tensor): i for i, (tensor, _) in enumerate(numbers)}
        self._values = [value for _, value in numbers]
        self._guards = guards

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("item", "__float__"):
            return args[0].double()
        if name == "__bool__":
            return self._truth(args[0])
        if name == "to" and id(args[0]) in self._slot:
            return args[0]  # a number keeps FP64; what it meets decides the result's dtype
        if name.strip("_") in _COMPARISONS:
            return self._compare(name.strip("_"), args) if self._known(args) else _alike(func, args)
        rewrite = _REWRITES.get(name)
        if rewrite is not None:
            return rewrite(func, args, kwargs)
        return func(*args, **kwargs)

    def _truth(self, tensor: Tensor) -> bool:
        if id(tensor) in self._slot:
            return self._compare("ne", (tensor, 0))
        raise UndecidableError("it takes a branch on the value of a tensor")

    def _known(self, args: Sequence[Any]) -> bool:
        return all(id(a) in self._slot or isinstance(a, (int, float)) for a in args)

    def _compare(self, name: str, args: Sequence[Any]) -> bool:
        left, right = (self._slot.get(id(a), None) for a in args)
        constant = tuple(None if isinstance(a, Tensor) else a for a in args)

        def test(values: Sequence[float]) -> bool:
            a = constant[0] if left is None else values[left]
            b = constant[1] if right is None else values[right]
            return _COMPARISONS[name](a, b)

        self._guards.append((test, test(self._values)))
        return self._guards[-1][1]


def _alike(func: Any, args: Any) -> Any:
    """A comparison of a tensor with a number happens in the tensor's dtype, whatever its dimension."""
    this, other = args
    if isinstance(this, Tensor) and isinstance(other, Tensor) and other.dim() == 0:
        other = other.to(this.dtype)
    return func(this, other)


def _scaled(func: Any, args: Any, kwargs: Any) -> Any:
    """``add(x, y, alpha=tensor)``: y * alpha first, as torch.compile does."""
    alpha = kwargs.get("alpha")
    if not isinstance(alpha, Tensor):
        return func(*args, **kwargs)
    common = torch.result_type(args[0], args[1])
    return func(args[0], args[1].to(common) * alpha.to(common))


def _product(func: Any, args: Any, kwargs: Any) -> Any:
    """``addcmul`` / ``addcdiv`` with a tensor as value, in the order in which the kernels round."""
    value = kwargs.get("value")
    if not isinstance(value, Tensor):
        return func(*args, **kwargs)
    this, first, second = args
    first = first * value.to(first.dtype)
    term = first * second if "addcmul" in func.__name__ else first / second
    return this.add_(term) if func.__name__.endswith("_") else this.add(term)


def _lerp(func: Any, args: Any, kwargs: Any) -> Any:
    weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
    if not isinstance(weight, Tensor):
        return func(*args, **kwargs)
    return func(args[0], args[1].to(args[0].dtype), weight.to(args[0].dtype))


def _addmm(func: Any, args: Any, kwargs: Any) -> Any:
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if not isinstance(beta, Tensor) and not isinstance(alpha, Tensor):
        return func(*args, **kwargs)
    return args[0] * beta + torch.mm(args[1], args[2]) * alpha


def _clamp(func: Any, args: Any, kwargs: Any) -> Any:
    this, bounds = args[0], [*args[1:], *[None] * (3 - len(args))]
    low, high = kwargs.get("min", bounds[0]), kwargs.get("max", bounds[1])
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        return func(*args, **kwargs)
    result = this
    for bound, choose in ((low, torch.maximum), (high, torch.minimum)):
        if bound is not None:
            result = choose(result, torch.as_tensor(bound).to(this.dtype))
    return this.copy_(result) if func.__name__.endswith("_") else result


def _square(func: Any, args: Any, kwargs: Any) -> Any:
    """``square_`` has no functional form that `functionalize` knows."""
    return args[0].mul_(args[0])


_REWRITES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": _scaled,
    "add_": _scaled,
    "sub": _scaled,
    "sub_": _scaled,
    "lerp": _lerp,
    "lerp_": _lerp,
    "addcmul": _product,
    "addcmul_": _product,
    "addcdiv": _product,
    "addcdiv_": _product,
    "addmm": _addmm,
    "square_": _square,
    "clamp": _clamp,
    "clamp_": _clamp,
}


def _extreme(builtin: Callable[..., Any], keeps_first: str) -> Callable[..., Any]:
    """Python's min / max, which also takes 0-dim tensors; like Python's it keeps the first of equals and of NaNs."""

    def choose(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(a, Tensor) for a in args):
            return builtin(*args, **kwargs)
        best = args[0]
        for other in args[1:]:
            pair = [a if isinstance(a, Tensor) else _like(a, args) for a in (best, other)]
            replaces = pair[1] < pair[0] if keeps_first == "min" else pair[1] > pair[0]
            best = torch.where(replaces, pair[1], pair[0])
        return best

    return choose


def _like(number: float, args: Sequence[Any]) -> Tensor:
    model = next(a for a in args if isinstance(a, Tensor))
    return torch.full((), number, dtype=torch.float64, device=model.device)


@contextlib.contextmanager
def tensor_builtins(module: str) -> Iterator[None]:
    """While active, code of `module` sees a min and max that take tensors."""
    names = {"min": _extreme(builtins.min, "min"), "max": _extreme(builtins.max, "max")}
    with COMPILING, replaced(sys.modules[module], **names):
        yield
