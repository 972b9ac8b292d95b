"""What users do around a step: other layouts, contexts, tasks, hooks, checkpoints, steps of the optimizer's own."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn, optim
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from mpcompile import laws
from mpcompile.api import mpcompile
from mpcompile.errors import CaptureError, TrainingError
from mpcompile.training.emitted.weave import precision_graph
from mpcompile.training.gradients import specialization as specialization

BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def batches(count, rows=16):
    return [(torch.randn(rows, 12), torch.randint(0, 4, (rows,))) for _ in range(count)]


def make(policy="fp32", model=None, loss=loss_of, backend="eager", optimizer=optim.AdamW, low=(), **options):
    model = model or net()
    own = optimizer(model.parameters(), lr=0.01)
    mp = mpcompile(model, policy, backend=backend, low=list(low))
    return model, own, mp, mp.train_step(own, loss, **options)


def plainly(model, optimizer, *batch, loss=loss_of):
    optimizer.zero_grad()
    loss(model, *batch).backward()
    optimizer.step()


def same(model, twin, tolerance=2e-6):
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


def counts(optimizer):
    return [state["step"].item() for state in optimizer.state_dict()["state"].values()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_any_layout_need_no_graph_of_their_own(backend):
    model, _, _, step = make(backend=backend)
    twin = copy.deepcopy(model)
    other = optim.AdamW(twin.parameters(), lr=0.01)
    y = torch.randint(0, 4, (16,))
    views = [
        torch.randn(16, 12),
        torch.randn(12, 16).t(),
        torch.randn(16, 24)[:, ::2],
        torch.randn(1, 12).expand(16, 12),
    ]
    for x in [*views, torch.randn(20, 12)[4:]]:
        step(x, y)
        plainly(twin, other, x, y)
    same(model, twin)
    assert len(step.specializations) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_convolutional_net_trains_in_both_memory_formats(backend):
    """Inductor lays the gradients of convolutions out as it likes: the update is compiled for what it gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    twin = copy.deepcopy(model)
    other = optim.AdamW(twin.parameters(), lr=0.01)
    _, _, _, step = make(model=model, backend=backend)
    for turn in range(4):
        x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 4, (4,))
        step(x.to(memory_format=torch.channels_last) if turn % 2 else x, y)
        plainly(twin, other, x, y)
    same(model, twin, 1e-5)
    assert len(step.specializations) == 2


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_contexts_around_the_step_change_nothing(policy):
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(40, 4))
    data = [(torch.randn(8, 1, 3, 12), torch.randint(0, 4, (8,))) for _ in range(4)]
    _, _, _, plain = make(policy, copy.deepcopy(conv))
    expected = [plain(*batch) for batch in data]
    contexts = [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
    for context in contexts:
        _, own, _, step = make(policy, copy.deepcopy(conv))
        with context():
            found = [step(*batch) for batch in data[:2]]
        found += [step(*batch) for batch in data[2:]]
        assert all(torch.equal(a.loss, b.loss) for a, b in zip(found, expected, strict=True))
        assert all(torch.equal(a.grad_norm, b.grad_norm) for a, b in zip(found, expected, strict=True))
        copy.deepcopy(own.state_dict())


def test_a_window_may_be_opened_under_inference_mode():
    _, _, _, step = make(accumulate=2)
    data = batches(4)
    with torch.inference_mode():
        step(*data[0])
    assert [bool(step(*batch).stepped) for batch in data[1:]] == [True, False, True]


class TwoTasks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x, y, task):
        return F.cross_entropy(getattr(self, task)(torch.tanh(self.trunk(x))), y)


@pytest.mark.parametrize("kind", [optim.AdamW, optim.NAdam])
def test_two_tasks_with_a_head_each_share_the_trunk_s_counters(kind):
    model, own, _, step = make(model=TwoTasks(), loss=None, optimizer=kind)
    twin = TwoTasks()
    other = kind(twin.parameters(), lr=0.01)
    made = set()
    for turn, (x, y) in enumerate(batches(14)):
        task = "aab"[turn % 3] if turn < 6 else "ab"[turn % 2]
        step(x, y, task)
        plainly(twin, other, x, y, task, loss=lambda model, *batch: model(*batch))
        made |= {id(updater) for updater in step.updates} if turn > 7 else set()
    same(model, twin)
    assert counts(own) == counts(other)
    assert len(made) == len(step.updates) == 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_steps_of_the_optimizer_s_own_may_come_between(policy, fused):
    """The drop-in way and the step, by turns, are one training."""
    losses = {}
    for way in ("drop-in", "both"):
        torch.manual_seed(3)
        low = [] if policy == "fp32" else ["0", "2"]
        _, own, mp, step = make(policy, optimizer=lambda p, lr: optim.AdamW(p, lr=lr, fused=fused), low=low)
        losses[way] = []
        for turn, batch in enumerate(batches(9)):
            if way == "both" and turn % 3 != 1:
                losses[way].append(step(*batch).loss.item())
                continue
            loss = loss_of(mp, *batch)
            own.zero_grad()
            loss.backward()
            own.step()
            losses[way].append(loss.item())
    torch.testing.assert_close(losses["both"], losses["drop-in"], rtol=1e-5, atol=1e-5)


