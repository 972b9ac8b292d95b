"""`MixedPrecisionTrainer`: each training step of `Trainer` is a call of `mp.train_step`, and nothing else changes."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcompile import LossScale, MPCompileError, mpcompile

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from mpcompile.integrations.transformers import MixedPrecisionTrainer  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": None,
}
STEADY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Texts(torch.utils.data.Dataset[Any]):
    """Eighteen texts, of which some labels count for nothing."""

    def __len__(self) -> int:
        return 18

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 97, (16,), generator=torch.Generator().manual_seed(place))
        labels = tokens.clone()
        labels[: place % 5] = -100
        return {"input_ids": tokens, "labels": labels}


def gpt2(**dropout: float) -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **{**STEADY, **dropout}))


def trainer(kind: Any, model: Any, folder: Path, more: dict[str, Any] | None = None, **options: Any) -> Any:
    defaults = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3, "logging_steps": 1}
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **{**defaults, **options}
    )
    return kind(model, arguments, train_dataset=Texts(), **(more or {}))


def train(made: Any, resume: Path | None = None) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return made


def logged(made: Any, *names: str) -> list[float]:
    return [row[name] for row in made.state.log_history if "loss" in row for name in names]


def same_weights(one: Any, other: Any, bound: float) -> None:
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound)


OPTIONS: list[Any] = [
    {"gradient_accumulation_steps": 4},  # nine batches an epoch: the last window has one
    {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1, "max_grad_norm": 0.1},
    {"max_grad_norm": 0.0, "lr_scheduler_type": "cosine", "weight_decay": 0.1},
    {"bf16": True, "activation_checkpointing": True},
]


@pytest.mark.parametrize(
    "options",
    [OPTIONS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in OPTIONS[1:])],
    ids=lambda o: next(iter(o)),
)
def test_it_is_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    ours = train(
        trainer(MixedPrecisionTrainer, mpcompile(gpt2(), "fp32", backend="eager"), tmp_path / "ours", **options)
    )
    plain = train(trainer(transformers.Trainer, gpt2(), tmp_path / "plain", **{**options, "bf16": False}))
    names = ("loss", "grad_norm", "learning_rate", "epoch", "step")
    assert logged(ours, *names) == pytest.approx(logged(plain, *names), rel=1e-4)
    assert set(logged(ours, "skipped_steps")) == {0}
    same_weights(ours, plain, 1e-5)


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    """With dropout, in FP16, with a scale that has moved by the time of the checkpoint; the weights bit for bit."""

    def made(scale: float) -> Any:
        model = mpcompile(gpt2(resid_pdrop=0.1), "fp16,device=free-low", backend="eager")
        rule = LossScale.dynamic(scale, interval=2)
        return trainer(MixedPrecisionTrainer, model, tmp_path, {"step_options": {"scale": rule}})

    whole, resumed = train(made(16.0)), train(made(16.0), tmp_path / "checkpoint-3")
    names = ("loss", "grad_norm", "learning_rate", "loss_scale", "skipped_steps")
    assert logged(resumed, *names) == logged(whole, *names)
    assert logged(whole, "loss_scale") == [16.0, 32.0, 32.0, 64.0, 64.0, 128.0]
    same_weights(resumed, whole, 0.0)
    # A CPU computes FP16 products in FP32 and rounds: the verdict tells.
    report = whole.hosted.step.report()
    assert {node.verdict for node in report.nodes if node.kind == "matmul" and node.phase == "forward"} == {"low"}
    assert any(node.precision == "fp16" for node in report.nodes)


@pytest.mark.slow
def test_a_skipped_step_is_logged_and_the_schedule_waits(tmp_path: Path) -> None:
    model = mpcompile(gpt2(), "fp16,device=free-low", backend="eager")
    options = {"step_options": {"scale": LossScale.dynamic(2.0**24)}}
    made = train(trainer(MixedPrecisionTrainer, model, tmp_path, options, max_steps=8))
    skipped = logged(made, "skipped_steps")
    assert 0 < skipped[-1] < 8
    assert logged(made, "loss_scale")[-1] == 2.0 ** (24 - skipped[-1])
    assert made.lr_scheduler.last_epoch == 8 - skipped[-1]


@pytest.mark.slow
def test_low_weights_stay_near_and_a_plain_model_is_wrapped(tmp_path: Path) -> None:
    """``bf16=True`` alone: the trainer makes an `mpcompile(model, "bf16")`, and saves what `from_pretrained` opens."""
    more = {"policy": "bf16,device=free-low", "step_options": {"backend": "eager"}}
    ours = train(trainer(MixedPrecisionTrainer, gpt2(), tmp_path / "ours", more, bf16=True))
    plain = train(trainer(transformers.Trainer, gpt2(), tmp_path / "plain"))
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), abs=0.02)
    assert logged(ours, "loss") != logged(plain, "loss")
    report = ours.hosted.step.report()
    assert "bf16" in {node.precision for node in report.nodes if node.kind == "matmul"}
    with contextlib.redirect_stdout(io.StringIO()):
        ours.save_model(tmp_path / "saved")
    opened = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    for p, q in zip(opened.parameters(), ours.model.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_model_generates_low_while_it_is_trained() -> None:
    mp = mpcompile(gpt2().eval(), "bf16,device=free-low", backend="eager")
    tokens = torch.randint(0, 97, (2, 4))
    with mp.taking_calls():
        low = mp.generate(tokens, max_new_tokens=3, do_sample=False)
    assert {n.precision for plan in mp.plans for n in plan.graph if n.kind == "matmul"} == {"bf16"}
    with pytest.warns(UserWarning, match=r"taking_calls.*mp\.generate"):
        full = mp.generate(tokens, max_new_tokens=3, do_sample=False)
    assert low.shape == full.shape == (2, 7)


def test_the_model_s_own_compile_takes_the_backend() -> None:
    model, plain = gpt2(), gpt2()
    model.compile(backend="mpcompile", options={"policy": "bf16,device=free-low", "inner": "eager"})
    tokens = torch.randint(0, 97, (2, 16))
    losses = [one(input_ids=tokens, labels=tokens).loss for one in (model, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0.02)
    assert losses[0] != losses[1]
    assert next(model.parameters()).grad.dtype == torch.float32


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"max_grad_norm": 1.0}], ids=str)
def test_what_the_arguments_say_is_refused_as_an_option(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MPCompileError, match="MP551: step_options"):
        trainer(MixedPrecisionTrainer, gpt2(), tmp_path, {"step_options": options})


def test_torch_compile_beside_it_is_refused(tmp_path: Path) -> None:
    made = trainer(MixedPrecisionTrainer, mpcompile(gpt2(), "fp32", backend="eager"), tmp_path, torch_compile=True)
    with pytest.raises(MPCompileError, match="MP551: the training step under torch_compile=True"):
        train(made)
