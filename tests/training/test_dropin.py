"""`mpcompile(model)` called like the model: what real models do must survive the rewrite, eager and compiled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpcompile import MPCompileError, mpcompile

WIDTH = 64
BACKENDS = ["eager", "inductor"]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        # Not the true derivative: shows that the user's backward ran.
        return 3 * grad


@dataclass
class Result:
    loss: torch.Tensor
    extra: torch.Tensor


class Body(nn.Module):
    """A layer before and after the thing under test, so that it lies between low regions."""

    def __init__(self, middle: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.batch = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self, self.first(x))).float().square().mean()


def _views(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x.view(-1, 4, WIDTH // 4)
    y[:, 0] = 1.0
    x[:, :2].add_(1.0)
    return x


def _no_grad(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = x.abs().mean()
    return x / (scale + 1)


def _autocast_region(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return x.float() @ m.last.weight.float()


def _break(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return torch.relu(x)


def _filled(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out.copy_(x)
    return out


MIDDLES: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "in-place relu": lambda m, x: F.relu_(x),
    "in-place on views": _views,
    "batch norm": lambda m, x: m.batch(x),
    "layer norm": lambda m, x: m.norm(x),
    "checkpoint": lambda m, x: checkpoint(lambda y: F.gelu(m.last(y)), x, use_reentrant=False),
    "custom function": lambda m, x: Square.apply(x),
    "autocast region": _autocast_region,
    "no grad": _no_grad,
    "new tensor filled": _filled,
    "vmap": lambda m, x: torch.vmap(lambda row: torch.tanh(m.norm(row)))(x),
    "gradient inside": lambda m, x: torch.func.grad(lambda y: torch.tanh(y).sum())(x) + x,
    "graph break": _break,
    "explicit float": lambda m, x: (x.float() * 3).to(x.dtype),
    "explicit low": lambda m, x: x.to(torch.bfloat16).to(torch.float32),
    "cumsum": lambda m, x: x.cumsum(0),
    "softmax": lambda m, x: x.softmax(-1),
    "fp64 branch": lambda m, x: (x.double() * 2).float(),
    "integers": lambda m, x: x.gather(1, torch.arange(WIDTH).flip(0).expand(x.shape[0], WIDTH)) + x.argmax(1).sum() * 0,
    "mask": lambda m, x: x.masked_fill(torch.arange(WIDTH) % 3 == 0, torch.finfo(torch.float32).min).clamp(min=-10),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    reference = Body(MIDDLES[name])
    return reference, copy.deepcopy(reference)


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
@pytest.mark.parametrize("name", MIDDLES)
def test_forward_and_gradients_are_near_fp32(name: str, policy: str) -> None:
    reference, model = pair(name)
    mp = mpcompile(model, policy, backend="eager", low=["*first", "*last"])
    check(reference, model, mp, torch.randn(16, WIDTH))


@pytest.mark.parametrize(
    "name",
    ["in-place on views", "batch norm", "checkpoint", "custom function", "graph break", "no grad", "gradient inside"],
)
def test_compiled_is_near_fp32(name: str) -> None:
    reference, model = pair(name)
    mp = mpcompile(model, "bf16", low=["*first", "*last"])
    check(reference, model, mp, torch.randn(16, WIDTH))


def check(reference: nn.Module, model: nn.Module, mp: nn.Module, x: torch.Tensor) -> None:
    expected, got = reference(x), mp(x)
    expected.backward()
    got.backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)
    # Against the norm of all gradients: a bias in front of a normalization has none but rounding.
    whole = torch.cat([b.grad.flatten() for b in reference.parameters() if b.grad is not None]).norm()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            error = (a.grad - b.grad).norm() / whole
            assert error < 0.05, f"{name}: {error:.3f}"
    for (name, a), b in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02, msg=name)
        assert a.dtype == b.dtype


def test_the_wrapper_has_the_model_s_names() -> None:
    model = Body(MIDDLES["layer norm"])
    mp = mpcompile(model, "bf16")
    assert list(mp.state_dict()) == list(model.state_dict())
    assert [id(p) for p in mp.parameters()] == [id(p) for p in model.parameters()]
    assert mp.first is model.first


def test_train_and_eval_switch() -> None:
    class Drop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(self.fc(x), 0.5, self.training)

    mp, x = mpcompile(Drop(), "bf16", backend="eager"), torch.randn(32, WIDTH)
    assert (mp(x) == 0).float().mean() > 0.3
    mp.eval()
    assert (mp(x) == 0).float().mean() < 0.05
    mp.train()
    assert (mp(x) == 0).float().mean() > 0.3


@pytest.mark.parametrize("backend", BACKENDS)
def test_dataclass_and_dict_outputs_and_keyword_arguments(backend: str) -> None:
    class Rich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> tuple[Result, dict[str, torch.Tensor]]:
            y = self.fc(x) * scale
            return Result(y.sum(), y), {"y": y, "index": y.argmax(1)}

    mp = mpcompile(Rich(), "bf16", backend=backend, low=["fc"])
    result, named = mp(torch.randn(8, WIDTH), scale=torch.tensor(2.0))
    assert isinstance(result, Result)
    assert named["y"].dtype == torch.float32
    assert named["index"].dtype == torch.int64


def test_changing_batch_sizes_do_not_recompile_each_time() -> None:
    mp = mpcompile(Body(MIDDLES["layer norm"]), "bf16", backend="eager")
    for size in (8, 9, 10, 11, 12, 13):
        mp(torch.randn(size, WIDTH))
    assert len(mp.plans) <= 2


def test_lora_adapters_train_on_a_frozen_half_base() -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(WIDTH, WIDTH).to(torch.bfloat16).requires_grad_(False)
            self.down, self.up = nn.Linear(WIDTH, 16, bias=False), nn.Linear(16, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            low = x.to(torch.bfloat16)
            return self.base(low).float() + self.up(self.down(x))

    model = Lora()
    before = model.base.weight.clone()
    mp = mpcompile(model, "bf16", backend="eager", low=["down", "up"])
    optimizer = torch.optim.AdamW([p for p in mp.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(32, WIDTH), torch.randn(32, WIDTH)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(mp(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(before, model.base.weight)
    assert model.base.weight.dtype == torch.bfloat16


def test_double_backward_works_op_by_op() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    mp, x = mpcompile(model, "bf16", backend="eager", low=["*"]), torch.randn(8, WIDTH, requires_grad=True)
    (gradient,) = torch.autograd.grad(mp(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.abs().sum() > 0


def test_double_backward_of_a_compiled_graph_is_a_clear_error() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    mp, x = mpcompile(model, "bf16"), torch.randn(8, WIDTH, requires_grad=True)
    with pytest.raises(MPCompileError, match="MP701"):
        torch.autograd.grad(mp(x).sum(), x, create_graph=True)


def test_grad_scaler_skips_an_overflow_and_goes_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    mp = mpcompile(model, "fp16", backend="eager", low=["*"])
    optimizer = torch.optim.SGD(mp.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    x, target = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    scales, losses = [], []
    for _ in range(30):
        loss = F.mse_loss(mp(x), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(mp.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        losses.append(loss.item())
    assert scales[0] < 2.0**30, "the first steps must overflow FP16"
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(p).all() for p in mp.parameters())


def test_two_models_with_two_optimizers() -> None:
    torch.manual_seed(0)
    a, b = (mpcompile(nn.Linear(WIDTH, WIDTH), "bf16", backend="eager", low=["*"]) for _ in range(2))
    first, second = torch.optim.SGD(a.parameters(), lr=0.1), torch.optim.Adam(b.parameters(), lr=0.01)
    x = torch.randn(8, WIDTH)
    before = b.weight.detach().clone()
    a(b(x)).square().mean().backward()
    first.step()
    assert torch.equal(before, b.weight)
    second.step()
    assert not torch.equal(before, b.weight)


def test_the_user_s_own_rounding_survives_the_compiler() -> None:
    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.bfloat16).to(torch.float32) * self.scale

    x = torch.randn(256)
    got = mpcompile(Rounds(), "bf16")(x)
    assert torch.equal(got, x.to(torch.bfloat16).float())


@pytest.mark.fp32_products
def test_the_compiled_backward_of_fp32_regions_equals_the_eager_one() -> None:
    torch.manual_seed(0)
    # Operations whose arithmetic the compiler does not reorder: what is left to differ is precision.
    reference = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Hardtanh())
    grads = []
    for backend in BACKENDS:
        model = copy.deepcopy(reference)
        with torch.autocast("cpu", torch.bfloat16):  # an ambient autocast must not reach the graph's backward
            loss = mpcompile(model, "bf16", backend=backend, keep_fp32=["*"])(torch.ones(4, WIDTH)).sum()
        loss.backward()
        grads.append(model[0].weight.grad)
    assert torch.equal(grads[0], grads[1])


BAD_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "half masters": (lambda: nn.Linear(4, 4).half(), "MP103"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "MP104"),
    "not a model": (lambda: 3, "MP105"),
}


class Distance(nn.Module):
    """A loss of two products, without a parameter of its own."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b).square().mean()


