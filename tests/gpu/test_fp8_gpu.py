"""FP8 on a CUDA device: the kernels give the bits of the definition, products and gradients are right, graphs replay."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcompile import fp8, mpcompile
from mpcompile.runtime import quantise as definition
from mpcompile.runtime.fp8_linear import copies_of, copies_of_input, multiply
from mpcompile.tools.bench_by_hand import Llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs FP8 in hardware"
    ),
]
FORMS = ("float8_e4m3fn", "float8_e5m2")
CPU = torch.ops.mpcompile.quantise.default


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Equal to the bit; any NaN is as good as another."""
    a, b = got.cpu(), want.cpu()
    bits = torch.uint8 if a.element_size() == 1 else torch.int32
    nan = torch.isnan(a.float())
    equal = a.view(bits) == b.view(bits)
    return bool((torch.isnan(b.float()) == nan).all() and (equal | nan).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(64, 128), (16, 16), (1040, 272), (333, 517), (4096, 3072)])
def test_the_kernels_give_the_definition_s_bits(shape: tuple[int, int], form: str, dtype: torch.dtype) -> None:
    assert definition._kernels() is not None, "no Triton here"
    for kind in ("plain", "large", "tiny", "zero", "nan", "inf"):
        x = matrix(*shape, dtype=dtype)
        if kind in ("large", "tiny"):
            x = (x.float() * (1e4 if dtype == torch.float16 else 1e30) ** (1 if kind == "large" else -1)).to(dtype)
        if kind == "zero":
            x.zero_()
        if kind in ("nan", "inf"):
            x[shape[0] // 2, shape[1] // 3] = float(kind)
        want, got = CPU(x, form, True, True, False), CPU(x.cuda(), form, True, True, False)
        for name, a, b in zip(("lies", "scale", "turned", "its scale"), got, want, strict=True):
            assert a.shape == b.shape
            assert same_bits(a, b), (kind, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["plain", "nan", "inf", "zero"])
def test_a_known_largest_magnitude_gives_the_definition_s_bits(form: str, kind: str) -> None:
    x = matrix(1040, 272)
    if kind in ("nan", "inf"):
        x[7, 9] = float(kind)
    if kind == "zero":
        x.zero_()
    want, top = CPU(x, form, True, True, False), definition.look(x.cuda())
    for one in (top, -top) if kind == "nan" else (top,):
        got = CPU(x.cuda(), form, True, True, False, one)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_a_norm_and_its_copies_are_read_once() -> None:
    """The largest magnitude comes from the norm's kernel: no launch reads what it wrote but that of the copies."""
    norm, x = nn.RMSNorm(2048).cuda().bfloat16(), matrix(4096, 2048).cuda()

    @torch.compile
    def run(x: Tensor) -> tuple[Tensor, ...]:
        return copies_of_input(norm(x), True, True, "tensorwise")

    with torch.no_grad():
        got = run(x)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:  # else torch 2.11 warns
            run(x)
            torch.cuda.synchronize()
        names = [event.key for event in profile.key_averages() if event.self_device_time_total]
        want = CPU(norm(x), FORMS[0], True, True, False)
    # The norm with each row's largest, the largest of these, the copies.
    assert len(names) <= 3, names
    off = (got[0].float() * got[1] - want[0].float() * want[1]).norm() / (want[0].float() * want[1]).norm()
    assert off < 0.02


def test_many_weights_in_two_launches_have_the_definition_s_bits() -> None:
    shapes = [(64, 128), (16, 16), (1040, 272), (4096, 3072), (2048, 8192), (48, 160)]
    pairs, wanted = [], []
    for number, shape in enumerate(shapes):
        x = matrix(*shape, seed=number)
        if number == 1:
            x[3, 4] = float("nan")
        layouts = number != 2, number != 0
        pairs.append((x.cuda(), definition.shapes_of(x.cuda(), FORMS[0], *layouts)))
        wanted.append(CPU(x, FORMS[0], *layouts, False))
    definition._kernels().Several(pairs, FORMS[0])()
    for (_, got), want, shape in zip(pairs, wanted, shapes, strict=True):
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True)), shape


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replayed_step_writes_its_weights_copies(accumulate: int) -> None:
    model, batch = stack()
    step = mpcompile(model, "bf16", fp8=["blocks"]).train_step(
        torch.optim.AdamW(model.parameters(), lr=1e-2), accumulate=accumulate
    )
    for edited in (False, True):
        if edited:
            with torch.no_grad():
                model.blocks[1][1].weight.mul_(2.0)
        for _ in range(6 * accumulate):
            step(*batch)
        held = step.context.copies._held
        assert len(held) >= 3
        for (_, wanted), (shadow, made) in held.items():
            fresh = CPU(shadow, wanted.form, wanted.lies, wanted.transposed, False)
            assert all(same_bits(a, b) for a, b in zip(made, fresh, strict=True))


