"""Run an emitted step: op by op, or compiled by Inductor in the parts that measured fastest.

Forward and backward are cut by AOTAutograd's min-cut partitioner, so cheap values are recomputed and not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import hint
from mpcompile.aten.graphs import inputs_of, outputs_of, values_of
from mpcompile.runtime.inductor import as_written, overlapped
from mpcompile.torch_internals.inductor import (
    compile_half,
    fakes_of,
    inductor_decompositions,
    output_strides,
    partition,
    simplified,
)
from mpcompile.training.distributed.gathered_weights import prefetch
from mpcompile.training.gradients.joint import Joint, fresh_tracing
from mpcompile.training.optimizer.traced_update import InPlace

Run = Callable[[list[Any]], Sequence[Any]]

aten = torch.ops.aten
_VIEWS = (aten.permute.default, aten.view.default, aten.t.default, aten.transpose.int, aten.reshape.default,
          aten.alias.default, aten.expand.default, aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim)  # fmt: skip


def decompositions(backend: str) -> dict[Any, Callable[..., Any]] | None:
    """What the backend wants decomposed in the joint trace."""
    if backend == "eager":
        return None
    return inductor_decompositions()


def compile_joint(
    joint: Joint, backend: str, *, recompute: bool, sends: bool = False, gathers: bool = False
) -> tuple[Run, list[Tensor]]:
    """A function of (*inputs, seed) that gives (*mutated, loss, *grads), and fakes of what it keeps for the backward.

    Run op by op, a joint graph keeps what its next nodes read: no list of it exists.

    Args:
      recompute: keep no pointwise chain (a GELU, a normalization's output) that a matmul of the backward reads.
      sends: gradients are sent to other ranks, as early as they are there, and awaited as late as they can be.
      gathers: weights are gathered from other ranks, forward and backward, and let go after use.
    """
    if backend == "eager":
        _view_as_it_lies(joint.module)
        return _eager(joint.module), []
    return _in_two(joint, recompute, sends, gathers)


def _view_as_it_lies(module: fx.GraphModule) -> None:
    """A kernel may lay its result out otherwise than torch's meta kernel said: views of it may need a copy."""
    for view in (aten.view.default, aten._unsafe_view.default):
        for node in module.graph.find_nodes(op="call_function", target=view):
            node.target = aten.reshape.default
    module.recompile()


def run_update(update: InPlace, backend: str) -> Run:
    """A function of the update's inputs that gives (finite, norm, scale) and writes the rest in place."""
    if backend == "eager":
        return _eager(update.module)
    return compile_inference(update.module, update.fakes)


def _eager(module: fx.GraphModule) -> Run:
    def run(inputs: list[Any]) -> Sequence[Any]:
        with torch.no_grad():
            return module(*inputs)  # type: ignore[no-any-return]

    return run


def _in_two(joint: Joint, recompute: bool, sends: bool, gathers: bool) -> tuple[Run, list[Tensor]]:
    mode = joint.forward.fakes[0].fake_mode  # type: ignore[attr-defined]
    fixed = [i for i, place in enumerate(joint.places) if joint.forward.inputs[place].kind != "arg"]
    # Copies and shares of weights stand between the inputs and the seed.
    fixed += range(len(joint.places), len(joint.fakes) - 1)
    with fresh_tracing(mode), fakes_of(mode):
        first, second = partition(joint.module, joint.fakes, joint.outputs_of_forward, recompute=recompute)
        # Compiling rewrites a graph in place: what is saved has the backward's names before it only.
        kept = joint.outputs_of_forward
        for half in (first, second) if gathers else ():
            prefetch(half)
        made, names = _made(outputs_of(first)[kept:]), [getattr(node, "name", "") for node in outputs_of(first)]
        with output_strides() as strides, as_written(gathers):
            forward: Any = compile_half(first, values_of(inputs_of(first)), static_input_idxs=fixed)
        _lay_out_saved(dict(zip(names, strides or [], strict=False)), second)
        order = _order_saved(names[kept:], second)
        with as_written(True) if gathers else overlapped(sends):
            backward: Any = compile_half(second, values_of(inputs_of(second)), is_backward=True)

    def run(inputs: list[Any]) -> Sequence[Any]:
        seed = inputs.pop()
        with torch.no_grad():
            outputs = list(forward(inputs))
            saved = [*outputs[kept:], seed]
            del outputs[kept:]
            saved = [saved[place] for place in order]
            outputs.extend(backward(saved))
        return outputs

    return run, made


def _made(nodes: Sequence[Any]) -> list[Tensor]:
    """Fakes of the saved tensors that the forward makes: not its inputs, nor views of them."""
    found = []
    for node in nodes:
        source = node
        while isinstance(source, fx.Node) and source.target in _VIEWS:
            source = source.args[0]
        if isinstance(source, fx.Node) and source.op != "placeholder" and isinstance(node.meta.get("val"), Tensor):
            found.append(node.meta["val"])
    return found


def _order_saved(names: Sequence[str], second: fx.GraphModule) -> list[int]:
    """Place, in what the forward saved (the seed last), of each input of the backward: sizes come first there."""
    wanted = [node.name for node in inputs_of(second)]
    unknown = [name for name in wanted if name not in names]
    # Only the seed is no output of the forward; anything else read in its place would be a wrong gradient.
    assert len(unknown) <= 1, f"the backward reads what the forward does not save: {unknown}"
    return [names.index(name) if name in names else len(names) for name in wanted]


def _lay_out_saved(strides: Mapping[str, Any], second: fx.GraphModule) -> None:
    """Tell the backward how the forward laid out what it saved: Inductor pads rows (50,257 columns to 50,304)."""
    for node in inputs_of(second):
        value, stride = node.meta.get("val"), strides.get(node.name)
        # By their hints: comparing a symbolic stride with a number would settle its size.
        if isinstance(value, Tensor) and stride is not None and list(map(hint, value.stride())) != list(stride):
            node.meta["val"] = value.as_strided(value.size(), stride)


def compile_inference(module: fx.GraphModule, fakes: Sequence[Any]) -> Run:
    """Compile a graph without a backward; it may end with copies into its inputs."""
    mode = next(t.fake_mode for t in fakes if isinstance(t, Tensor))  # type: ignore[attr-defined]
    with fresh_tracing(mode), fakes_of(mode):
        device = next(t.device for t in fakes if isinstance(t, Tensor))
        module = simplified(module, device)
        compiled: Any = compile_half(module, list(fakes), is_inference=True, static_input_idxs=range(len(fakes)))

    def run(inputs: list[Any]) -> Sequence[Any]:
        with torch.no_grad():
            return compiled(inputs)  # type: ignore[no-any-return]

    return run
