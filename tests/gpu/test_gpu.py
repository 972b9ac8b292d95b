"""On a CUDA device: correctness of the drop-in and of the whole step, no host syncs, fused attention, CUDA graphs."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpcompile import LossScale, mpcompile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=256, n_head=4, vocab_size=2048, n_positions=128, use_cache=False,
                        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    ids = torch.randint(0, 2048, (4, 128))
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(num_hidden_layers=2, hidden_size=256, num_attention_heads=4, intermediate_size=512, vocab_size=2048,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    ids = torch.randint(0, 2048, (4, 128))
    return BertForMaskedLM(config), {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def resnet50() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(num_labels=10))
    return model, {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(0, 10, (8,))}


def llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=2, hidden_size=256, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=512, vocab_size=2048, use_cache=False)  # fmt: skip
    ids = torch.randint(0, 2048, (4, 128))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]] = {
    "gpt2": gpt2,
    "bert": bert,
    "resnet50": resnet50,
    "llama": llama,
}


def make(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], nn.Module, dict[str, torch.Tensor]]:
    """(model on the GPU, its batch, the same model in FP64 on the CPU, its batch)."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    reference = copy.deepcopy(model).double()
    exact = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    return model.cuda(), {k: v.cuda() for k, v in batch.items()}, reference, exact


def errors(model: nn.Module, loss: torch.Tensor, reference: nn.Module, expected: torch.Tensor) -> tuple[float, float]:
    """(relative error of the loss, 1 - cosine of all gradients) against the FP64 model."""
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
    assert all((a is None) == (b is None) for a, b in pairs)
    got = torch.cat([a.cpu().double().flatten() for a, _ in pairs if a is not None])
    want = torch.cat([b.flatten() for _, b in pairs if b is not None])
    cosine = F.cosine_similarity(got, want, dim=0).item()
    return abs(loss.item() - expected.item()) / abs(expected.item()), 1 - cosine


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_dropin_is_as_near_to_fp64_on_the_cpu_as_autocast(name: str, policy: str) -> None:
    model, batch, reference, exact = make(name)
    peer = copy.deepcopy(model)
    scale = 1024.0 if policy == "fp16" else 1.0
    loss, expected = mpcompile(model, policy)(**batch).loss, reference(**exact).loss
    (loss * scale).backward()
    expected.backward()
    with torch.autocast("cuda", torch.float16 if policy == "fp16" else torch.bfloat16):
        theirs = peer(**batch).loss
    (theirs * scale).backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    ours, autocast = errors(model, loss, reference, expected), errors(peer, theirs, reference, expected)
    assert ours[0] < 2 * autocast[0] + 0.01, f"loss: {ours[0]:.4f}, autocast {autocast[0]:.4f}"
    assert ours[1] < 2 * autocast[1] + 0.02, f"gradients: {ours[1]:.4f}, autocast {autocast[1]:.4f}"


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_step_follows_the_fp32_curve(name: str, policy: str) -> None:
    model, batch, _, _ = make(name)
    plain = copy.deepcopy(model)
    step = mpcompile(model, policy).train_step(torch.optim.AdamW(model.parameters(), lr=1e-3))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    got, expected = [], []
    while len(got) < 10:
        result = step(**batch)
        if not result.stepped:
            continue  # the first scale may be too large for FP16: such a step changes nothing
        got.append(result.loss)
        loss = plain(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.detach())
    difference = (torch.stack(got) - torch.stack(expected)).abs().max().item()
    assert difference < 0.08 * expected[0].item(), f"losses differ by {difference:.4f}"
    assert got[-1] < got[0]


