"""PEFT: adapters in FP32 on a frozen BF16 base, by the training step and as a drop-in; saved, switched, merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lowness import assert_low_products
from torch import nn

from mpcompile import MPCompileError, mpcompile

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]
LOW = "bf16,device=free-low"
TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def adapted(dora: bool = False, **options: Any) -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=dora, init_lora_weights=False)
    return peft.get_peft_model(base(), config, **options)


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def full_precision(model: Any, steps: int) -> list[float]:
    model = copy.deepcopy(model).float()
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "dora"])
def test_adapters_train_and_the_base_stays(dora: bool) -> None:
    model = adapted(dora)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    expected = full_precision(model, 4)
    step = mpcompile(model, LOW, backend="eager").train_step(torch.optim.AdamW(trained(model), 1e-2))
    losses = [step(input_ids=TOKENS, labels=TOKENS).loss.item() for _ in range(4)]
    assert losses == pytest.approx(expected, abs=0.005)
    assert losses != expected
    assert {node.precision for node in step.report().nodes if node.kind == "matmul" and node.phase == "forward"} >= {
        "bf16"
    }
    for name, p in model.named_parameters():
        assert p.requires_grad or torch.equal(p, frozen[name]), name
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name


@pytest.mark.slow
def test_adapters_are_saved_switched_and_merged(tmp_path: Path) -> None:
    model = adapted()
    mp = mpcompile(model, LOW, backend="eager")
    step = mp.train_step(torch.optim.AdamW(trained(model), 1e-2))
    step(input_ids=TOKENS, labels=TOKENS)
    mp.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    before = mp(input_ids=TOKENS).logits
    assert_low_products(mp)
    mp.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    mp.set_adapter("other")
    torch.testing.assert_close(mp(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits.float(), rtol=0, atol=0.01)
    assert not torch.allclose(mp(input_ids=TOKENS).logits, before, atol=1e-3)
    mp.set_adapter("default")
    torch.testing.assert_close(mp(input_ids=TOKENS).logits, before, rtol=0, atol=0)
    assert step(input_ids=TOKENS, labels=TOKENS).stepped
    before = mp(input_ids=TOKENS).logits
    merged = mp.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=TOKENS).logits.float(), before, rtol=0, atol=0.01)


@pytest.mark.slow
def test_dora_as_a_drop_in_breaks_the_graph_and_trains() -> None:
    model = adapted(dora=True)
    expected = full_precision(model, 3)
    mp = mpcompile(model, LOW, backend="eager")
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    with pytest.warns(UserWarning, match="some of the model was not captured"):
        first = mp(input_ids=TOKENS, labels=TOKENS)
    assert first.logits.dtype == first.loss.dtype == torch.float32
    losses = []
    for _ in range(3):
        loss = mp(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, abs=0.005)


class Adapted(nn.Module):
    """A frozen BF16 layer under an FP32 adapter, as PEFT makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(64, 64, bias=False).to(torch.bfloat16).requires_grad_(False)
        self.adapter = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x.bfloat16()).float() + self.adapter(x)  # type: ignore[no-any-return]


class Broken(Adapted):
    """A graph break before, inside and after a frozen layer that runs as it is written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.inside((x + self.adapter(x)).bfloat16())
        torch._dynamo.graph_break()
        return self.inside(self.outside(low))

    def inside(self, low: torch.Tensor) -> torch.Tensor:
        low = self.base(low)
        torch._dynamo.graph_break()
        return low * 2

    @torch.compiler.disable
    def outside(self, low: torch.Tensor) -> torch.Tensor:
        assert low.dtype == torch.bfloat16
        return self.base(low)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:mpcompile. some of the model was not captured")
@pytest.mark.parametrize("output", ["fp32", "keep", "low"])
def test_where_a_graph_breaks_the_program_s_types_go_on_and_the_model_s_output_is_the_policy_s(output: str) -> None:
    torch.manual_seed(0)
    model, x = Broken(), torch.randn(4, 64)
    mp = mpcompile(model, f"{LOW},output={output}", backend="eager")
    for _ in range(2):
        found = mp(x)
        assert found.dtype == (torch.float32 if output == "fp32" else torch.bfloat16)
        torch.testing.assert_close(found.float(), model(x).float(), rtol=0.02, atol=0.02)
    found.sum().backward()
    assert model.adapter.weight.grad.dtype == torch.float32


def test_half_precision_adapters_are_refused_with_the_way_to_have_them_full() -> None:
    with pytest.raises(MPCompileError, match=r"MP103[\s\S]*autocast_adapter_dtype=True"):
        mpcompile(adapted(autocast_adapter_dtype=False), "bf16")


def in_pairs(model: Adapted) -> str:
    """A class of torch's own tests, made of two tensors."""
    from torch.testing._internal.two_tensor import TwoTensor

    whole = model.base.weight.detach()
    model.base.weight = nn.Parameter(TwoTensor(whole, whole.clone()), requires_grad=False)
    return "TwoTensor"


def in_8_bits(model: Adapted) -> str:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.base, quantization.Int8WeightOnlyConfig())
    return "torchao Int8Tensor"


@pytest.mark.parametrize("quantise", [in_pairs, in_8_bits])
def test_a_base_of_other_tensors_is_refused_by_name_before_and_after_wrapping(quantise: Any) -> None:
    model = Adapted()
    said = rf"MP108[\s\S]*{quantise(model)}[\s\S]*base.weight"
    with pytest.raises(MPCompileError, match=said):
        mpcompile(model, LOW, backend="eager")
    model = Adapted()
    mp = mpcompile(model, LOW, backend="eager")
    mp(torch.ones(2, 64)).sum().backward()
    quantise(model)
    with pytest.raises(MPCompileError, match="MP108"):
        mp(torch.ones(2, 64))
    model = Adapted()
    step = mpcompile(model, LOW, backend="eager").train_step(
        torch.optim.SGD(model.adapter.parameters(), 0.1), lambda model, x: model(x).sum()
    )
    step(torch.ones(2, 64))
    quantise(model)
    with pytest.raises(MPCompileError, match="MP108"):
        step(torch.ones(2, 64))


def test_the_bare_backend_refuses_such_a_base_too() -> None:
    model = Adapted()
    in_pairs(model)
    with pytest.raises(Exception, match="MP108"):
        torch.compile(model, backend="mpcompile", options={"policy": LOW, "inner": "eager"})(torch.ones(2, 64))


def example() -> Any:
    import importlib.util

    path = Path(__file__).parents[2] / "examples" / "lora_llama.py"
    spec = importlib.util.spec_from_file_location("lora_llama", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    losses = example().main(["--tiny", "--steps", "4", "--policy", LOW, "--out", str(out)])
    assert losses[-1] < losses[0]
    found = json.loads(out.read_text())
    assert found["losses"] == losses
    assert found["tokens_per_second"] > 0


def test_the_example_knows_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = example()
    model = lora.llama(35, torch.device("meta"))
    weights = 2 * sum(p.numel() for p in model.parameters())
    assert weights < lora.needed(35, 16, 2048) < 1.2 * weights
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1.5e11))
    asked = lora.parsed([])
    assert lora.chosen(asked, torch.device("cuda")) == 65
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 8e10))
    assert lora.chosen(asked, torch.device("cuda")) < 60
    with pytest.raises(SystemExit, match="too large"):
        lora.chosen(lora.parsed(["--billions", "60"]), torch.device("cuda"))