def test_counters_that_part_outside_are_told_apart():
    model, own, _, step = make()
    twin = copy.deepcopy(model)
    other = optim.AdamW(twin.parameters(), lr=0.01)
    data = batches(6)
    for turn, batch in enumerate(data):
        plainly(twin, other, *batch) if turn != 2 else None
        step(*batch) if turn != 2 else None
        if turn == 2:  # one layer alone, by hand
            for m, o in ((model, own), (twin, other)):
                o.zero_grad()
                m[0].weight.grad = torch.ones_like(m[0].weight)
                o.step()
    same(model, twin)
    assert counts(own) == counts(other) == [6, 5, 5, 5, 5, 5]


def test_state_that_is_thrown_away_is_made_anew():
    model, own, _, step = make()
    twin = copy.deepcopy(model)
    other = optim.AdamW(twin.parameters(), lr=0.01)
    for turn, batch in enumerate(batches(9)):
        for o in (own, other):
            if turn == 3:
                o.state.clear()
            if turn == 6:
                o.state = defaultdict(dict)
        step(*batch)
        plainly(twin, other, *batch)
    same(model, twin)


def test_a_parameter_that_is_frozen_for_a_while():
    model, own, _, step = make()
    twin = copy.deepcopy(model)
    other = optim.AdamW(twin.parameters(), lr=0.01)
    for turn, batch in enumerate(batches(9)):
        for m in (model, twin):
            m[0].weight.requires_grad_(turn // 3 != 1)
        step(*batch)
        plainly(twin, other, *batch)
    same(model, twin)
    assert counts(own) == counts(other)


def test_edits_through_data_are_seen_on_a_cpu():
    """Weights clipped by hand (a Wasserstein critic), averages swapped in and out."""
    model, _, _, step = make("bf16", low=["0", "2"])
    batch = batches(1)[0]
    step(*batch)
    for p in model.parameters():
        p.data.clamp_(-0.01, 0.01)
    expected = loss_of(model, *batch).item()
    assert abs(step(*batch).loss.item() - expected) < 1e-3


def test_another_optimizer_s_update_reaches_this_step_s_shadows():
    """Two steps on one model, each with its half of the parameters."""
    model = net()
    mp = mpcompile(model, "bf16", backend="eager", low=["0", "2"])
    first = mp.train_step(optim.SGD(model[:2].parameters(), 0.5), loss_of)
    second = mp.train_step(optim.SGD(model[2:].parameters(), 0.5), loss_of)
    for batch in batches(4):
        first(*batch)
        expected = loss_of(model, *batch).item()
        assert abs(second(*batch).loss.item() - expected) < 0.02 * expected
        with torch.no_grad():
            assert abs(loss_of(mp, *batch).item() - loss_of(model, *batch).item()) < 0.02 * expected


def test_a_compiled_update_raises_the_versions_of_its_masters():
    model, _, _, step = make()
    before = [p._version for p in model.parameters()]
    step(*batches(1)[0])
    assert all(p._version > v for p, v in zip(model.parameters(), before, strict=True))


def test_what_the_model_writes_to_its_input_reaches_the_caller():
    class Model(nn.Linear):
        def forward(self, x, y):
            y[y > 3] = -100
            return F.cross_entropy(super().forward(x.mul_(2.0)), y)

    _, _, _, step = make(model=Model(12, 4), loss=None)
    for x in (torch.ones(16, 12), torch.ones(12, 16).t()):
        y = torch.arange(16) % 6
        result = step(x, y)
        assert result.stepped
        assert x.eq(2).all()
        assert y.max() == 3


@pytest.mark.parametrize("how", ["buffer", "parameter", "closure"])
def test_a_loss_with_tensors_of_its_own(how):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
            self.weight = nn.Parameter(weight) if how == "parameter" else nn.Buffer(weight)

        def forward(self, model, x, y):
            return F.cross_entropy(model(x) * self.weight, y)

    model, twin = net(), net()
    mine, theirs = Weighted(), Weighted()
    own, other = (optim.AdamW([*m.parameters(), *w.parameters()], lr=0.01) for m, w in ((model, mine), (twin, theirs)))
    loss = (lambda model, x, y: mine(model, x, y)) if how == "closure" else mine
    step = mpcompile(model, "fp32", backend="eager").train_step(own, loss)
    for batch in batches(3):
        step(*batch)
        plainly(twin, other, *batch, loss=theirs)
    same(model, twin)
    torch.testing.assert_close(mine.weight, theirs.weight)
    step.report()


def test_the_first_of_a_tuple_is_the_loss():
    class Model(nn.Linear):
        def forward(self, x, y):
            logits = super().forward(x)
            return F.cross_entropy(logits, y), logits

    _, _, _, step = make(model=Model(12, 4), loss=None)
    assert step(*batches(1)[0]).stepped


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


class Bag:
    def __init__(self, x, y):
        self.x, self.y = x, y


@pytest.mark.parametrize("kind", [Pair, Bag])
def test_arguments_that_hide_their_tensors_are_refused(kind):
    _, _, _, step = make(loss=lambda model, pair: F.cross_entropy(model(pair.x), pair.y))
    with pytest.raises(TrainingError, match="MP532"):
        step(kind(*batches(1)[0]))


def test_true_one_and_one_point_zero_are_three_signatures():
    _, _, _, step = make(loss=lambda model, x, y, factor: (model(x).sum() * factor).float())
    for factor in (True, 1, 1.0, True):
        step(*batches(1)[0], factor)
    assert len(step.specializations) == 3


def test_a_number_that_moves_is_told_to_be_a_tensor(monkeypatch):
    monkeypatch.setattr(specialization, "MANY_VALUES", 3)
    _, _, _, step = make(loss=lambda model, x, y, weight: loss_of(model, x, y) * weight)
    batch = batches(1)[0]
    for turn in range(2):
        step(*batch, float(turn))
    with pytest.warns(UserWarning, match="MP533"):
        step(*batch, 2.0)
    assert len(step.specializations) == 3
    for turn in range(4):
        step(*batch, torch.tensor(float(turn)))
    assert len(step.specializations) == 4


def test_sparse_and_missing_gradients_are_clear_errors():
    class Sparse(nn.Embedding):
        def forward(self, x):
            return super().forward(x).sum()

    _, _, _, step = make(model=Sparse(10, 4, sparse=True), loss=None, optimizer=optim.SGD)
    with pytest.raises(TrainingError, match=r"MP521(.|\n)*sparse"):
        step(torch.tensor([1, 2]))
    _, _, _, step = make(loss=lambda model, x, y: loss_of(model, x, y).detach())
    with pytest.raises(TrainingError, match=r"MP522(.|\n)*detached"):
        step(*batches(1)[0])


def test_an_exception_of_the_model_leaves_everything():
    class Model(nn.Linear):
        def forward(self, x, y):
            if x.shape[0] == 3:
                raise ValueError("three is not enough")
            return F.cross_entropy(super().forward(x), y)

    model, own, _, step = make(model=Model(12, 4), loss=None)
    step(*batches(1)[0])
    before = copy.deepcopy((dict(model.state_dict()), own.state_dict(), step.state_dict()))
    with pytest.raises(CaptureError, match="three is not enough"):
        step(*batches(1, 3)[0])
    assert str(before) == str((dict(model.state_dict()), own.state_dict(), step.state_dict()))
    assert step(*batches(1)[0]).stepped


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.blocks, self.head, self.reentrant = nn.ModuleList(net()[:2] for _ in range(1)), nn.Linear(32, 4), reentrant

    def forward(self, x, y):
        for block in self.blocks:
            body = nn.Sequential(block, nn.Dropout(0.3))
            x = body(x) if self.reentrant is None else checkpoint(body, x, use_reentrant=self.reentrant)
        return F.cross_entropy(self.head(x), y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_reach_the_partitioner_and_train_all(reentrant):
    found = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        model, own, _, step = make(model=Checkpointed(kind), loss=None)
        torch.manual_seed(1)
        found.append([step(*batch).loss.item() for batch in batches(3)])
        assert len(own.state_dict()["state"]) == len(list(model.parameters()))
    assert found[0] == found[1]
    (made,) = step.specializations._exact.values()
    tags = [n for n in made.joint.module.graph.nodes if n.meta.get("recompute") is CheckpointPolicy.PREFER_RECOMPUTE]
    assert any("relu" in n.name for n in tags)
    assert not any(n.meta.get("recompute") and "log_softmax" in n.name for n in made.joint.module.graph.nodes)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_graph_follows_an_optimizer_s_loaded_state(accumulate):
    _, own, _, step = make(accumulate=accumulate)
    data = batches(2 * accumulate)
    for batch in data[:accumulate]:
        step(*batch)
    assert step.graph is step.graph
    own.load_state_dict(copy.deepcopy(own.state_dict()))
    emitted, _ = step.emitted()
    live = {id(value) for state in own.state.values() for value in state.values()}
    assert {id(held) for held in emitted.inputs} & live
    if accumulate == 1:
        with torch.no_grad():
            emitted.module(*emitted.arguments(data[1]))
        assert counts(own) == [2] * 6


def test_a_teacher_may_be_an_argument_or_of_the_loss():
    torch.manual_seed(1)
    teacher = nn.Linear(12, 4).requires_grad_(False)

    def distil(model, x, y, teacher):
        with torch.no_grad():
            aim = teacher(x).softmax(-1)
        return F.cross_entropy(model(x), aim)

    model, _, _, step = make(loss=distil)
    twin = copy.deepcopy(model)
    other = optim.AdamW(twin.parameters(), lr=0.01)
    for x, y in batches(3):
        step(x, y, teacher)
        plainly(twin, other, x, y, teacher, loss=distil)
    same(model, twin)
    assert len(step.specializations) == 1


def test_a_gan_of_two_steps():
    def nets():
        torch.manual_seed(0)
        return (nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12)),
                nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1)))  # fmt: skip

    def judge(d, g, x, z):
        return F.softplus(-d(x)).mean() + F.softplus(d(g(z).detach())).mean()

    def fool(g, d, z):
        return F.softplus(-d(g(z))).mean()

    (g, d), (g2, d2) = nets(), nets()
    own = [optim.Adam(m.parameters(), 0.01) for m in (g, d)]
    other = [optim.Adam(m.parameters(), 0.01) for m in (g2, d2)]
    on_g = mpcompile(g, "fp32", backend="eager").train_step(own[0], lambda g, z: fool(g, d, z))
    on_d = mpcompile(d, "fp32", backend="eager").train_step(own[1], lambda d, x, z: judge(d, g, x, z))
    for _ in range(5):
        x, z = torch.randn(6, 12), torch.randn(6, 4)
        on_d(x, z)
        on_g(z)
        plainly(d2, other[1], g2, x, z, loss=judge)
        plainly(g2, other[0], d2, z, loss=fool)
    same(g, g2, 1e-5)
    same(d, d2, 1e-5)


