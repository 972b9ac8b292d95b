"""Of tensors: fakes, versions, storages, what is written beside autograd, lists at once."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpcompile.torch_internals.names import found

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        FakeTensor,
        FakeTensorMode,
        unset_fake_temporarily,
    )
else:
    DataDependentOutputException, FakeTensor, FakeTensorMode, unset_fake_temporarily = found(
        "torch._subclasses.fake_tensor",
        "DataDependentOutputException",
        "FakeTensor",
        "FakeTensorMode",
        "unset_fake_temporarily",
    )

# A list of tensors by a fixed number of kernels. Public by name in torch's optimizers, not in its reference.
foreach_copy, foreach_add, foreach_mul, foreach_zero, foreach_norm = found(
    "torch", "_foreach_copy_", "_foreach_add_", "_foreach_mul_", "_foreach_zero_", "_foreach_norm"
)
# (gradients, found, inverse scale): scales the gradients, and sets `found` to 1 where one is not finite.
unscale_and_look = found("torch", "_amp_foreach_non_finite_check_and_unscale_")
# One flat tensor as views of the sizes of others.
unflatten_dense = found("torch._C._nn", "unflatten_dense_tensors")
# A tensor's counter of what was written to it in place; a tensor of inference mode raises RuntimeError.
version = operator.attrgetter("_version")
# (hooks on a leaf's gradient, hooks after it was added up): a table each, or None.
gradient_hooks = operator.attrgetter("_backward_hooks")
post_accumulate_hooks = operator.attrgetter("_post_accumulate_grad_hooks")
# Autograd's own `vmap` is an older one than that of `torch.func`.
_BATCHED: tuple[Any, ...] = found("torch._C._functorch", "is_batchedtensor", "is_legacy_batchedtensor")
without_torch_function = found("torch._C", "DisableTorchFunction")
_guards = found("torch._C._dynamo", "guards")


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """Inside, operations on real tensors run as they are, in the middle of a trace."""
    with found("torch.utils._python_dispatch", "_disable_current_modes")():
        yield


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors of one storage, fakes too."""
    return int(tensor.untyped_storage()._cdata)


def flatten_rnn_weights(*arguments: Any) -> None:
    """Lay the weights of a recurrent layer out in one buffer, as cuDNN wants them, and make views of them."""
    torch._cudnn_rnn_flatten_weight(*arguments)


def is_batched(value: Any) -> bool:
    """True for a tensor inside of `vmap`, which stands for many."""
    return isinstance(value, Tensor) and any(asks(value) for asks in _BATCHED)


def real_tensors(fakes: Sequence[Any]) -> list[Tensor | None]:
    """The tensor that each fake was made from, where its mode remembers it and it still lives."""
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    if mode is None:
        return [None] * len(fakes)
    made: Any = mode.fake_tensor_converter.meta_converter
    known = {id(made.tensor_memo.get(number)): real for real, number in made.describer.lookup_tensor.items()}
    return [known.get(id(fake)) if isinstance(fake, FakeTensor) else None for fake in fakes]


class TensorGuards:
    """Whether tensors are of the sizes, strides, dtype, device and `requires_grad` that they were, in one call of C++.

    What the thread's dispatcher adds (an autocast, a dispatch mode) makes it say no as well.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._made: Any = _guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def hold(self) -> bool:
        return bool(self._made.check(*self._tensors))


__all__ = [
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "TensorGuards",
    "flatten_rnn_weights",
    "foreach_add",
    "foreach_copy",
    "foreach_mul",
    "foreach_norm",
    "foreach_zero",
    "gradient_hooks",
    "is_batched",
    "outside_of_modes",
    "post_accumulate_hooks",
    "pytree",
    "real_tensors",
    "storage_key",
    "unflatten_dense",
    "unscale_and_look",
    "unset_fake_temporarily",
    "version",
    "without_torch_function",
]
