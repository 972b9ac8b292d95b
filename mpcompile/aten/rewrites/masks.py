"""Attention masks that are the same at every call, folded so that attention kernels without a mask can be chosen.

Models write their masks in tensor arithmetic (`arange`, comparisons, broadcasts).  Where the data of no input enters, the
mask is a constant of the program, and is computed here once, on the CPU.  One that lets everything through is dropped;
one that is exactly causal becomes ``is_causal``.  Left as it is, a mask rules flash attention out, the kernels that take
one compute the masked half as well, and one that is expanded along the keys (stride 0, as in BERT without padding) sends
attention to unfused FP32 arithmetic: half of the kernel time of BERT-base on an H100 (docs/decisions/0017).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor, fx

from mpcompile.aten.facts import argument
from mpcompile.aten.functional import mutated_storages
from mpcompile.torch_internals.operators import OpOverload, schema_of
from mpcompile.torch_internals.tensors import pytree, unset_fake_temporarily

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
# A larger mask is not computed at compile time (elements; its int64 intermediates take eight times as many bytes).
LIMIT = 1 << 27
_FROM_SHAPE = {aten.new_ones.default, aten.new_zeros.default, aten.new_full.default,
               aten.ones_like.default, aten.zeros_like.default, aten.full_like.default}  # fmt: skip

Kind = Literal["", "all", "causal"]


def fold_masks(module: fx.GraphModule) -> dict[str, int]:
    """Fold the constant masks of `module`'s attentions, in place.

    Each node's ``meta["val"]`` must hold its fake result, and the graph must be explicit (`inplace.make_explicit`).

    Returns:
      How many masks were dropped ("all") and how many became ``is_causal`` ("causal").
    """
    graph = module.graph
    attentions = graph.find_nodes(op="call_function", target=ATTENTION)
    masked = {node: mask for node in attentions if (mask := _mask(node)) and not _widens(node)}
    constants = _constants(graph) if masked else {}
    kinds: dict[tuple[fx.Node, int], Kind] = {}
    done = Counter[str]()
    for node, mask in masked.items():
        if mask not in constants:
            continue
        key = mask, _square(node)
        if key not in kinds:
            kinds[key] = kind_of(_value(graph, mask, constants), key[1])
        if kinds[key]:
            _unmask(node, causal=kinds[key] == "causal")
            done[kinds[key]] += 1
    if done:
        _erase_unread(graph, constants)
    return dict(done)


def kind_of(mask: Tensor, square: int) -> Kind:
    """What a mask says: "all" (everything is let through), "causal", or "" (something else).

    Args:
      mask: boolean (True: let through) or added to the scores (0, or minus infinity or the dtype's minimum).
      square: the number of queries and of keys where they are as many, else 0.
    """
    allowed = mask if mask.dtype == torch.bool else mask == 0
    if mask.is_floating_point() and not bool((allowed | (mask <= torch.finfo(mask.dtype).min)).all()):
        return ""
    if bool(allowed.all()):
        return "all"
    if not square or mask.shape[-2:] != (square, square):
        return ""
    causal = torch.ones(square, square, dtype=torch.bool, device=mask.device).tril()
    return "causal" if bool((allowed == causal).all()) else ""


def _mask(node: fx.Node) -> fx.Node | None:
    found = argument(node, 3, "attn_mask")
    return found if isinstance(found, fx.Node) else None


def _widens(node: fx.Node) -> bool:
    """Whether the result has rows that the queries have not: a mask may be broadcast over more of them."""
    query = node.args[0]
    assert isinstance(query, fx.Node)
    return bool(node.meta["val"].shape[:-1] != query.meta["val"].shape[:-1])


def _square(node: fx.Node) -> int:
    """Queries, where there are as many keys and the number is fixed; else 0."""
    sizes = [operand.meta["val"].shape[-2] for operand in node.args[:2] if isinstance(operand, fx.Node)]
    # A symbolic size has no hash, and a comparison of two would settle them.
    fixed = all(isinstance(size, int) for size in sizes)
    return int(sizes[0]) if fixed and sizes[0] == sizes[-1] else 0


def _unmask(node: fx.Node, *, causal: bool) -> None:
    named = ("attn_mask", "dropout_p", "is_causal")
    dropout, was_causal = argument(node, 4, "dropout_p", 0.0), argument(node, 5, "is_causal", False)
    node.args = (*node.args[:3], None, dropout, causal or was_causal)
    node.kwargs = {name: given for name, given in node.kwargs.items() if name not in named}


def _erase_unread(graph: fx.Graph, constants: dict[fx.Node, None]) -> None:
    for node in reversed(constants):
        # `torch.export` states the dtype of what is cast, which reads nothing.
        if all(user.target is aten._assert_tensor_metadata.default for user in node.users):
            for user in list(node.users):
                graph.erase_node(user)
            graph.erase_node(node)


def _constants(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes whose value no input's data enters, in order."""
    found: dict[fx.Node, None] = {}
    written = mutated_storages(graph)
    for node in graph.nodes:
        if _computable(node) and node not in written and all(n in found for n in _read(node)):
            found[node] = None
    return found


def _read(node: fx.Node) -> list[fx.Node]:
    """The nodes whose data a node reads."""
    return [] if node.target in _FROM_SHAPE else node.all_input_nodes


def _computable(node: fx.Node) -> bool:
    target, value = node.target, node.meta.get("val")
    if not isinstance(target, OpOverload) or not isinstance(value, Tensor) or target.namespace != "aten":
        return False
    schema = schema_of(target)
    if schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags or "empty" in schema.name:
        return False
    shapes = [value, *(n.meta.get("val") for n in node.all_input_nodes)]
    return all(isinstance(t, Tensor) and all(isinstance(size, int) for size in t.shape) for t in shapes) and (
        value.numel() <= LIMIT
    )


def _value(graph: fx.Graph, mask: fx.Node, constants: dict[fx.Node, None]) -> Tensor:
    """The mask's value, computed on the CPU; what is read no more is freed."""
    wanted, stack = {mask}, [mask]
    while stack:
        new = [n for n in _read(stack.pop()) if n not in wanted]
        wanted.update(new)
        stack += new
    left = Counter(n for node in wanted for n in _read(node))
    env: dict[fx.Node, Any] = {}
    with unset_fake_temporarily(), torch.no_grad():
        for node in constants:
            if node not in wanted:
                continue
            env[node] = _run(node, env)
            for used in _read(node):
                left[used] -= 1
                if not left[used]:
                    del env[used]
    found: Tensor = env[mask]
    return found


def _run(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    def given(n: fx.Node) -> Any:
        # Only its shape and dtype are read where it is no constant itself.
        like = n.meta["val"]
        return env[n] if n in env else torch.empty((), dtype=like.dtype, device="cpu").expand(like.shape)

    args, kwargs = fx.map_arg((node.args, node.kwargs), given)
    args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    return node.target(*args, **kwargs)  # type: ignore[operator]