@pytest.mark.slow
def test_a_checkpointed_transformer_keeps_less_and_learns_the_same():
    import architectures

    losses, kept = [], []
    for on in (False, True):
        torch.manual_seed(0)
        model, batch = architectures.gpt2()
        if on:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        _, _, _, step = make("bf16", model.train(), loss=None, backend="inductor")
        losses.append([step(**batch).loss.item() for _ in range(3)])
        (made,) = step.specializations._exact.values()
        kept.append(sum(bool(n.meta.get("recompute")) for n in made.joint.module.graph.nodes))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)
    assert kept[0] == 0 < kept[1]


def test_a_loss_module_s_mode_is_part_of_the_signature():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, model, x, y):
            return F.cross_entropy(self.drop(model(x)), y)

    noisy = Noisy()
    _, _, _, step = make(loss=noisy)
    step(*batches(1)[0])
    noisy.eval()
    step(*batches(1)[0])
    assert len(step.specializations) == 2


def test_a_ddp_of_one_process_trains_and_one_inside_of_the_model_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        _, _, _, step = make(model=nn.parallel.DistributedDataParallel(net()))
        assert bool(step(*batches(1)[0]).stepped)
        _, _, _, step = make(model=nn.Sequential(nn.parallel.DistributedDataParallel(net())))
        with pytest.raises(TrainingError, match="MP535"):
            step(*batches(1)[0])
    finally:
        torch.distributed.destroy_process_group()


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(12, 8)

    def forward(self, x, y):
        return ((self.body(x).bfloat16().float() * torch.arange(8.0).exp()).sin().sum(-1) * y).mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_user_s_own_rounding_survives_in_both_directions(backend):
    model, twin = Rounded(), Rounded()
    own, other = (optim.SGD(m.parameters(), 1.0) for m in (model, twin))
    step = mpcompile(model, "fp32", backend=backend).train_step(own)
    batch = batches(1)[0]
    step(*batch)
    plainly(twin, other, *batch, loss=lambda model, *batch: model(*batch))
    same(model, twin, 1e-4)


