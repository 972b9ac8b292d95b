"""torch's OpInfo database as material: every op's samples, traced to the ATen ops that capture reaches."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

PREFERRED = (torch.float32, torch.int64, torch.complex64, torch.bool, torch.float64)


@functools.cache
def database() -> list[Any]:
    """torch's OpInfos, in its own order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return list(op_db)


def samples(info: Any, most: int, dtype: torch.dtype | None = None, requires_grad: bool = False) -> list[Any]:
    """The first samples of an op, in FP32 (or the first dtype that it takes); always the same ones."""
    dtypes = info.supported_dtypes("cpu")
    if not dtypes:
        return []  # CUDA only
    dtype = dtype or next((d for d in PREFERRED if d in dtypes), None) or next(iter(dtypes))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = info.sample_inputs("cpu", dtype, requires_grad=requires_grad)
        return list(found)[:most] if info.name == "eye" else list(itertools.islice(found, most))


def flat_call(info: Any, sample: Any) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """The op as a function of its tensors alone, and these tensors."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def call(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        first, args, kwargs = pytree.tree_unflatten(filled, spec)
        return info(first, *args, **kwargs)

    return call, [leaves[i] for i in places]


def trace(call: Callable[..., Any], tensors: list[torch.Tensor]) -> fx.GraphModule:
    """The pre-autograd ATen graph of a call, as capture makes it."""
    with warnings.catch_warnings(), torch.amp.autocast("cpu", enabled=False), _no_collection():
        warnings.simplefilter("ignore")
        return make_fx(call, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """The database's half-read generators change the grad mode when collected: not in the middle of a trace."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@functools.cache
def traced(most: int) -> tuple[dict[str, list[fx.GraphModule]], frozenset[str]]:
    """OpInfo name -> the graphs of its first samples, and the names of those none of whose samples could be traced."""
    found: dict[str, list[fx.GraphModule]] = {}
    failed = set()
    for info in database():
        given = samples(info, most)
        graphs = []
        for sample in given:
            with contextlib.suppress(Exception):
                graphs.append(trace(*flat_call(info, sample)))
        found.setdefault(info.name, []).extend(graphs)
        failed |= {info.name} if given and not graphs else set()
    return found, frozenset(failed)
