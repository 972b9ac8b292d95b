"""What is emitted: one graph that is the step, with laws; the fused update; the chunked loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn, optim

from mpcompile import laws
from mpcompile.api import mpcompile
from mpcompile.aten.rewrites import chunked_loss as loss_region
from mpcompile.errors import TrainingError
from mpcompile.training import accumulation as window
from mpcompile.training.emitted.weave import precision_graph
from mpcompile.training.loss_scale.scale import LossScale
from mpcompile.training.optimizer import fused_update as fused

LOW = ("up", "down", "head")


class Tiny(nn.Module):
    """A language model of one block, large enough for low matmuls to pay."""

    def __init__(self, classes=96, width=64):
        super().__init__()
        self.embed, self.norm = nn.Embedding(classes, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, classes, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x, y):
        h = self.embed(x)
        h = h + self.down(nn.functional.gelu(self.up(self.norm(h))))
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


def batches(count):
    return [tuple(torch.randint(0, 96, (16, 32)) for _ in range(2)) for _ in range(count)]


def make(policy="bf16", optimizer=optim.AdamW, backend="eager", low=LOW, **options):
    torch.manual_seed(0)
    model = Tiny()
    own = optimizer(model.parameters(), lr=0.01)
    return model, own, mpcompile(model, policy, backend=backend, low=list(low)).train_step(own, **options)


@pytest.fixture(params=["compiled update", "fused update"])
def update(request, monkeypatch):
    monkeypatch.setattr(fused, "SMALL", 1 if request.param == "fused update" else 1 << 40)
    return request.param


@pytest.mark.parametrize("policy", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_one_graph_is_the_step_bit_for_bit(policy, accumulate, update):
    options = {"accumulate": accumulate, "max_grad_norm": 1.0, "scale": LossScale.dynamic(64.0, interval=2)}
    low = () if policy == "fp32" else LOW
    model, _, step = make(policy, low=low, **options)
    twin, _, other = make(policy, low=low, **options)
    data = batches(2 * accumulate)
    for batch in data[:-1]:
        step(*batch)
        other(*batch)
    with pytest.raises(TrainingError, match="MP542"):
        make(policy, low=low)[2].graph  # noqa: B018
    emitted, joint = step.emitted()
    with torch.no_grad():
        loss, finite, norm, scale = emitted.module(*emitted.arguments(data[-1]))
    result = other(*data[-1])
    assert (loss, finite, norm, scale) == (result.loss, result.finite, result.grad_norm, result.scale)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    graph = precision_graph(emitted, joint)
    assert list(laws.breaches(graph)) == []
    assert {node.phase for node in graph} == {"forward", "backward", "optimizer"}


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_every_node_has_a_verdict_and_a_reason_and_no_weight_is_cast_in_the_forward(policy, update):
    _, _, step = make(policy)
    step(*batches(1)[0])
    report = step.report().to_dict()
    assert all(node["reason"] and node["verdict"] and node["phase"] for node in report["nodes"])
    matmuls = [n for n in report["nodes"] if n["op"] in ("aten.mm.default", "aten.addmm.default")]
    assert matmuls
    if policy == "bf16":
        assert {n["precision"] for n in matmuls} == {"bf16"}
        assert {n["precision"] for n in report["nodes"] if n["phase"] == "optimizer"} <= {"fp32", "keep"}
    if policy == "fp16":
        return  # on a CPU its matmuls compute in FP32: the shadows are widened there
    graph = precision_graph(*step.emitted())
    weights = {v.name for v in graph.values.values() if v.role == "parameter" and len(v.shape) == 2}
    assert not [c for c in graph.casts() if c.inputs[0] in weights and c.phase != "optimizer"]


def test_modules_keep_the_users_names_so_overrides_reach_the_step():
    _, _, step = make(low=("up", "down"))
    step(*batches(1)[0])
    rows = {n["module"] for n in step.report().to_dict()["nodes"]}
    assert {"up", "down", "embed", "head", "norm"} <= rows


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW, optim.SGD, optim.Adagrad])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fused_update_equals_torchs_loop_and_skips_bit_for_bit(kind, accumulate, monkeypatch):
    monkeypatch.setattr(fused, "SMALL", 1)
    model, own, step = make("fp32", kind, low=(), accumulate=accumulate, max_grad_norm=0.5, scale=64.0)
    twin = copy.deepcopy(model)
    other = kind(twin.parameters(), lr=0.01)
    data = batches(3 * accumulate)
    for turn, batch in enumerate(data):
        step(*batch)
        (twin(*batch) / accumulate).backward()
        if (turn + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            other.step()
            other.zero_grad()
        for o in (own, other):
            o.param_groups[0]["lr"] *= 0.9
    assert isinstance(next(iter(step.updates)), fused.FusedUpdate)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    before = copy.deepcopy((model.state_dict(), own.state_dict()["state"]))
    with torch.no_grad():
        model.norm.weight[0] = float("inf")
    assert not [step(*batch) for batch in data[:accumulate]][-1].stepped
    after = own.state_dict()["state"]
    assert all(torch.equal(v, after[p][k]) for p, s in before[1].items() for k, v in s.items() if torch.is_tensor(v))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before[0].items() if k != "norm.weight")


def test_a_fused_update_follows_other_numbers_and_gives_way_when_they_keep_moving(monkeypatch):
    monkeypatch.setattr(fused, "SMALL", 1)
    model, own, step = make("fp32", low=())
    twin = copy.deepcopy(model)
    other = optim.AdamW(twin.parameters(), lr=0.01)
    for turn, batch in enumerate(batches(6)):
        for o in (own, other):
            o.param_groups[0]["weight_decay"] = 0.1 * turn
        step(*batch)
        other.zero_grad()
        twin(*batch).backward()
        other.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert not isinstance(next(iter(step.updates)), fused.FusedUpdate)


@pytest.mark.parametrize("room", [1 << 20, 100])
def test_channels_last_weights_reach_the_fused_kernel_as_they_lie(room, monkeypatch):
    """The kernel goes by address: whole, and in pieces of the slowest dimension in memory."""
    monkeypatch.setattr(fused, "SMALL", 1)
    monkeypatch.setattr(fused, "BUCKET_ELEMENTS", {"cpu": room})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 1)).to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    twin = copy.deepcopy(model)
    own, other = optim.AdamW(model.parameters()), optim.AdamW(twin.parameters(), foreach=False)
    step = mpcompile(model, "fp32", backend="eager").train_step(own, lambda m, x: m(x).square().mean())
    for turn in range(3):
        torch.manual_seed(turn)
        x = torch.randn(2, 4, 4, 4)
        step(x)
        twin(x).square().mean().backward()
        other.step()
        other.zero_grad()
    assert isinstance(next(iter(step.updates)), fused.FusedUpdate)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert model[0].weight.stride() == twin[0].weight.stride()


@pytest.mark.parametrize("policy", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_chunked_loss_gives_the_same_gradients(policy, scale, monkeypatch):
    results = []
    monkeypatch.setattr(loss_region, "chunk_count", lambda rows, width: 3)
    for chunks in (True, False):
        monkeypatch.setattr(loss_region, "WORTH_BYTES", 1 << 10)
        low = () if policy == "fp32" else LOW
        model, _, step = make(policy, optim.SGD, scale=scale, chunk_loss=chunks, low=low)
        x, y = batches(1)[0]
        y[0, :9] = -100
        result = step(x, y)
        graph = next(iter(step.specializations._exact.values())).joint.forward.module.graph
        assert bool(graph.find_nodes(op="call_function", target=loss_region.chunked_loss)) == chunks
        results.append((result, dict(model.named_parameters())))
    (mine, weights), (whole, others) = results
    torch.testing.assert_close(mine.loss, whole.loss)
    torch.testing.assert_close(mine.grad_norm, whole.grad_norm, rtol=1e-3, atol=1e-6)
    for name, weight in others.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("rows", "width"), [(1024, 384), (16384, 768), (8192, 2048), (64, 4096)])
def test_the_number_of_chunks_holds_the_fewest_bytes(rows, width):
    def held(chunks):
        return (chunks - 1) * width + 2 * rows / chunks  # elements per class

    best = min(range(2, loss_region.MOST + 1), key=held)
    assert held(loss_region.chunk_count(rows, width)) <= 1.02 * held(best)


def test_chunked_loss_as_one_term_of_a_sum(monkeypatch):
    monkeypatch.setattr(loss_region, "WORTH_BYTES", 1 << 10)
    model, _, step = make("fp32", optim.SGD, low=(), loss_fn=lambda m, x, y: 3.0 * m(x, y) + m.norm.weight.sum())
    twin = copy.deepcopy(model)
    x, y = batches(1)[0]
    step(x, y)
    (3.0 * twin(x, y) + twin.norm.weight.sum()).backward()
    optim.SGD(twin.parameters(), lr=0.01).step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_trains_as_autocast_does(policy):
    """Over 20 steps the losses stay within what autocast's own differ from FP32 by, and a bit."""
    model, _, step = make(policy, low=())
    twin, exact = copy.deepcopy(model), copy.deepcopy(model)
    dtype = torch.bfloat16 if policy == "bf16" else torch.float16
    data = batches(2) * 10
    losses = {"ours": [step(*batch).loss.item() for batch in data]}
    for name, m, cast in (("autocast", twin, True), ("fp32", exact, False)):
        other, losses[name] = optim.AdamW(m.parameters(), lr=0.01), []
        for batch in data:
            with torch.autocast("cpu", dtype, enabled=cast and policy == "bf16"):
                loss = m(*batch)
            other.zero_grad()
            loss.backward()
            other.step()
            losses[name].append(loss.item())
    mine, theirs, best = (torch.tensor(losses[k]) for k in ("ours", "autocast", "fp32"))
    assert (mine - best).abs().max() <= 2 * (theirs - best).abs().max() + 0.02
    assert mine[-1] < 0.5 * mine[0]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_weights_larger_than_the_buffer_are_updated_in_pieces(kind, clip, monkeypatch):
    """A buffer of 300 elements: every weight in several pieces, whose counters count once; equal to one large buffer."""
    monkeypatch.setattr(fused, "SMALL", 1)
    runs = []
    for room in (300, 1 << 20):
        monkeypatch.setattr(fused, "BUCKET_ELEMENTS", {"cpu": room})
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        optimizer = kind(model.parameters(), lr=0.05, fused=True)
        step = mpcompile(model, "fp16", backend="eager").train_step(
            optimizer, lambda m, x: m(x).square().mean(), max_grad_norm=clip
        )
        results = [step(torch.full((4, 32), 0.1 * i)) for i in range(1, 4)]
        updater = next(iter(step.updates))
        runs.append((len(updater.path.buckets), results, model.state_dict(), optimizer.state_dict()["state"]))
    (many, small, weights, states), (one, large, other_weights, other_states) = runs
    assert many > 10
    assert one == 1
    for a, b in zip(small, large, strict=True):
        assert a.loss == b.loss
        torch.testing.assert_close(a.grad_norm, b.grad_norm)
    exact = {"rtol": 0, "atol": 0} if clip is None else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(weights, other_weights, **exact)
    torch.testing.assert_close(states, other_states, **exact)


