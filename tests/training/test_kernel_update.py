"""A step whose update runs by our kernels, in Triton's interpreter on a CPU, beside one that runs in ATen's operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton", reason="the kernels are Triton's; torch's CUDA builds bring it")

from mpcompile import LossScale, mpcompile
from mpcompile.runtime.kernels.update import available
from mpcompile.training.optimizer import kernel_update
from mpcompile.training.optimizer.kernel_update import KernelUpdate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not available(DEVICE), reason="needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)"),
    # The interpreter is NumPy, which warns of infinity times 0.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


class Net(nn.Module):
    """A tied weight, a convolution, a norm, and a parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.norm(h + self.conv(h.transpose(1, 2)).transpose(1, 2).tanh() * self.gain)
        return F.linear(h, self.embed.weight)


def loss_fn(model: nn.Module, x: Tensor, factor: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1).float(), x.flatten()) * factor


def groups(model: Net) -> list[dict[str, Any]]:
    first = [model.embed.weight, *model.conv.parameters()]
    return [{"params": first, "lr": 1e-2}, {"params": [*model.norm.parameters(), model.gain]}]


Make = Callable[[Net], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw, groups": lambda m: torch.optim.AdamW(groups(m), lr=1e-3, weight_decay=0.1),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=0.01),
    "sgd, momentum": lambda m: torch.optim.SGD(groups(m), lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.01),
}


class Pair:
    """The same model and optimizer twice: one updated by our kernels, the other in ATen's operations."""

    def __init__(self, make: Make, monkeypatch: pytest.MonkeyPatch, policy: str = "fp16", **options: Any) -> None:
        torch.manual_seed(0)
        self.patch, self.compared = monkeypatch, 0
        self.models = [Net().to(DEVICE)]
        self.models.append(copy.deepcopy(self.models[0]))
        self.optimizers = [make(model) for model in self.models]
        self.steps = [
            mpcompile(model, policy, low=["*"], backend="eager").train_step(optimizer, loss_fn, **options)
            for model, optimizer in zip(self.models, self.optimizers, strict=True)
        ]

    def tensors(self, which: int) -> list[Tensor]:
        """Masters and states, in FP32."""
        model, optimizer = self.models[which], self.optimizers[which]
        states = [optimizer.state.get(p, {}) for p in model.parameters()]
        held = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return [*(t.clone() for t in model.state_dict().values()), *(t.clone() for t in held)]

    def terms(self) -> list[Tensor]:
        """What the next values are sums of beside the gradient: their own size, coupled decay, SGD's buffers."""
        model, optimizer = self.models[1], self.optimizers[1]
        masters, states = [t.abs() for t in model.state_dict().values()], []
        coupled = not isinstance(optimizer, torch.optim.AdamW)
        decay = optimizer.param_groups[0]["weight_decay"] * coupled
        for i, p in enumerate(model.parameters()):
            for key, state in optimizer.state.get(p, {}).items():
                states.append(state.abs() + (decay * masters[i] if key != "step" else 0.0))
                masters[i] = masters[i] + (0.1 * state.abs() if key == "momentum_buffer" else 0.0)
        return [*masters, *states]

    def run(self, factor: float = 1.0) -> list[Any]:
        """One step of both, compared, from one state: rounding errors of earlier steps do not add up."""
        x = torch.randint(0, 12, (2, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        before, results = self.terms(), []
        for which, devices in ((0, {DEVICE}), (1, set[str]())):
            self.patch.setattr(kernel_update, "DEVICES", devices)
            results.append(self.steps[which](x, torch.tensor(factor, device=DEVICE)))
        mine, theirs = self.tensors(0), self.tensors(1)
        assert len(mine) == len(theirs)
        # Not where the step makes the states.
        if len(before) == len(mine):
            self.compared += 1
            for got, want, old in zip(mine, theirs, before, strict=True):
                assert near(got, want, old), (got, want)
        a, b = results
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0, equal_nan=True)
        assert [t.item() for t in (a.finite, a.stepped, a.scale)] == [t.item() for t in (b.finite, b.stepped, b.scale)]
        assert [t.item() for t in self.steps[0].state] == [t.item() for t in self.steps[1].state]
        assert torch.equal(self.steps[0].context.seed, self.steps[1].context.seed)
        self.level()
        return results

    def level(self) -> None:
        """The first pair gets the state of the second."""
        with torch.no_grad():
            self.models[0].load_state_dict(self.models[1].state_dict())
            for p, q in zip(self.models[0].parameters(), self.models[1].parameters(), strict=True):
                for key, state in self.optimizers[1].state[q].items():
                    if isinstance(state, Tensor) and key != "step":
                        self.optimizers[0].state[p][key].copy_(state)

    def by_kernels(self) -> list[bool]:
        """Per step, whether all of its updates run by our kernels."""
        return [all(isinstance(one, KernelUpdate) for one in step.updates) for step in self.steps]


def near(got: Tensor, want: Tensor, before: Tensor) -> bool:
    """Within the kernels' bound (one unit of the terms, four of the change), and as much for ATen's own roundings."""
    terms, change = (want.abs() + before.abs()).float(), (want - before).abs().float()
    top = torch.full_like(terms, float("inf"))
    allowed = (torch.nextafter(terms, top) - terms) + 4 * (torch.nextafter(change, top) - change)
    return bool(((got - want).abs() <= 2 * allowed).all())


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pair]:
    def made(name: str, policy: str = "fp16", **options: Any) -> Pair:
        return Pair(OPTIMIZERS[name], monkeypatch, policy, **options)

    return made


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_skips_clips_and_schedules_as_atens(pair: Callable[..., Pair], name: str) -> None:
    both = pair(name, scale=LossScale.dynamic(init=1024.0, interval=2), max_grad_norm=0.05)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in both.optimizers]
    taken = []
    for factor in (1.0, 1.0, float("inf"), 1.0):
        taken.append(both.run(factor)[0].stepped.item())
        for scheduler in schedulers:
            scheduler.step()
    assert taken == [True, True, False, True]
    assert both.by_kernels() == [True, False]
    # Betas and decay are numbers too.
    for optimizer in both.optimizers:
        optimizer.param_groups[0]["weight_decay"] = 0.3
    made = list(both.steps[0].updates)
    both.run()
    assert list(both.steps[0].updates) == made
    assert both.compared == 4


