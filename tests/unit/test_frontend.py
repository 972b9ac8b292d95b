"""The fx front end: what it reads of a graph, what it makes explicit, and that writing back changes nothing."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from mpcompile.aten.capture import export, trace_dynamo
from mpcompile.aten.exported import inline_regions
from mpcompile.aten.read import FxCapture, read
from mpcompile.aten.write import write
from mpcompile.errors import CaptureError
from mpcompile.torch_internals.modules import module_reads


def captured(fn: Any, *args: torch.Tensor) -> FxCapture:
    """The reading of the one graph that Dynamo finds in `fn`."""
    found: list[FxCapture] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        fakes = [n.meta["example_value"] for n in module.graph.nodes if n.op == "placeholder"]
        found.append(read(trace_dynamo(module, fakes)))
        return module.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend)(*args)
    assert len(found) == 1
    return found[0]


def ops(capture: FxCapture) -> list[str]:
    return [node.op for node in capture.graph]


def test_composites_stay_whole() -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q = F.layer_norm(F.linear(x, w), (8,)).view(2, 1, 4, 8)
        return F.cross_entropy(F.scaled_dot_product_attention(q, q, q).flatten(0, 2), torch.zeros(8, dtype=torch.long))

    found = ops(captured(f, torch.randn(2, 4, 8), torch.randn(8, 8)))
    for name in ("linear", "layer_norm", "scaled_dot_product_attention", "cross_entropy_loss"):
        assert any(name in op for op in found), found


def test_nodes_know_their_module_and_the_user_s_line() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(self.fc(x))

    model = nn.Sequential(Inner())
    for graph in (captured(model, torch.randn(2, 8)).graph, read_exported(model, torch.randn(2, 8)).graph):
        linear = next(node for node in graph if "linear" in node.op)
        sigmoid = next(node for node in graph if "sigmoid" in node.op)
        assert linear.module == "0.fc"
        assert sigmoid.module == "0"
        assert sigmoid.source.startswith("test_frontend.py:")
        assert linear.flops == 2 * 2 * 8 * 8
        assert "0.fc.weight" in graph.values
        assert graph.values["0.fc.weight"].role == "parameter"


def read_exported(model: nn.Module, *args: torch.Tensor) -> FxCapture:
    module = export(model, args).module()
    inline_regions(module)
    return read(module)


def test_in_place_chains_become_functional() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = (x * 2).relu_()
        y.add_(1)
        return y.view(-1).sum()

    capture = captured(f, torch.randn(2, 3))
    assert not any(op.split(".")[1].endswith("_") for op in ops(capture))
    assert not any(value.alias for value in capture.graph.values.values())


@pytest.mark.parametrize("kind", ["view before", "input", "view written"])
def test_writes_that_others_see_stay_and_tie_their_storage(kind: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        if kind == "view before":
            y = x * 2
            v = y.view(-1)
            y.add_(1)
            return v + 1
        if kind == "input":
            x.add_(1)
            return x * 2
        y = (x * 2).relu_()
        y.view(-1).add_(1)
        return y * 3

    x = torch.randn(2, 3)
    expected = f(x.clone())
    capture = captured(f, x.clone())
    tied = [value for value in capture.graph.values.values() if value.alias]
    assert len({value.alias for value in tied}) == 1
    assert len(tied) >= 2
    assert torch.equal(write(capture, capture.graph).module(x.clone())[0], expected)


def test_dtypes_that_follow_another_tensor_are_written_out() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.to(y) + y.type_as(x) + torch.zeros_like(x) + x.new_ones(2)

    found = captured(f, torch.randn(2), torch.randn(2)).graph
    assert not {"aten.to.other", "aten.type_as.default"} & {node.op for node in found}
    factories = [node for node in found if node.op in ("aten.zeros_like.default", "aten.new_ones.default")]
    assert len(factories) == 2
    assert all(node.out_dtype == "fp32" for node in factories)


def test_a_tuple_s_values_are_named_and_rewritten() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        values, index = x.topk(2)
        _, second = x.split(2)
        return values.sum() + index.sum() + second.sum()

    x = torch.randn(4, 4)
    capture = captured(f, x)
    topk = next(node for node in capture.graph if "topk" in node.op)
    assert [capture.graph.values[name].dtype for name in topk.outputs] == ["fp32", "int64"]
    assert torch.equal(write(capture, capture.graph).module(x)[0], f(x))


def test_autocast_regions_become_hints_in_both_entrances() -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                y = self.fc(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = self.fc(y)
            return self.fc(z.float())

    model, x = Region(), torch.randn(2, 4)
    for capture in (captured(model, x), read_exported(model, x)):
        assert [node.region for node in capture.graph if "linear" in node.op] == ["off", "bf16", None]


def test_symbolic_sizes_are_names_with_a_count() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    x = torch.randn(6, 4)
    torch._dynamo.mark_dynamic(x, 0)
    graph = captured(f, x).graph
    (mul,) = (node for node in graph if "mul" in node.op)
    value = graph.values[mul.outputs[0]]
    assert isinstance(value.shape[0], str)
    assert value.shape[1] == 4
    assert value.numel == 24


def test_exported_graphs_keep_the_user_s_call() -> None:
    class Rich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.fc(x) * scale}

    model, x, scale = Rich(), torch.randn(2, 4), torch.tensor(2.0)
    module = export(model, (x,), {"scale": scale}).module()
    inline_regions(module)
    capture = read(module)
    again = write(capture, capture.graph).module
    torch.testing.assert_close(again(x, scale=scale)["y"], model(x, scale=scale)["y"], rtol=0, atol=0)


def test_a_move_to_a_device_is_no_cast() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).to(torch.device("cpu")) + x.to(torch.float32)

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return f(x)

    casts = [node for node in read_exported(Model(), torch.randn(2, 8)).graph if node.op.startswith("aten.to.")]
    assert [(node.op, node.out_dtype) for node in casts] == [("aten.to.dtype_layout", ""), ("aten.to.dtype", "fp32")]


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


class Ctc(nn.Module):
    def forward(self, logs: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(logs, labels, lengths, lengths - 2)


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(x.shape, generator=self.generator)


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        (Branches(), (torch.ones(3),), "Python decides by what a tensor holds"),
        (Packs(), (torch.ones(2, 5, 4), torch.tensor([5, 3])), "packed sequence"),
        (Ctc(), (torch.zeros(9, 2, 5), torch.ones(2, 4).long(), torch.tensor([6, 6])), "lengths are tensors"),
        (Draws(), (torch.ones(3),), "torch.Generator"),
        (nn.Linear(4, 4), (torch.ones(2, 3),), "do not fit the model"),
        (nn.Linear(4, 4), (torch.ones(2, 4), 1), "are not those of forward"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, nn.Module) else "",
)
def test_what_cannot_be_one_graph_says_why(
    model: nn.Module, args: tuple[Any, ...], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match="MP101") as caught:
        export(model, args)
    assert words in caught.value.why
    assert caught.value.try_
    if isinstance(model, (Branches, Packs)):
        assert "test_frontend.py:" in caught.value.where
    # Torch's own log of the graph is no message.
    assert len(capfd.readouterr().err) < 500


def test_a_transformers_mask_is_read_as_it_is() -> None:
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    a, b, mask = torch.randn(2, 5, 16), torch.randn(2, 6, 16), nn.Transformer.generate_square_subsequent_mask(6)
    program = export(model, (a, b), {"tgt_mask": mask})
    torch.testing.assert_close(program.module()(a, b, tgt_mask=mask), model(a, b, tgt_mask=mask))


class Chatty(nn.Module):
    """Says what it does while another thread does, and then cannot be one graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("mine", file=sys.stderr)
        other = threading.Thread(target=lambda: print("another's", file=sys.stderr))
        other.start()
        other.join()
        return x + 1 if x.sum() > 0 else x - 1


def test_what_a_program_and_other_threads_write_stays_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stderr
    with pytest.raises(CaptureError, match="MP101"):
        export(Chatty(), (torch.ones(3),))
    said = capsys.readouterr().err
    assert said.splitlines()[:2] == ["mine", "another's"]
    assert len(said) < 500
    assert sys.stderr is before


def test_what_other_threads_read_of_modules_is_no_capture_of_ours() -> None:
    mine, other = Branches(), Branches()
    with module_reads() as (found, _):
        assert mine.training
        reader = threading.Thread(target=lambda: other.training)
        reader.start()
        reader.join()
    assert {id(owner) for owner, _, _ in found.values()} == {id(mine)}
