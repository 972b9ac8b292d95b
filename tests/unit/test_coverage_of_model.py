"""What Dynamo leaves to eager FP32 is said: no fallback that hides."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from mpcompile import MPCompileError, mpcompile


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = cell(16, 16, batch_first=True), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


class Hidden(nn.Module):
    """A layer behind a graph break that takes the rest of the function with it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    @torch.compiler.disable
    def tail(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(torch.relu(self.first(x)))


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_model_is_captured_whole(cell: type[nn.RNNBase]) -> None:
    mp = mpcompile(Recurrent(cell), "bf16", backend="eager", low=["head"])
    mp(torch.randn(2, 4, 16))
    assert [n.module for plan in mp.plans for n in plan.graph if n.kind in ("rnn", "matmul")] == ["rnn", "head"]
    assert not torch._dynamo.config.allow_rnn, "another program's torch.compile must not change"


def test_what_a_graph_break_hides_is_named() -> None:
    mp = mpcompile(Hidden(), "bf16", backend="eager")
    with pytest.warns(
        UserWarning, match=r"not captured: last \(Linear\) ran as written, in FP32\. .*torch\.compiler\.disable"
    ):
        mp(torch.randn(2, 16))


def test_a_model_that_is_not_captured_at_all_is_named() -> None:
    mp = mpcompile(Hidden(), "bf16", backend="eager")
    mp.model.forward = torch.compiler.disable(mp.model.forward)
    with pytest.warns(UserWarning, match=r"nothing of the model was captured.* first \(Linear\), last \(Linear\)"):
        mp(torch.randn(2, 16))


def test_without_gradients_it_is_named_with_a_doubt() -> None:
    mp = mpcompile(Hidden(), "bf16", backend="eager")
    with torch.no_grad(), pytest.warns(UserWarning, match=r"last \(Linear\) ran as written, in FP32, or was not used"):
        mp(torch.randn(2, 16))


def test_an_unused_layer_is_no_gap() -> None:
    mp = mpcompile(Recurrent(nn.GRU), "bf16", backend="eager")
    mp.model.forward = lambda x: mp.model.rnn(x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp(torch.randn(2, 4, 16))


def test_the_bare_backend_says_that_an_lstm_is_left_out() -> None:
    torch._dynamo.utils.counters.clear()

    class Prefixed(Recurrent):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(x) + 1
            return super().forward(x)

    compiled = torch.compile(Prefixed(nn.LSTM), backend="mpcompile", options={"policy": "bf16", "inner": "eager"})
    with pytest.warns(UserWarning, match="does not trace LSTM"):
        compiled(torch.randn(2, 4, 16))


def test_an_override_of_what_no_graph_has_says_so() -> None:
    mp = mpcompile(Hidden(), "bf16", backend="eager", low=["last"])
    with pytest.raises(MPCompileError, match="names the module 'last', of which no captured graph has a node"):
        mp(torch.randn(2, 16))


@torch._dynamo.config.patch(recompile_limit=2)
def test_a_call_that_runs_no_graph_says_so() -> None:
    class Drop(nn.Linear):
        def forward(self, x: torch.Tensor, p: float) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), p)

    mp = mpcompile(Drop(16, 16), "bf16", backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp(torch.randn(2, 16), 0.1)
        mp(torch.randn(2, 16), 0.2)
    with pytest.warns(UserWarning, match="no compiled graph ran in this call.* FP32.* after 2 compilations"):
        mp(torch.randn(2, 16), 0.3)