def test_a_module_without_parameters_is_taken() -> None:
    mp = mpcompile(Distance(), "bf16", low=["aten.matmul"], backend="eager")
    a, b = torch.randn(8, 16, requires_grad=True), torch.randn(16, 8)
    mp(a, b).backward()
    assert {node.precision for node in mp.report().graph if node.kind == "matmul"} == {"bf16"}
    (wanted,) = torch.autograd.grad(Distance()(a, b), a)
    assert a.grad is not None
    assert (a.grad - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_a_bound_beyond_the_low_type_bounds_nothing(low: str) -> None:
    class Bounded(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            lowest = torch.finfo(torch.float32).min
            return F.hardtanh(super().forward(x).clamp(min=lowest), lowest, 0.5)

    torch.manual_seed(0)
    model, x = Bounded(8, 8), torch.randn(4, 8)
    mp = mpcompile(model, f"low={low}", low=["*"], backend="eager")
    torch.testing.assert_close(mp(x), model(x), rtol=0.02, atol=0.02)
    step = mp.train_step(torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x).mean())
    step(x)  # the default scale overflows where even the mean is FP16
    assert step(x).stepped.item()


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_clear_errors(name: str) -> None:
    make, code = BAD_MODELS[name]
    with pytest.raises(MPCompileError, match=code):
        mpcompile(make())


@pytest.mark.parametrize(("options", "code"), [({"policy": "fp17"}, "MP201"), ({"backend": "tensorrt"}, "MP204")])
def test_bad_options_are_clear_errors(options: dict[str, Any], code: str) -> None:
    with pytest.raises(MPCompileError, match=code):
        mpcompile(nn.Linear(4, 4), **options)


def test_an_unmatched_glob_names_near_ones_and_leaves_the_model() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception, match="MP203"):
        mpcompile(model, "bf16", keep_fp32=["decoder.*"], backend="eager")(torch.randn(2, WIDTH))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_models_do_not_make_each_other_s_sizes_symbolic() -> None:
    shapes = set()
    for size in (8, 9):
        mp = mpcompile(nn.Linear(WIDTH, WIDTH), "bf16", backend="eager")
        mp(torch.randn(size, WIDTH))
        shapes |= {v.shape for v in mp.plans[0].graph.values.values() if v.role == "input"}
    assert shapes == {(8, WIDTH), (9, WIDTH)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_that_changes_from_call_to_call_is_an_input(backend: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
            return (self.fc(x) * scale + scale).sum(1)

    model, x = Scaled(), torch.randn(8, WIDTH)
    mp = mpcompile(model, "bf16", backend=backend, low=["fc"])
    for scale in (0.5, 0.7, 0.9, 1.1):
        got = mp(x, scale)
        got.sum().backward()
        torch.testing.assert_close(got, model(x, scale), rtol=0.03, atol=0.1)
    assert len(mp.plans) == 2, "one for the first number, one for all others"


def test_a_number_that_must_be_known_costs_a_graph_each() -> None:
    class Drop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor, p: float) -> torch.Tensor:
            return F.dropout(self.fc(x), p)

    mp = mpcompile(Drop(), "bf16", backend="eager", low=["fc"])
    for p in (0.2, 0.5, 0.8, 0.5):
        assert abs((mp(torch.randn(64, WIDTH), p) == 0).float().mean() - p) < 0.1
    assert len(mp.plans) == 3


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda mp: pickle.loads(pickle.dumps(mp))], ids=["copy", "pickle"])
def test_a_copy_has_its_own_weights_and_goes_on(way: Callable[[Any], Any]) -> None:
    mp, x = mpcompile(small(), "bf16", backend="eager", low=["*"]), torch.randn(4, WIDTH)
    before = mp(x)
    twin = way(mp)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
    assert torch.equal(mp(x), before)
    assert not torch.equal(twin(x), before)


