"""Autograd functions with a backward of their own: `torch.export` would read their forward alone.

Each application becomes one call that the joint trace makes again (`mpcompile.training.gradients.traced_calls`), so that its own
backward is the one that is traced.  A function whose kernels cannot be traced runs as it is, between compiled parts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx.experimental import proxy_tensor

from mpcompile.aten.facts import dtype_name
from mpcompile.errors import TrainingError
from mpcompile.torch_internals.patches import replaced
from mpcompile.torch_internals.tensors import (
    FakeTensor,
    pytree,
    unset_fake_temporarily,
    version,
    without_torch_function,
)
from mpcompile.training.gradients.traced_calls import Call, is_recording, record

# Torch's own, whose operation is in the trace already; ours, for shapes alone.
_IN_THE_TRACE = ("torch._library.", "mpcompile.")


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """While active in this thread, a custom function that would be differentiated is recorded as one call."""
    plain = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        whole = plain.__get__(None, cls)
        given = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor) and a.requires_grad]
        if not is_recording() or not given or not torch.is_grad_enabled() or cls.__module__.startswith(_IN_THE_TRACE):
            return whole(*args, **kwargs)
        return _apply(cls, whole, args, kwargs)

    with replaced(torch.autograd.Function, apply=classmethod(apply)):
        yield


def _apply(cls: Any, whole: Any, args: Any, kwargs: Any) -> Any:
    leaves, tree = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    places += [i for i, leaf in enumerate(leaves) if isinstance(leaf, SymInt)]

    def call(operands: Sequence[Any]) -> Any:
        filled = list(leaves)
        for place, operand in zip(places, operands, strict=True):
            filled[place] = operand
        given, named = pytree.tree_unflatten(filled, tree)
        return whole(*given, **named)

    operands = [leaves[place] for place in places]
    results, opaque = _sample(cls, call, operands)
    found, shape = pytree.tree_flatten(results)
    made = [leaf for leaf in found if isinstance(leaf, Tensor)]
    if not made:
        raise _refused(cls, "it gives no tensor")

    def run(*operands: Any) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(call(operands)) if isinstance(leaf, Tensor)]

    name = f"autograd.{cls.__name__}"
    rest = iter(record(Call(name, run, made, autocast=_cast_inputs(cls, operands), opaque=opaque), operands))
    return pytree.tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in found], shape)


def _sample(cls: Any, call: Any, operands: Sequence[Any]) -> tuple[Any, bool]:
    """(results with fake tensors, could not be traced), outside of the trace.

    Raises:
      TrainingError: MP534.
    """
    try:
        with proxy_tensor.disable_proxy_modes_tracing(), without_torch_function():
            return _called(
                cls, call, [torch.empty_like(o) if isinstance(o, Tensor) else o for o in operands], operands
            ), False
    except TrainingError:
        raise
    except Exception as error:
        return _really(cls, call, operands, error), True


def _called(cls: Any, call: Any, given: list[Any], operands: Sequence[Any]) -> Any:
    """`call` of tensors that need gradients where the operands do, and are no leaves, as in the program."""
    given = [
        t.requires_grad_() * 1 if isinstance(o, Tensor) and o.requires_grad else t
        for t, o in zip(given, operands, strict=True)
    ]
    before = [version(t) for t in given if isinstance(t, Tensor)]
    results = call(given)
    if before != [version(t) for t in given if isinstance(t, Tensor)]:
        raise _refused(cls, "it writes to its inputs")
    return results


def _really(cls: Any, call: Any, operands: Sequence[Any], refusal: Exception) -> Any:
    """The results for zeros of the operands' sizes, as fake tensors: kernels that a trace cannot enter are run."""
    sizes = [s for o in operands for s in (o.shape if isinstance(o, Tensor) else (o,))]
    if any(isinstance(size, SymInt) for size in sizes):
        raise _refused(cls, "its kernels cannot be traced, and sizes are symbolic here", refusal)
    mode: Any = next(o.fake_mode for o in operands if isinstance(o, FakeTensor))
    with proxy_tensor.disable_proxy_modes_tracing(), without_torch_function(), unset_fake_temporarily():
        given = [torch.zeros(tuple(o.shape), dtype=o.dtype, device=o.device) for o in operands]
        try:
            results = _called(cls, call, given, operands)
        except TrainingError:
            raise
        except Exception as error:
            raise _refused(cls, f"neither in a trace nor on zeros can it be called: {error}", refusal) from error
        results = pytree.tree_map_only(Tensor, lambda t: t.detach(), results)
    with proxy_tensor.disable_proxy_modes_tracing():
        return pytree.tree_map_only(Tensor, lambda t: mode.from_tensor(t, static_shapes=True), results)


def _refused(cls: Any, why: str, cause: Exception | None = None) -> TrainingError:
    error = TrainingError(
        "MP534",
        f"the step cannot keep {cls.__qualname__}, an autograd function with its own backward",
        where=f"{cls.__module__}.{cls.__qualname__}",
        why=why,
        try_="the drop-in way: loss = mp(x); loss.backward(); optimizer.step()",
    )
    error.__cause__ = cause
    return error


def _cast_inputs(cls: Any, operands: Sequence[Any]) -> str:
    """What `torch.amp.custom_fwd(cast_inputs=…)` was given for the operands' device; "" for nothing.

    Torch keeps it in the closure alone.
    """
    forward = cls.forward
    if not inspect.isfunction(forward):
        return ""
    closure = inspect.getclosurevars(forward).nonlocals
    dtype, device = closure.get("cast_inputs"), closure.get("device_type")
    meant = any(isinstance(o, Tensor) and o.device.type == device for o in operands)
    return dtype_name(dtype) if meant and isinstance(dtype, torch.dtype) else ""


__all__ = ["recorded"]
