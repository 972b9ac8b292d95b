"""Split masters: exact FP32 at four bytes, invisible from outside."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim

from mpcompile.api import mpcompile
from mpcompile.errors import TrainingError
from mpcompile.training.optimizer.split import join, split

floats = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50)


@given(floats)
def test_the_halves_are_the_whole_bit_for_bit(numbers):
    full = torch.tensor(numbers, dtype=torch.float32)
    high, low = split(full)
    assert torch.equal(join(high, low).view(torch.int32), full.view(torch.int32))
    near = full.to(torch.bfloat16)
    # The same rounding but for exact halves, which go away from zero.
    ties = (full.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[~ties], near[~ties])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(30, 32), nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 128), nn.Linear(128, 32), nn.Linear(32, 30)

    def forward(self, x, y):
        h = self.embed(x)
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


def batches(count, rows=8):
    return [tuple(torch.randint(0, 30, (rows, 9)) for _ in range(2)) for _ in range(count)]


def make(masters, backend="eager", **options):
    torch.manual_seed(0)
    model = Net()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    mp = mpcompile(model, "bf16", backend=backend, low=["up", "down", "head"])
    return model, optimizer, mp.train_step(optimizer, masters=masters, **options)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_weights_are_those_of_full_masters(backend):
    (model, own, step), (twin, other, whole) = make("split", backend), make("full", backend)
    data = [*batches(3), *batches(2, rows=5), *batches(2)]
    for turn, batch in enumerate(data):
        a, b = step(*batch), whole(*batch)
        # The ties below move a loss by less than a rounding of the weights' type.
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=1e-6)
        if turn == 3:
            for one in (own, other):
                one.load_state_dict(copy.deepcopy(one.state_dict()))
    state = model.state_dict()
    assert {v.dtype for v in state.values()} == {torch.float32}
    for name, value in twin.state_dict().items():
        # Only ties of the rounding differ, about one weight in 65,536.
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
    assert {s["exp_avg"].dtype for s in own.state.values()} == {torch.float32}
    matrices = [model.up.weight, model.down.weight, model.head.weight]
    assert {p.dtype for p in matrices} == {torch.bfloat16}
    assert model.embed.weight.dtype == model.norm.weight.dtype == torch.float32
    with step.full_masters():
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(model.up.weight, state["up.weight"])


def test_a_skipped_step_and_a_round_trip_leave_every_bit():
    model, optimizer, step = make("split")
    data = batches(3)
    step(*data[0])
    before = model.state_dict()
    with torch.no_grad():
        kept = model.norm.weight.clone()
        model.norm.weight.fill_(float("nan"))
        assert not step(*data[1]).stepped
        model.norm.weight.copy_(kept)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = [step(*batch).loss.item() for batch in data]
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert all(torch.equal(v, saved[0][k]) for k, v in model.state_dict().items())
    assert [step(*batch).loss.item() for batch in data] == losses


def test_small_updates_are_not_lost_in_the_shadow():
    """A weight moves by less than BF16 resolves, many times: the sum arrives."""
    model, optimizer, step = make("split")
    step(*batches(1)[0])
    optimizer.param_groups[0].update(lr=1e-6, weight_decay=0.0)
    before = model.state_dict()["up.weight"]
    for batch in batches(20):
        step(*batch)
    moved = (model.state_dict()["up.weight"] - before).abs()
    assert 1e-6 < moved.median() < 2.1e-5


def test_it_needs_bf16():
    model = Net()
    with pytest.raises(TrainingError, match="MP541"):
        mpcompile(model, "fp16").train_step(optim.SGD(model.parameters(), 0.1), masters="split")


def test_who_else_would_train_split_masters_is_told():
    model, optimizer, step = make("split")
    mp = mpcompile(model, "bf16", backend="eager", low=["up", "down", "head"])
    data = batches(3)
    step(*data[0])
    weights = model.state_dict()
    with pytest.raises(TrainingError, match="MP524"):
        optimizer.step()
    another = mp.train_step(optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TrainingError, match=r"MP522(.|\n)*join_masters"):
        another(*data[1])
    step.join_masters()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert another(*data[1]).stepped
    assert step(*data[2]).stepped
    assert model.up.weight.dtype == torch.bfloat16


def test_evaluation_and_averages_between_steps():
    torch.manual_seed(0)
    model = Net()
    mp = mpcompile(model, "bf16", backend="eager", low=["up", "down", "head"])
    step = mp.train_step(optim.AdamW(model.parameters(), lr=0.01), masters="split")
    mean = optim.swa_utils.AveragedModel(model)
    for batch in batches(3):
        step(*batch)
        with torch.no_grad(), step.full_masters():
            expected = model(*batch)
            mean.update_parameters(model)
        with torch.no_grad():
            torch.testing.assert_close(mp(*batch), expected, rtol=0.01, atol=0.01)
    assert {p.dtype for p in mean.module.parameters()} == {torch.float32}


def test_the_one_graph_of_split_masters_is_the_step():
    (model, _, step), (twin, _, other) = make("split"), make("split")
    data = batches(2)
    step(*data[0])
    other(*data[0])
    emitted, _ = step.emitted()
    with torch.no_grad():
        emitted.module(*emitted.arguments(data[1]))
    other(*data[1])
    state = twin.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