def test_windows_of_batches(pair: Callable[..., Pair]) -> None:
    both = pair("adamw, groups", accumulate=2, max_grad_norm=1.0, scale=256.0)
    stepped = [both.run(factor)[0].stepped.item() for factor in (1.0, 2.0, 1.0, float("nan"), 1.0, 0.5)]
    assert stepped == [False, True, False, False, False, True]
    assert both.compared == 5
    assert both.by_kernels() == [True, False]


def test_split_masters(pair: Callable[..., Pair]) -> None:
    both = pair("adamw, groups", "bf16", masters="split")
    for factor in (1.0, 1.0, float("inf"), 1.0):
        both.run(factor)
    assert any(p.dtype == torch.bfloat16 for p in both.models[0].parameters())
    assert both.by_kernels() == [True, False]


@pytest.mark.parametrize(
    ("name", "states", "masters"),
    [("adamw, groups", "bf16", "split"), ("adamw, groups", "8bit", "full"), ("sgd, momentum", "8bit", "split")],
)
def test_low_states(pair: Callable[..., Pair], name: str, states: str, masters: str) -> None:
    """From one state each time; a moment between two codes by less than FP32 tells may take either."""
    both = pair(name, "bf16", states=states, masters=masters, max_grad_norm=0.05)
    x = torch.randint(0, 12, (2, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for turn in range(4):
        for which, devices in ((0, {DEVICE}), (1, set[str]())):
            both.patch.setattr(kernel_update, "DEVICES", devices)
            both.steps[which](x, torch.tensor(float("inf") if turn == 2 else 1.0, device=DEVICE))
        for key, value in both.models[1].state_dict().items():
            torch.testing.assert_close(both.models[0].state_dict()[key], value, rtol=1e-5, atol=1e-7)
        mine, theirs = (one.state_dict()["state"] for one in both.optimizers)
        for number, state in theirs.items():
            for key in state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer"}:
                apart = (mine[number][key] - state[key]).abs() > 1e-5 * state[key].abs()
                assert apart.sum() <= 0.02 * apart.numel() + 1
                # A code, of 8 bits, is at most a sixteenth of the greatest apart.
                assert (mine[number][key] - state[key]).abs().max() <= state[key].abs().max() / 16
        held = {v.dtype for s in both.optimizers[0].state.values() for k, v in s.items() if k != "step"}
        assert held <= {torch.bfloat16, torch.int8, torch.uint8}
        both.models[0].load_state_dict(both.models[1].state_dict())
        both.optimizers[0].load_state_dict(copy.deepcopy(both.optimizers[1].state_dict()))
    assert both.by_kernels() == [True, False]


def test_the_emitted_graph_is_atens_and_goes_on_from_the_kernels(pair: Callable[..., Pair]) -> None:
    both = pair("adamw, groups", scale=256.0)
    both.run()
    step = both.steps[0]
    both.patch.setattr(kernel_update, "DEVICES", {DEVICE})
    names = {str(n.target) for n in step.graph.graph.nodes if n.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in")) for name in names if "triton" in name or "update" in name)
    assert "aten.sqrt.default" in names or any("_fused_adamw" in name for name in names)
    x = torch.randint(0, 12, (2, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    factor = torch.tensor(1.0, device=DEVICE)
    before = both.terms()
    emitted = step.emitted()[0]
    with torch.no_grad():
        emitted.module(*emitted.arguments([x, factor]))
    both.patch.setattr(kernel_update, "DEVICES", set())
    both.steps[1](x, factor)
    for got, want, old in zip(both.tensors(0), both.tensors(1), before, strict=True):
        assert near(got, want, old)
    # And the kernels from where the graph left off.
    both.level()
    both.run()
    assert {float(s["step"]) for s in both.optimizers[0].state.values()} == {3.0}


REFUSED: dict[str, Make] = {
    "amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, amsgrad=True),
    "dampening": lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9, dampening=0.1),
    "another": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-3),
    "momentum in one group": lambda m: torch.optim.SGD(
        [{"params": [m.embed.weight, m.gain], "momentum": 0.9}, {"params": [*m.conv.parameters(), *m.norm.parameters()]}], lr=1e-3
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_do_not_have_runs_in_atens_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Pair(REFUSED[name], monkeypatch)
    both.run()
    assert both.by_kernels() == [False, False]


def test_momentum_that_begins_later_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Pair(lambda m: torch.optim.SGD(m.parameters(), lr=1e-2), monkeypatch)
    both.run()
    for optimizer in both.optimizers:
        optimizer.param_groups[0]["momentum"] = 0.9
    for _ in range(2):
        both.run()
    assert both.by_kernels() == [True, False]
    assert both.compared == 2
    assert all("momentum_buffer" in state for state in both.optimizers[0].state.values())