def _step(policy: str, **options: Any) -> tuple[Any, dict[str, torch.Tensor], nn.Module]:
    model, batch, _, _ = make("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return mpcompile(model, policy).train_step(optimizer, **options), batch, model


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_steady_state_never_syncs(policy: str, accumulate: int) -> None:
    step, batch, _ = _step(policy, accumulate=accumulate)
    for _ in range(4 * accumulate):
        step(**batch)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its own mode a prototype
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(4):
                step(**batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_forced_overflow_changes_no_weight_and_backs_off() -> None:
    step, batch, model = _step("fp16", scale=LossScale.dynamic(init=2.0**24, interval=2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = step(**batch)
    if bool(result.stepped):
        pytest.skip("this scale did not overflow")
    assert float(result.scale) == 2.0**23
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    scales = [float(step(**batch).scale) for _ in range(40)]
    assert min(scales) < 2.0**23
    assert any(b > a for a, b in itertools.pairwise(scales)), "the scale must grow again"


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_a_replayed_step_is_the_step(policy: str, accumulate: int) -> None:
    """Overflow, backoff and growth happen inside the graph; a learning rate changes outside."""
    curves = {}
    for graphs in (False, True):
        scale = LossScale.dynamic(init=2.0**22, interval=3) if policy == "fp16" else "auto"
        step, batch, _ = _step(policy, scale=scale, cuda_graph=graphs, accumulate=accumulate)
        schedule = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda i: 1 / (1 + i))
        results = []
        for _ in range(16):
            results += [step(**batch) for _ in range(accumulate)]
            schedule.step()
        assert len(step.updates.replays._steps) == graphs * (1 if accumulate == 1 else 3)
        curves[graphs] = [(r.loss.item(), r.scale.item(), r.stepped.item()) for r in results]
    for (loss, scale, stepped), (other, scale_too, stepped_too) in zip(curves[True], curves[False], strict=True):
        assert (scale, stepped) == (scale_too, stepped_too)
        assert abs(loss - other) < 1e-2 * abs(other)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_fused_attention_is_chosen(name: str) -> None:
    model, batch, _, _ = make(name)
    batch.pop("attention_mask", None)
    mp = mpcompile(model, "bf16")
    mp(**batch).loss.backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        mp(**batch).loss.backward()
        torch.cuda.synchronize()
    names = [event.key.lower() for event in profile.key_averages()]
    assert any("flash" in n or ("cudnn" in n and "sdpa" in n) for n in names), names


def test_fp32_matmul_precision_is_per_graph() -> None:
    torch.manual_seed(0)
    model = nn.Linear(512, 512).cuda()
    x = torch.randn(512, 512, device="cuda")
    exact = F.linear(x.double(), model.weight.double(), model.bias.double())
    errors = {}
    for name in ("highest", "high"):
        mp = mpcompile(copy.deepcopy(model), f"bf16,fp32_matmul={name}", keep_fp32=["*"])
        errors[name] = (mp(x).double() - exact).abs().max().item()
    assert errors["high"] > 10 * errors["highest"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_is_not_finite_is_found_in_every_low_type() -> None:
    from mpcompile.training.optimizer.fused_update import by_layout, non_finite

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bad, expected in ((1.0, 0.0), (float("inf"), 1.0), (-float("inf"), 1.0), (float("nan"), 1.0)):
            grads = [torch.ones(100, device="cuda"), torch.ones(3, 5, device="cuda", dtype=dtype)]
            grads[1][2, 3] = bad
            assert non_finite(grads, by_layout(grads)).item() == expected


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_fused_update_in_pieces_is_torchs(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer smaller than the weights, and the plain loop with torch's own fused AdamW."""
    from mpcompile.training.optimizer import fused_update as fused
    from mpcompile.training.optimizer import kernel_update

    monkeypatch.setattr(kernel_update, "DEVICES", set())
    monkeypatch.setattr(fused, "BUCKET_ELEMENTS", {"cuda": 1 << 10})
    monkeypatch.setattr(fused, "SMALL", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 16)).cuda()
    model, x = model.to(memory_format=layout), torch.randn(64, 8, 8, 8, device="cuda")  # type: ignore[call-overload]
    twin = copy.deepcopy(model)
    step = mpcompile(model, "fp32").train_step(
        torch.optim.AdamW(model.parameters(), lr=1e-3), lambda m, x: m(x).square().mean(), cuda_graph=False
    )
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, fused=True)
    for _ in range(3):
        step(x)
        twin(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert isinstance(next(iter(step.updates)), fused.FusedUpdate)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_a_backward_holds_no_large_gradient_twice() -> None:
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(6))).cuda()
    mp, x = mpcompile(model, "bf16", low=["*"]), torch.randn(64, 2048, device="cuda")
    mp(x).sum().backward()
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mp(x).sum().backward()
    single = 6 * (1 << 24)
    assert torch.cuda.max_memory_allocated() - before < single + 4 * (1 << 23)
