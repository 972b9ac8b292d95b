"""What a step reads of the user's program beside its operations: sizes, objects, buffers, effects, modes."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from beside import train_beside
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mpcompile.api import mpcompile
from mpcompile.errors import TrainingError


class Net(nn.Module):
    """A linear layer, then what a test gives."""

    def __init__(self, then, width=8):
        super().__init__()
        torch.manual_seed(1)
        self.inp, self.then = nn.Linear(width, width), then
        self.register_buffer("ema", torch.zeros(width))

    def forward(self, x, *args):
        return self.then(self, self.inp(x), *args).square().mean()


def step_of(model, **options):
    return mpcompile(model, "fp32", backend="eager").train_step(optim.SGD(model.parameters(), 0.1), **options)


def rows(*counts):
    torch.manual_seed(0)
    return [torch.randn(n, 8) for n in counts]


def test_a_tensor_read_for_its_size_alone_counts():
    model = Net(lambda net, h, prompt: h[:, prompt.shape[1] :] * prompt.shape[0])
    x = torch.randn(4, 8)
    train_beside(model, [(x, torch.randn(b, n)) for b, n in ((1, 3), (1, 5), (2, 1), (3, 7), (1, 3))])


def test_a_batch_of_which_only_sizes_are_read():
    class Sizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return (self.w * x.shape[0]).sum() + self.w[: x.shape[1]].square().sum()

    train_beside(Sizes(), [(torch.randn(a, b),) for a, b in ((2, 3), (4, 3), (2, 2), (2, 3))])


def test_objects_and_zeros_are_what_they_hold_now():
    model = Net(lambda net, h, how, at: h * how.by + (1.0 if str(at)[0] == "-" else 0.0) + sum(how.more["list"]))
    how = SimpleNamespace(by=2.0, more={"list": [0.0]})
    step = step_of(model)
    for by, at, extra in ((2.0, 0.0, 0.0), (3.0, 0.0, 0.0), (3.0, -0.0, 0.0), (3.0, -0.0, 5.0), (2.0, 0.0, 0.0)):
        (x,) = rows(4)
        how.by, how.more["list"][0] = by, extra
        wanted = model(x, how, at).item()
        assert step(x, how, at).loss.item() == pytest.approx(wanted, rel=1e-5)
    assert len(step.specializations) == 4


def moved(net, h):
    net.ema = 0.9 * net.ema + 0.1 * h.detach().mean(0)
    return h + net.ema


def test_a_buffer_put_in_the_place_of_another_is_written_back():
    model = Net(moved)
    train_beside(model, [(x,) for x in rows(4, 4, 6, 5)])
    assert model.ema.abs().sum() > 0


def test_what_cannot_be_written_back_is_refused():
    def grown(net, h):
        net.ema = torch.cat([net.ema, h.detach()[0]])
        return h

    def attribute(net, h):
        net.state = h.detach()[0] + net.state
        return h + net.state

    for then, name in ((grown, "ema"), (attribute, "state")):
        model = Net(then)
        model.state = torch.zeros(8)
        with pytest.raises(TrainingError, match=f"MP537(.|\n)*{name}"):
            step_of(model)(*rows(4))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_statistics_are_as_they_were_after_a_skipped_step(accumulate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    step = step_of(model, loss_fn=lambda m, x: m(x).square().mean(), accumulate=accumulate)
    for x in rows(*[6] * 2 * accumulate):
        assert step(x).finite
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert int(before["1.num_batches_tracked"]) == 2 * accumulate
    bad = rows(6)[0]
    bad[0, 0] = float("inf")
    for x in [bad, *rows(*[6] * (accumulate - 1))]:
        result = step(x)
    assert not result.finite
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for x in rows(*[6] * accumulate):
        result = step(x)
    assert result.finite
    assert int(model[1].num_batches_tracked) == 3 * accumulate
    assert torch.isfinite(model[1].running_var).all()


EFFECTS = {
    "inv": lambda net, h: torch.linalg.inv(h + 5 * torch.eye(8)),
    "solve": lambda net, h: torch.linalg.solve(h + 5 * torch.eye(8), h),
    "cholesky": lambda net, h: torch.linalg.cholesky(h @ h.t() + torch.eye(8)),
    "lu": lambda net, h: torch.linalg.lu_factor(h + 5 * torch.eye(8))[0],
    "slogdet": lambda net, h: torch.linalg.slogdet(h + 5 * torch.eye(8))[1],
}


@pytest.mark.parametrize("kind", EFFECTS)
def test_solvers_train(kind):
    train_beside(Net(EFFECTS[kind]), [(x,) for x in rows(8, 8)], tolerance=2e-4)


def test_solvers_train_compiled():
    train_beside(Net(EFFECTS["solve"]), [(x,) for x in rows(8, 8)], backend="inductor", tolerance=2e-4)


def test_a_singular_matrix_is_torchs_own_error():
    model = Net(lambda net, h: torch.linalg.inv(h * 0))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="singular"):
        step_of(model)(*rows(8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_trained_weight_that_the_forward_writes():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.e, self.l = nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 2)

        def forward(self, ids):
            return self.l(self.e(ids)).square().mean()

    train_beside(Words(), [(torch.tensor([1, 2, 2, 8]),), (torch.tensor([0, 2, 3, 8]),), (torch.tensor([5, 5, 1, 8]),)])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_op_by_op(kind):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.r = kind(8, 8, batch_first=True)

        def forward(self, x):
            return self.r(x)[0].square().mean()

    train_beside(Layer(), [(torch.randn(3, 5, 8),), (torch.randn(3, 5, 8),)])


def test_a_norm_over_a_transposed_tensor_op_by_op():
    model = Net(lambda net, h: net.out(net.norm(h.transpose(1, 2)).transpose(1, 2)))
    model.norm, model.out = nn.BatchNorm1d(8), nn.Linear(8, 4)
    train_beside(model, [(torch.randn(3, 5, 8),), (torch.randn(3, 5, 8),)])


def test_two_threads_compile_their_steps():
    said = {}

    def work(number):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        step = step_of(model, loss_fn=lambda m, x: m(x).square().mean())
        try:
            for count in (3, 4, 5):
                step(torch.randn(count, 4))
            said[number] = "done"
        except Exception as error:
            said[number] = repr(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {0: "done", 1: "done"}


@pytest.mark.parametrize("called_before", [True, False])
def test_a_mode_around_one_call_is_no_matter_for_the_next(called_before):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(16, 64)
    with torch.no_grad():
        low = mpcompile(model, "bf16", backend="eager", low=["aten.linear"])(x)
        assert not torch.equal(low, model(x))
        mp = mpcompile(model, "bf16", backend="eager", low=["aten.linear"])
        if called_before:
            mp(x)
        with FlopCounterMode(display=False) as counter, pytest.warns(UserWarning, match="ran as written"):
            assert torch.equal(mp(x), model(x))
        assert counter.get_total_flops() > 0
        assert torch.equal(mp(x), low)


def test_losses_still_differ_where_they_should():
    """The comparison that these tests share can fail."""
    with pytest.raises(AssertionError):
        train_beside(Net(moved), [(x,) for x in rows(4, 4)], copied=Net(lambda net, h: F.relu(h)))