def test_bytes_kept_for_the_backward_grow_with_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    step = mpcompile(model, "bf16", low=["0", "2"], dynamic=False).train_step(
        optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x).square().mean()
    )
    with pytest.raises(TrainingError, match="MP542"):
        step.saved_bytes  # noqa: B018
    kept = []
    for rows in (16, 32):
        step(torch.randn(rows, 64))
        kept.append(step.saved_bytes)
    (small, _), (large, single) = kept
    assert large == 2 * small
    assert large >= 32 * (64 + 256) * 2, "the operands of both products, in BF16"
    assert single < large / 2
    assert step.compile_seconds > 0


@pytest.mark.parametrize("piece", [1 << 18, 100])
def test_a_window_sums_tied_absent_and_large_gradients(piece, monkeypatch):
    """Against plain sums: a tied weight with two gradients, one that a microbatch leaves out, pieces of rows."""
    monkeypatch.setattr(window, "PIECE", piece)
    torch.manual_seed(0)
    parameters = {"tied": torch.zeros(30, 20), "bias": torch.zeros(7), "late": torch.zeros(5, 6)}
    order = [id(p) for p in parameters.values()]
    whole = (("tied", torch.bfloat16), ("bias", torch.float32), ("tied", torch.float32), ("late", torch.bfloat16))
    summed = window.GradAccumulator(3, low=False)
    for _ in range(2):  # the second window starts over the sums of the first
        expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for layout in (whole[:3], whole, whole[:3]):
            grads = [torch.randn_like(parameters[name]).to(dtype) for name, dtype in layout]
            if layout not in summed:
                summed.prepare(layout, parameters, order)
            summed.add(layout, grads)
            summed.count += 1
            for (name, _), grad in zip(layout, grads, strict=True):
                expected[name] += grad
        assert summed.full
        summed.count = 0
        torch.testing.assert_close(summed.sums, expected)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_gradient_of_a_sum_reaches_the_fused_update(backend, monkeypatch):
    """Autograd gives it expanded: one element, shown everywhere."""
    monkeypatch.setattr(fused, "SMALL", 1)
    model = nn.Linear(8, 8)
    before = model.weight.detach().clone()
    step = mpcompile(model, "bf16", backend=backend).train_step(
        optim.SGD(model.parameters(), lr=0.5, fused=True), lambda m, x: m.weight.sum() + (m.bias * x).sum()
    )
    assert step(torch.randn(2, 8)).finite
    assert isinstance(next(iter(step.updates)), fused.FusedUpdate)
    torch.testing.assert_close(model.weight, before - 0.5)