def test_one_layout_alone_is_as_both() -> None:
    x = matrix(256, 384).cuda()
    both = CPU(x, FORMS[0], True, True, False)
    for lies, turned in ((True, False), (False, True)):
        one = CPU(x, FORMS[0], lies, turned, False)
        for a, b in zip(one, both, strict=True):
            assert a.numel() == 0 or same_bits(a, b)


@pytest.mark.parametrize("recipe", fp8.RECIPES)
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_emulation(recipe: str, bias: bool) -> None:
    found = []
    for device in ("cpu", "cuda"):
        x, w = matrix(4, 64, 512).to(device).requires_grad_(), matrix(768, 512, seed=1).to(device).requires_grad_()
        b = matrix(768, seed=2).to(device).requires_grad_() if bias else None
        leaves = [x, w] if b is None else [x, w, b]
        y = multiply(x, w, b, copies_of(x, True, True, recipe), copies_of(w, True, True, recipe), fp8.PASSES, recipe)
        grads = torch.autograd.grad(y, leaves, matrix(4, 64, 768, seed=3).to(device))
        found.append([y.detach(), *grads])
    for here, there in zip(*found, strict=True):
        # Another order of summation, and fast accumulation in the output.
        off = ((there.cpu().float() - here.float()).norm() / here.float().norm()).item()
        assert off < 0.02, off


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 512), nn.GELU()) for _ in range(4))
        self.head = nn.Linear(512, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x), y)


def stack() -> tuple[Stack, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Stack().cuda(), (torch.randn(256, 512, device="cuda"), torch.randint(0, 32, (256,), device="cuda"))


def test_the_drop_in_s_gradients_are_those_of_fp32_to_fp8_s_rounding() -> None:
    model, batch = stack()
    loss = model(*batch)
    loss.backward()
    right = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    mp = mpcompile(model, "bf16", fp8=["blocks"])
    got = mp(*batch)
    got.backward()
    reading = {node.module for plan in mp.plans for node in plan.graph if node.fp8}
    assert len(reading) >= 3, reading
    assert got.item() == pytest.approx(loss.item(), rel=0.01)
    off = [((p.grad - r).norm() / r.norm()).item() for p, r in zip(model.parameters(), right, strict=True)]
    assert 0.01 < max(off) < 0.2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replayed_step_is_the_step_and_waits_for_nothing(accumulate: int, no_sync: Any) -> None:
    model, batch = stack()
    twin = copy.deepcopy(model)
    losses = []
    for one, graph in ((model, False), (twin, True)):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        step = mpcompile(one, "bf16", fp8=["blocks"]).train_step(optimizer, cuda_graph=graph, accumulate=accumulate)
        # The fifth call of one batch a step is the one that is recorded.
        found = [step(*batch).loss for _ in range(6 * accumulate)]
        if graph:
            no_sync()
        found += [step(*batch).loss for _ in range(4 * accumulate)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("default")
        losses.append(torch.stack(found).tolist())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_an_overflow_skips_a_replayed_step() -> None:
    model, (x, y) = stack()
    step = mpcompile(model, "bf16", fp8=["blocks"]).train_step(torch.optim.AdamW(model.parameters(), lr=1e-3))
    for _ in range(4):
        assert step(x, y).stepped.item()
    x[3, 5] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    assert not step(x, y).stepped.item()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_llama_s_shapes_are_planned_in_fp8_and_less_is_kept() -> None:
    ids = torch.randint(0, 1024, (2, 2048), device="cuda")
    kept = {}
    for policy in ("bf16", "fp8"):
        torch.manual_seed(0)
        model = Llama(1024, 2048, 2048, 8192, 32, 8, 4).cuda()
        step = mpcompile(model, policy).train_step(torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
        loss = [step(input_ids=ids, labels=ids).loss.item() for _ in range(3)]
        kept[policy] = (loss, step.saved_bytes[0])
        del step, model
    assert kept["fp8"][0] == pytest.approx(kept["bf16"][0], rel=0.02)
    # Copies of weights are inputs, not kept.
    assert kept["fp8"][1] < kept["bf16"][1]