def test_no_gradient_goes_from_fp32_to_low_and_back():
    """A norm by hand that asks for FP32, on a residual stream: torch.export gives the residual its cast, too."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.weight = nn.Linear(12, 48), nn.Linear(48, 12), nn.Parameter(torch.ones(12))

        def forward(self, x):
            h = x.to(torch.float32)
            h = self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            return x + self.down(F.gelu(self.up(h)))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), Block(), Block(), nn.Linear(12, 4))
    _, _, _, step = make("bf16", model, low=["0", "*.up", "*.down", "3", "aten.add"])
    step(*batches(1, 64)[0])
    graph = precision_graph(*step.emitted())
    assert list(laws.breaches(graph)) == []
    assert len(graph.casts()) > 6
    producers = [graph.producer(cast.inputs[0]) for cast in graph.casts()]
    assert not [before for before in producers if before is not None and before.is_cast]


@pytest.mark.slow
def test_what_the_compiler_renames_still_reaches_the_backward() -> None:
    """Inductor's own passes replace saved nodes by others (its online softmax on a GPU does)."""

    def rename(graph: fx.Graph) -> None:
        for node in list(graph.output_node().all_input_nodes):
            with graph.inserting_after(node):
                again = graph.call_function(torch.ops.aten.clone.default, (node,))
            again.meta.update(node.meta)
            graph.output_node().replace_input_with(node, again)

    losses = []
    for custom in (None, rename):
        # Not by monkeypatch: undoing, it would delete the option, and no later test could compile.
        with torch._inductor.config.patch(post_grad_custom_post_pass=custom):
            *_, step = make("bf16", backend="inductor", low=["*"])
            torch.manual_seed(1)
            losses.append([step(*batch).loss.item() for batch in batches(3)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_learning_rate_set_by_a_hook_before_the_step_counts_for_that_step(accumulate: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda opt, *_: opt.param_groups[0].update(lr=opt.param_groups[0]["lr"] + 0.1))
    step = mpcompile(model, "fp32", backend="eager").train_step(
        optimizer, lambda m, x: m(x).square().mean(), accumulate=accumulate
    )
    for rate in (0.1, 0.2):
        x, before = torch.randn(4, 6), model.weight.detach().clone()
        (grad,) = torch.autograd.grad(model(x).square().mean(), [model.weight])
        for _ in range(accumulate):
            step(x)
        torch.testing.assert_close(model.weight.detach(), before - rate * grad, rtol=1e-4, atol=1e-6)


class NamedAfterOperations(nn.Module):
    """A parameter and buffers that are called what torch calls the operations of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.linear = nn.Parameter(torch.full((8,), 0.5)), nn.Parameter(torch.randn(8, 8) / 3)
        self.register_buffer("cos", torch.rand(8))
        self.register_buffer("add", torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x - self.mean, self.linear)
        return (y.cos() * self.cos + self.add).mean()


def test_parameters_and_buffers_may_have_names_of_operations() -> None:
    model, x = NamedAfterOperations(), torch.randn(4, 8)
    model(x).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    mpcompile(model, "bf16,device=free-low", backend="eager").train_step(optimizer)(x)
    assert wanted.keys() == {"mean", "linear"}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], wanted[name], rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_a_norm_s_gradients_are_sums_in_fp32_op_by_op(low: str) -> None:
    """torch's layer_norm on a CPU adds them up in the type of its input."""
    norm, head = nn.LayerNorm(8), nn.Linear(8, 8)
    model, x = nn.Sequential(nn.Linear(8, 8), norm, head), torch.randn(3000, 8)
    mp = mpcompile(model, f"{low},device=free-low", backend="eager")
    mp(x).sum().backward()
    assert any(node.kind == "matmul" and node.precision == low for plan in mp.plans for node in plan.graph)
    assert norm.bias.grad is not None
    torch.testing.assert_close(norm.bias.grad, head.weight.detach().sum(0) * 3000, rtol=0.02, atol=3.0)
