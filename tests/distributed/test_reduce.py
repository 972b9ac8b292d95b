"""The order in which gradients are sent, without a process group."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import fx

from mpcompile.training.distributed import reduce
from mpcompile.training.distributed.ranks import Ranks
from mpcompile.training.distributed.reduce import Reducer

SIZES = {"a": 30, "b": 40, "c": 50}


def backward(made: Sequence[str]) -> fx.GraphModule:
    """A graph that gives a loss and the gradients of a, b and c, made in the order `made`."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in SIZES}
    loss = graph.call_function(torch.ops.aten.sum.default, (inputs["a"],))
    grads = {name: graph.call_function(torch.ops.aten.neg.default, (inputs[name],)) for name in made}
    for name, size in SIZES.items():
        inputs[name].meta["val"] = grads[name].meta["val"] = torch.empty(size, device="meta")
    loss.meta["val"] = torch.empty((), device="meta")
    graph.output((loss, *(grads[name] for name in SIZES)))
    return fx.GraphModule({}, graph)


def sent(module: fx.GraphModule) -> list[list[str]]:
    """Inputs of the gradients of each collective, in the graph's order."""
    found = module.graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.all_reduce_coalesced.default)
    return [[one.args[0].name for one in node.args[0]] for node in sorted(found)]


@pytest.mark.parametrize("other", ["abc", "bac", "cab", "cba"])
def test_a_later_graph_sends_as_the_first_one_did(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may trace a last, smaller batch apart: its gradients may be ready in another order, and travel in the same."""
    monkeypatch.setattr(reduce, "FIRST", 1)
    monkeypatch.setattr(reduce, "BUCKET", 1)
    monkeypatch.setattr(reduce, "SMALL", 0)
    reducer = Reducer(Ranks(None, "0", 2, 0), low=False)
    first, later = backward("bca"), backward(other)
    for module in (first, later):
        reducer.reduce(module, [[0], [1], [2]], list(SIZES), first=1)
        module.graph.lint()
    assert sent(first) == [["b"], ["c"], ["a"]]
    assert sent(later) == sent(first)
    assert Reducer(Ranks(None, "0", 2, 0), low=False).buckets == {}
