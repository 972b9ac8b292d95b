"""Shadows: cast once per change of the master, never stale, never again per forward."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpcompile import mpcompile
from mpcompile.errors import RuntimeFailure
from mpcompile.shadows.step_shadows import ShadowSet
from mpcompile.shadows.table import SHADOWS, ShadowGroup, ShadowTable


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def casts_during(action: Callable[[], object]) -> int:
    before = SHADOWS.casts
    action()
    return SHADOWS.casts - before


@pytest.fixture
def model() -> nn.Module:
    return net()


def fresh(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a wrapper that has seen nothing of the model's past gives."""
    return mpcompile(copy.deepcopy(model), "bf16", backend="eager", low=["*"])(x)


def wrapped(model: nn.Module) -> nn.Module:
    # low=["*"]: these layers are small enough to be left FP32, which would test nothing.
    return mpcompile(model, "bf16", backend="eager", low=["*"])


def test_microbatches_cast_no_weight(model: nn.Module) -> None:
    mp, x = wrapped(model), torch.randn(8, 64)
    optimizer = torch.optim.SGD(mp.parameters(), lr=0.1)
    for _ in range(2):
        first = casts_during(lambda: mp(x).sum().backward())
        rest = casts_during(lambda: [mp(x).sum().backward() for _ in range(3)])
        assert first == 4, "two weights and two biases"
        assert rest == 0
        optimizer.step()
        optimizer.zero_grad()


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: torch.no_grad()(lambda: m[0].weight.mul_(2))(),
    "data": lambda m: m[0].weight.data.mul_(2),
    "data replaced": lambda m: setattr(m[0].weight, "data", m[0].weight.data * 2),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "load_state_dict assign": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    "parameter replaced": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach() * 2)),
    "copy_": lambda m: torch.no_grad()(lambda: m[0].weight.copy_(torch.ones(64, 64)))(),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_next_forward_sees_an_edit(model: nn.Module, name: str, mode: Callable[[], object]) -> None:
    mp, x = wrapped(model), torch.randn(8, 64)
    with mode():
        mp(x)
    EDITS[name](model)
    with mode():
        torch.testing.assert_close(mp(x), fresh(model, x), rtol=0, atol=0)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_forward_sees_a_step(model: nn.Module, name: str) -> None:
    mp, x = wrapped(model), torch.randn(8, 64)
    optimizer = OPTIMIZERS[name](mp.parameters())
    mp(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(mp(x), fresh(model, x), rtol=0, atol=0)


def test_a_hand_written_step_through_data_is_seen(model: nn.Module) -> None:
    mp, x = wrapped(model), torch.randn(8, 64)
    mp(x).sum().backward()
    for parameter in model.parameters():
        parameter.data -= 0.1 * parameter.grad
        parameter.grad = None
    torch.testing.assert_close(mp(x), fresh(model, x), rtol=0, atol=0)


def test_training_goes_on_after_inference_mode(model: nn.Module) -> None:
    mp, x = wrapped(model), torch.randn(8, 64)
    with torch.inference_mode():
        mp(x)
    mp(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tied_weights_have_one_shadow() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    mp = wrapped(Tied())
    assert casts_during(lambda: mp(torch.randn(8, 64)).sum().backward()) == 1


def test_a_shadow_goes_with_its_master() -> None:
    table = ShadowTable()
    master = nn.Parameter(torch.randn(4))
    table.get(master, torch.bfloat16)
    assert len(table._entries) == 1
    del master
    assert not table._entries


def test_refresh_casts_again_without_a_reason() -> None:
    table, master = ShadowTable(), nn.Parameter(torch.randn(4))
    table.get(master, torch.bfloat16)
    table.refresh([master])
    assert table.casts == 2


def test_gradients_arrive_fp32_on_the_masters(model: nn.Module) -> None:
    wrapped(model)(torch.randn(8, 64)).sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_an_edit_through_data_is_seen_in_every_layout():
    """The sampled elements are views: of a channels_last weight and of a slice with gaps too."""
    for master in (
        nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(6, 40)[:, ::2]),
    ):
        group = ShadowGroup(ShadowTable(), [torch.bfloat16])
        group.get([master])
        master.data.mul_(2.0)
        torch.testing.assert_close(group.get([master])[0], master.detach().bfloat16(), rtol=0, atol=0)


def test_masters_that_changed_together_are_cast_together():
    masters, table = [nn.Parameter(torch.randn(4, 4)) for _ in range(5)], ShadowTable()
    group = ShadowGroup(table, [torch.bfloat16] * 5)
    group.get(masters)
    assert table.casts == 5
    with torch.no_grad():
        for master in masters[:3]:
            master.add_(1.0)
    with Counted() as calls:
        shadows = group.get(masters)
    assert table.casts == 8
    assert calls["_foreach_copy_"] == 1
    assert calls["copy_"] == 1, "all of them at once, to be compared"
    for shadow, master in zip(shadows, masters, strict=True):
        torch.testing.assert_close(shadow, master.detach().bfloat16(), rtol=0, atol=0)


class Counted(TorchDispatchMode):
    """How often each operation was called, by name."""

    def __enter__(self):
        self.calls = Counter()
        super().__enter__()
        return self.calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("change", [
    lambda data: data.to(memory_format=torch.channels_last),
    lambda data: torch.randn(9, *data.shape[1:]),
])  # fmt: skip
def test_a_master_that_lies_otherwise_gets_a_shadow_that_does(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """`module.to` gives a parameter other data: a compiled graph expects the shadow where and as the master is."""
    table, master = ShadowTable(), nn.Parameter(torch.randn(8, 4, 3, 3))
    groups = [ShadowGroup(table, [torch.bfloat16]) for _ in range(2)]
    first = [group.get([master])[0] for group in groups]
    master.data = change(master.data)
    second = [group.get([master])[0] for group in groups]
    assert second[0] is second[1] is not first[0]
    assert (second[0].shape, second[0].stride(), second[0].device) == (master.shape, master.stride(), master.device)
    torch.testing.assert_close(second[0], master.detach().bfloat16(), rtol=0, atol=0)


def test_a_model_laid_out_otherwise_after_a_call_runs() -> None:
    model, x = nn.Conv2d(8, 16, 3), torch.randn(2, 8, 8, 8)
    mp = mpcompile(model, "bf16", low=["*"])
    mp(x)
    model.to(memory_format=torch.channels_last)
    got = mp(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, model(x), rtol=0.02, atol=0.02)


def swapped(weight: torch.Tensor) -> None:
    weight.data = weight.data + 1.0


EDITED_IN_PLACE: dict[str, Callable[[torch.Tensor], object]] = {
    "one element": lambda w: w.data.view(-1)[w.numel() // 3].add_(1.0),
    "the least that the shadow shows": lambda w: w.data[5, 7].mul_(1.01),
    "the sign of zero": lambda w: w.data[3, 4:6].mul_(-1.0),
    "a row": lambda w: w.data[w.shape[0] // 2].zero_(),
    "a channel": lambda w: w.data[:, 11].zero_(),
    "two rows swapped": lambda w: w.data.copy_(w.data[[1, 0, *range(2, w.shape[0])]]),
    "two elements swapped": lambda w: w.data[2].copy_(w.data[2].flip(0)),
    "two by two negated": lambda w: w.data[4:6, 8:12].neg_(),
    "all negated": lambda w: w.data.neg_(),
    "one up, one down": lambda w: w.data[9, :2].add_(torch.tensor([1.0, -1.0])),
    "through numpy": lambda w: w.detach().numpy().__setitem__((7, 7), 3.0),
    "another way around": lambda w: w.data.copy_(w.data.flip(0, 1)),
    "not a number": lambda w: w.data[8, 8].fill_(float("nan")),
    "swapped in": swapped,
}
SHAPES = {"small": (40, 24), "a piece": (512, 256), "many pieces": (600, 512), "odd": (333, 401)}


@pytest.mark.parametrize("user", ["drop-in", "step"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("edit", EDITED_IN_PLACE)
def test_every_edit_of_elements_is_seen_on_a_cpu(edit: str, shape: str, user: str) -> None:
    """Beside masters that stay, of which none is cast again."""
    torch.manual_seed(0)
    masters = [nn.Parameter(torch.randn(SHAPES[shape])) for _ in range(5)]
    with torch.no_grad():
        masters[2][3, 4:6] = 0.0
    group, step = ShadowGroup(SHADOWS, [torch.bfloat16] * 5), ShadowSet()

    def ask() -> list[torch.Tensor]:
        if user == "drop-in":
            return group.get(masters)
        step.bring_up_to_date()
        return [step.get(master, torch.bfloat16) for master in masters]

    ask()
    assert casts_during(ask) == 0
    EDITED_IN_PLACE[edit](masters[2])
    assert casts_during(ask) == 1
    assert all(map(same_bits, masters, ask()))
    assert casts_during(ask) == 0


def same_bits(master: torch.Tensor, shadow: torch.Tensor) -> bool:
    return torch.equal(master.detach().bfloat16().view(torch.int16), shadow.view(torch.int16))


@pytest.mark.parametrize("lay", [
    lambda t: t.t(), lambda t: t[:, ::2], lambda t: t.view(20, 3, 8, 2).contiguous(memory_format=torch.channels_last),
    lambda t: t[:1, :1], lambda t: t.new_empty(0), lambda t: t.view(-1)[0],
], ids=["transposed", "gaps", "channels_last", "one", "none", "scalar"])  # fmt: skip
def test_every_layout_is_compared(lay: Callable[[torch.Tensor], torch.Tensor]) -> None:
    masters = [nn.Parameter(lay(torch.randn(40, 24))), nn.Parameter(torch.randn(8))]
    group = ShadowGroup(ShadowTable(), [torch.bfloat16] * 2)
    group.get(masters)
    masters[0].data.sub_(2.0)
    assert same_bits(masters[0], group.get(masters)[0])
    assert same_bits(masters[1], group.get(masters)[1])


def test_a_step_sees_an_update_that_is_edited_and_leaves_its_own_alone(model: nn.Module) -> None:
    step = wrapped(model).train_step(torch.optim.AdamW(model.parameters(), lr=0.01), lambda m, x: m(x).square().mean())
    x = torch.randn(8, 64)
    step(x)
    assert casts_during(lambda: step(x)) == 0
    model[0].weight.data[5].mul_(300.0)
    expected = fresh(model, x).square().mean().item()
    made: list[float] = []
    assert casts_during(lambda: made.append(step(x).loss.item())) == 1
    assert made[0] == pytest.approx(expected, rel=0.01)


def test_a_drop_in_call_between_two_steps_shares_their_shadows(model: nn.Module) -> None:
    mp, x = wrapped(model), torch.randn(8, 64)
    step = mp.train_step(torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x).square().mean())
    for _ in range(2):
        step(x)
        torch.testing.assert_close(mp(x), fresh(model, x), rtol=0, atol=0)
    assert casts_during(lambda: step(x)) == 0


def test_on_other_devices_no_element_is_read_and_a_turn_of_the_grad_mode_casts_again() -> None:
    """Weights are swapped in between training and evaluation; a look at elements would wait for the device."""
    masters, table = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, device="meta"))], ShadowTable()
    group = ShadowGroup(table, [torch.bfloat16] * 2)
    group.get(masters)
    with Counted() as calls:
        group.get(masters)
    assert calls["equal"] == 1
    before = table.casts
    with torch.no_grad():
        group.get(masters)
        group.get(masters)
    assert table.casts == before + 1
    group.get(masters)
    assert table.casts == before + 2


def test_a_weight_beyond_fp16_is_an_error_when_it_arrives(model: nn.Module) -> None:
    mp, x = mpcompile(model, "fp16", backend="eager", low=["*"]), torch.randn(8, 64)
    sound = {name: value.clone() for name, value in model.state_dict().items()}
    assert mp(x).isfinite().all()
    mp.load_state_dict({**sound, "0.bias": torch.full((64,), 70000.0)})
    for _ in range(2):
        with pytest.raises(RuntimeFailure, match=r"MP721(.|\n)*70000"):
            mp(x)
    mp.load_state_dict(sound)
    assert mp(x).isfinite().all()
    mp.load_state_dict({**sound, "0.bias": torch.full((64,), float("inf"))})
    assert not mp(x).isfinite().all(), "an infinity of the user's own is none of ours"
