"""Hooks that change gradients: on tensors in the forward, on parameters, on modules.

A hook whose result is a function of the gradient is traced into the backward.  One that gives nothing back, or that
acts on what is outside of it, would act once and never again: it is refused.
"""

from __future__ import annotations

import contextlib
import dis
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import hooks as torch_hooks

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.modules import has_legacy_backward_hooks
from mpcompile.torch_internals.patches import replaced
from mpcompile.torch_internals.tensors import FakeTensor, gradient_hooks, post_accumulate_hooks
from mpcompile.training.gradients.traced_calls import Call, insert, is_recording, record

_WRITES = frozenset({"STORE_GLOBAL", "STORE_ATTR", "STORE_SUBSCR", "DELETE_GLOBAL", "DELETE_ATTR", "DELETE_SUBSCR"})
# Methods by which a program keeps or shows something; on a tensor they have no meaning in a trace either.
_KEEPS = frozenset({"append", "appendleft", "extend", "update", "setdefault", "insert", "write", "print", "put",
                    "item", "tolist", "numpy", "log", "add_scalar", "add_histogram", "info", "debug"})  # fmt: skip


def refused(what: str, why: str) -> TrainingError:
    return TrainingError(
        "MP523", what, why=why, try_="the drop-in way: loss = mp(x); loss.backward(); optimizer.step()"
    )


def _acts_outside(hook: Any) -> str:
    """What shows in a hook's code that it does more than compute; "" for nothing."""
    hook = getattr(hook, "__func__", hook)
    code = getattr(hook, "__code__", None)
    if not isinstance(code, types.CodeType):
        return ""
    for one in dis.get_instructions(code):
        if one.opname in _WRITES or (one.opname == "STORE_DEREF" and one.argval in code.co_freevars):
            return f"it writes to {one.argval or 'an item'!s}"
        if one.opname.startswith("LOAD") and one.argval in _KEEPS:
            return f"it calls {one.argval}()"
    return ""


def pure(hook: Callable[..., Any], where: str) -> Callable[..., Any]:
    """`hook`, for a trace.

    Raises:
      TrainingError: MP523, now or when it runs, for one that is not a function of the gradient.
    """
    outside = _acts_outside(hook)
    if outside:
        raise refused(f"there is a gradient hook on {where} that does more than compute", outside)

    def traced(*given: Any) -> Any:
        try:
            result = hook(*given)
        except TrainingError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise refused(
                f"the gradient hook on {where} cannot be traced", f"{type(error).__name__}: {first}"
            ) from error
        if result is None:
            raise refused(f"the gradient hook on {where} gives nothing back",
                          "what it does is outside of the gradient, and a compiled step would not do it")  # fmt: skip
        return result

    return traced


def _call_of(hook: Callable[..., Any], sample: Tensor, where: str) -> Call:
    traced = pure(hook, where)

    def run(tensor: Tensor) -> list[Tensor]:
        if not tensor.requires_grad:
            return [tensor]
        # The tensor itself: a view would part from it where the program writes to it in place.
        through = tensor.view_as(tensor) if tensor.is_leaf else tensor
        through.register_hook(traced)  # type: ignore[no-untyped-call]
        return [through]

    return Call("autograd.gradient_hook", run, [sample], is_hook=True)


class _Handle:
    """What `register_hook` gives back while a model is captured."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def remove(self) -> None:
        self._call.dropped = True

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """While active in this thread, what the forward hooks is recorded.

    Raises:
      TrainingError: MP523.
    """
    plain = torch.Tensor.register_hook

    def register_hook(self: Any, hook: Any) -> Any:
        if not is_recording() or not isinstance(self, FakeTensor) or not self.requires_grad:
            return plain(self, hook)  # type: ignore[no-untyped-call]
        call = _call_of(hook, self, "a tensor of the forward")
        record(call, [self])
        return _Handle(call)

    graph = torch.autograd.graph
    shims = {name: _refusing(name, getattr(graph, name)) for name in ("register_multi_grad_hook",)}
    with (
        replaced(torch.Tensor, register_hook=register_hook),
        replaced(graph, **shims),
        replaced(graph.saved_tensors_hooks, __enter__=_enter_saved(graph.saved_tensors_hooks.__enter__)),
        replaced(nn.modules.module, BackwardHook=_ModuleHooks),
    ):
        yield


def _refusing(name: str, plain: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_recording():
            raise refused(f"the forward calls torch.autograd.graph.{name}", "a trace cannot see what it hooks")
        return plain(*args, **kwargs)

    return call


def _enter_saved(plain: Any) -> Any:
    """Where saved tensors are moved, the compiler's own plan of memory stands in; else they may come back as others."""

    def enter(self: Any) -> Any:
        if is_recording() and not isinstance(self, torch.autograd.graph.save_on_cpu):
            raise refused("the forward hooks what autograd saves (saved_tensors_hooks)",
                          "the compiled backward keeps other tensors than autograd does")  # fmt: skip
        return plain(self)

    return enter


