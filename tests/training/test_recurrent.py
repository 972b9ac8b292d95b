"""LSTM, GRU and RNN in compiled graphs: one operation each, near FP32, whatever the length of the sequence."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from mpcompile import mpcompile
from mpcompile.aten import recurrent

WIDTH = 32


class Net(nn.Module):
    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(WIDTH, WIDTH), cell(WIDTH, WIDTH, **options)
        self.last = nn.Linear((options.get("proj_size") or WIDTH) * (1 + bool(options.get("bidirectional"))), 8)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        output, states = self.rnn(torch.relu(self.first(x)))
        return output + sum(s.mean() for s in (states if isinstance(states, tuple) else [states]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.hidden(x)).square().mean()


class Checkpointed(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.hidden, x, use_reentrant=False)).square().mean()


class Packed(Net):
    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(self.first(x), lengths, batch_first=True, enforce_sorted=False)
        return self.last(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]).square().mean()


def near(reference: nn.Module, model: nn.Module, mp: nn.Module, *args: Any) -> None:
    expected, got = reference(*args), mp(*args)
    expected.backward()
    got.backward()
    torch.testing.assert_close(got, expected, rtol=0.03, atol=1e-3)
    whole = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 0.02 * whole, name
        assert a.grad.dtype == torch.float32


OPTIONS: dict[str, dict[str, Any]] = {
    "two layers both ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False},
    "projected": {"proj_size": 8},
}


@pytest.mark.parametrize(
    ("cell", "name", "policy"),
    [
        (nn.LSTM, "two layers both ways", "bf16"),
        (nn.LSTM, "projected", "bf16"),
        (nn.GRU, "no bias", "fp16"),
        (nn.RNN, "two layers both ways", "fp16"),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_compiled_is_near_fp32(cell: type[nn.RNNBase], name: str, policy: str) -> None:
    torch.manual_seed(0)
    model = Net(cell, **OPTIONS[name])
    mp = mpcompile(model, policy, low=["rnn"])
    near(copy.deepcopy(model), model, mp, torch.randn(4, 6, WIDTH))
    assert [n.precision for plan in mp.plans for n in plan.graph if n.kind == "rnn"] == [policy]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[recurrent.Kept]:
    """The forwards that kept autograd's graph."""
    made: list[Any] = []
    run = recurrent._run_kept
    monkeypatch.setattr(recurrent, "_run_kept", lambda *args: made.append(run(*args)) or made[-1])
    return made


def test_one_forward_serves_the_backward_and_frees_what_it_kept(forwards: list[recurrent.Kept]) -> None:
    mp = mpcompile(Net(dropout=0.5, num_layers=2), "bf16")
    loss = mp(torch.randn(4, 6, WIDTH))
    loss.backward()
    assert len(forwards) == 1
    kept = weakref.ref(forwards.pop())
    del loss
    gc.collect()
    assert kept() is None


def test_without_gradients_nothing_is_kept(forwards: list[recurrent.Kept]) -> None:
    model = Net()
    mp, x = mpcompile(model, "bf16"), torch.randn(4, 6, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(mp(x), model(x), rtol=0.03, atol=1e-3)
    assert not forwards


def test_a_checkpoint_runs_it_again(forwards: list[recurrent.Kept]) -> None:
    model = Checkpointed()
    near(copy.deepcopy(model), model, mpcompile(model, "bf16"), torch.randn(4, 6, WIDTH))
    assert len(forwards) == 2


def test_lengths_of_sequences_share_one_graph() -> None:
    mp = mpcompile(Net(nn.GRU, batch_first=True), "bf16", backend="eager")
    for batch, length in ((4, 6), (5, 7), (3, 50), (2, 9), (7, 8)):
        mp(torch.randn(batch, length, WIDTH)).backward()
    assert len(mp.plans) == 2


def test_the_training_step_has_it_whole(forwards: list[recurrent.Kept]) -> None:
    torch.manual_seed(0)
    model = Net(batch_first=True)
    reference = copy.deepcopy(model)
    step = mpcompile(model, "bf16", low=["rnn"]).train_step(torch.optim.SGD(model.parameters(), lr=0.1))
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch, length in ((4, 6), (5, 7), (3, 12), (2, 9)):
        x = torch.randn(batch, length, WIDTH)
        loss = reference(x)
        loss.backward()
        plain.step()
        plain.zero_grad()
        torch.testing.assert_close(step(x).loss, loss.detach(), rtol=0.03, atol=1e-3)
    assert len(forwards) == 4
    assert len(step.specializations) == 2


def test_what_cannot_be_run_again_is_a_clear_error() -> None:
    class Lost(torch.autograd.graph.saved_tensors_hooks):
        """Such as moves saved tensors to another device and back."""

        def __init__(self) -> None:
            super().__init__(torch.clone, torch.clone)

    x = torch.randn(4, 6, WIDTH)
    model = Net()
    with Lost():
        near(copy.deepcopy(model), model, mpcompile(model, "bf16"), x)
        loss = mpcompile(Net(dropout=0.5, num_layers=2), "bf16")(x)
    with pytest.raises(Exception, match="MP704"):
        loss.backward()


def test_packed_sequences_run_as_written_and_say_so() -> None:
    model = Packed(batch_first=True)
    reference = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        near(
            reference,
            model,
            mpcompile(model, "bf16", backend="eager"),
            torch.randn(3, 6, WIDTH),
            torch.tensor([6, 2, 4]),
        )
    assert any("rnn (LSTM) ran as written, in FP32" in str(w.message) for w in caught)