def test_an_average_of_weights_is_evaluated_in_mixed_precision() -> None:
    mp, x = mpcompile(small(), "bf16", backend="eager", low=["*"]), torch.randn(4, WIDTH)
    mp(x)
    average = torch.optim.swa_utils.AveragedModel(mp)
    for _ in range(2):
        with torch.no_grad():
            mp[0].weight.add_(0.1)
        average.update_parameters(mp)
    torch.testing.assert_close(average(x), average.module.model(x), rtol=0.03, atol=0.03)


def test_a_compiled_parent_and_a_second_wrapping_do_not_hide_it() -> None:
    model, x = small(), torch.randn(4, WIDTH)
    inner = mpcompile(model, "bf16", backend="eager", low=["*"])
    parent = torch.compile(nn.Sequential(inner, nn.Linear(WIDTH, 1)), backend="eager")
    parent(x).sum().backward()
    assert inner.plans
    again = mpcompile(inner, "fp16", backend="eager", low=["*"])
    assert again.model is model
    torch.testing.assert_close(again(x), model(x), rtol=0.01, atol=0.01)


def test_a_method_that_calls_the_model_past_the_wrapper_says_so() -> None:
    class Generates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

        def generate(self, x: torch.Tensor) -> torch.Tensor:
            return self(self(x))

        def width(self) -> int:
            return self.fc.in_features

    mp = mpcompile(Generates(), "bf16", backend="eager")
    assert mp.width() == WIDTH
    with pytest.warns(UserWarning, match=r"generate\(\) .* its 2 calls of the model ran as written, in FP32"):
        mp.generate(torch.randn(2, WIDTH))
    x = torch.randn(2, WIDTH)
    with mp.taking_calls():
        taken = mp.generate(x)
    torch.testing.assert_close(taken, mp(mp(x)), rtol=0, atol=0)
    assert not torch.equal(taken, mp.model(mp.model(x)))
    with pytest.warns(UserWarning, match="in FP32"):
        assert torch.equal(mp.generate(x), mp.model(mp.model(x)))