_PLAIN_MODULE_HOOKS = torch_hooks.BackwardHook


class _ModuleHooks:
    """In the place of torch's `BackwardHook` during a capture: what stands before the module, and what after it."""

    def __new__(cls, *args: Any) -> Any:
        return super().__new__(cls) if is_recording() else _PLAIN_MODULE_HOOKS(*args)

    def __init__(self, module: nn.Module, user_hooks: Sequence[Any], user_pre_hooks: Sequence[Any]) -> None:
        name = type(module).__name__
        self._hooks = [pure(hook, f"a {name}") for hook in user_hooks]
        self._pre_hooks = [pure(hook, f"a {name}") for hook in user_pre_hooks]
        self._module, self._inputs = module, 0
        self._real: Any = None

    def _fresh(self, given: Any) -> Any:
        self._real = _PLAIN_MODULE_HOOKS(self._module, self._hooks, self._pre_hooks)
        return self._real.setup_input_hook(given)

    def setup_input_hook(self, args: Any) -> Any:
        self._inputs = len(args)
        through = self._through(args, self._fresh)
        if through is not args:
            self._inputs = -1
        return through

    def setup_output_hook(self, args: Any) -> Any:
        def setup(given: Any) -> Any:
            if self._inputs >= 0:
                # No input has a gradient, and the graph no node for them.
                self._fresh((None,) * self._inputs)
            return self._real.setup_output_hook(given)

        return self._through(args, setup)

    def _through(self, args: Any, setup: Callable[[Any], Any]) -> Any:
        """`args` (a tensor or a tuple) as they come out of torch's own hook, which the joint trace will set up."""
        many = args if isinstance(args, tuple) else (args,)
        places = [i for i, arg in enumerate(many) if isinstance(arg, Tensor)]
        if not torch.is_grad_enabled() or not any(many[i].requires_grad for i in places):
            return args

        def run(*operands: Any) -> list[Tensor]:
            filled = list(many)
            for place, operand in zip(places, operands, strict=True):
                filled[place] = operand
            given = setup(tuple(filled))
            return [given[place] for place in places]

        made = record(Call("autograd.module_hook", run, [many[i] for i in places]), [many[i] for i in places])
        filled = list(many)
        for place, result in zip(places, made, strict=True):
            filled[place] = result
        return tuple(filled) if isinstance(args, tuple) else filled[0]


def refuse_unseen(named: Iterable[tuple[str, Tensor]], modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse the hooks that have no place in a traced backward.

    Raises:
      TrainingError: MP523.
    """
    found = [name for name, p in named if post_accumulate_hooks(p)]
    found += [name or "the model" for name, m in modules if has_legacy_backward_hooks(m)]
    if found:
        more = f" and {len(found) - 1} more" * (len(found) > 1)
        raise refused(f"there is a post-accumulate or legacy backward hook on {found[0]}{more}",
                      "it runs beside the backward, not in it")  # fmt: skip


def insert_for_parameters(module: fx.GraphModule, parameters: dict[str, Tensor]) -> None:
    """Let each parameter that has gradient hooks be read through them.

    Args:
      parameters: by the names that the placeholders of `module` are marked with.
    """
    for node in module.graph.find_nodes(op="placeholder"):
        held = parameters.get(node.meta.get("mp_name", ""))
        hooks = list(((held is not None and gradient_hooks(held)) or {}).values())
        through = node
        for hook in hooks:
            through = insert(
                module.graph, through, _call_of(hook, node.meta.get("val"), f"the parameter {node.meta['mp_name']}")
            )
    module.graph.lint()
    module.recompile()


__all__ = ["insert_for_parameters", "recorded", "refuse_unseen"]