@pytest.mark.parametrize("overrides", [[3], 3, [None]])
def test_an_override_of_another_type_is_a_clear_error(overrides: Any) -> None:
    with pytest.raises(MPCompileError, match="MP203"):
        mpcompile(small(), "bf16", keep_fp32=overrides)


def test_the_bare_backend_warns_of_a_glob_that_matches_nothing() -> None:
    options = {"policy": "bf16", "inner": "eager", "keep_fp32": ["decoder*"], "low": ["aten.linear"]}
    with pytest.warns(UserWarning, match=r"keep_fp32='decoder\*' matches no module"):
        torch.compile(small(), backend="mpcompile", options=options)(torch.randn(2, WIDTH))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exported_program_trains(backend: str) -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.body(x).to(torch.float32).sum(1)}  # where export asserts a dtype

    model, x = Casts(), torch.randn(8, WIDTH)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    mp = mpcompile(program, "bf16", backend=backend, low=[lambda node: node.kind == "matmul"])
    for size in (8, 5):
        got = mp(x[:size])["y"]
        got.sum().backward()
        torch.testing.assert_close(got, model(x[:size])["y"], rtol=0.05, atol=0.1)
    assert {name for name, p in mp.named_parameters() if p.grad is not None} == dict(model.named_parameters()).keys()
    assert any(node.module == "body.0" and node.source for node in mp.plans[0].graph)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda model: model[0].register_forward_hook(lambda module, given, made: made * 3),
    "forward pre": lambda model: model[1].register_forward_pre_hook(lambda module, given: (given[0] * 2,)),
    "of the whole": lambda model: model.register_forward_hook(lambda module, given, made: made + 7),
    "backward": lambda model: model[1].register_full_backward_hook(lambda module, into, out: (into[0] * 5,)),
    "gradient": lambda model: model[1].weight.register_hook(lambda grad: grad * 5),
}


@pytest.mark.fp32_products
@pytest.mark.filterwarnings(
    "ignore:mpcompile. no compiled graph ran"
)  # Dynamo gives up on backward hooks, and we say so
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_that_come_and_go_after_the_first_call_are_seen(backend: str, kind: str) -> None:
    """Dynamo itself guards no hooks: a model compiled before one came would go on without it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), torch.randn(5, 6)
    mp = mpcompile(model, "fp32", backend=backend)

    def same() -> None:
        ours, theirs = (torch.autograd.grad(call(x).square().sum(), list(model.parameters())) for call in (mp, model))
        torch.testing.assert_close(ours, theirs)

    same()
    handle = HOOKS[kind](model)
    same()
    handle.remove()
    same()


def batched(mp: nn.Module, model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = mp(x)
    seeds = torch.eye(y.numel()).view(-1, *y.shape)
    return torch.autograd.grad(y, list(model.parameters()), seeds, is_grads_batched=True)


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_a_batched_backward_is_refused_by_a_compiled_graph_and_right_in_eager(policy: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x, low = torch.randn(3, 8), ["*"] if policy == "bf16" else []
    exact = batched(model, model, x)
    given = batched(mpcompile(model, policy, backend="eager", low=low), model, x)
    tolerance = 1e-5 if policy == "fp32" else 0.05
    for one, other in zip(given, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    mp = mpcompile(model, policy, low=low)
    for _ in range(2):
        with pytest.raises(MPCompileError, match="MP706"):
            batched(mp, model, x)
    wanted = x.clone().requires_grad_()
    with pytest.raises(MPCompileError, match="MP706"):
        torch.autograd.functional.jacobian(lambda z: mp(z).sum(0), wanted, vectorize=True)
    mp(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
