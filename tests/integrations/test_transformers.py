"""A tiny GPT-2 (tied weights) under transformers' `Trainer`: the wrapper is trained, saved and resumed as its model is."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcompile import mpcompile

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SMALL = {
    "vocab_size": 97,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
STEADY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Texts(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 97, (16,), generator=torch.Generator().manual_seed(place))
        return {"input_ids": tokens, "labels": tokens.clone()}


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, **STEADY))


def in_bf16(model: Any) -> Any:
    return mpcompile(model, "bf16", backend="eager", low=[lambda node: node.kind == "matmul"])


def in_fp32(model: Any) -> Any:
    return mpcompile(model, "fp32", backend="eager")


def train(wrap: Callable[[Any], Any], folder: Path, resume: str | None = None, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, save_steps=2, logging_steps=1, use_cpu=True,
        report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(wrap(gpt2()), arguments, train_dataset=Texts())
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_label_smoothing_checkpoint_resume_and_save(tmp_path: Path) -> None:
    """The smoother shifts the labels of a causal model alone, which it knows by its name."""
    options = {"label_smoothing_factor": 0.1}
    ours = train(in_fp32, tmp_path / "ours", **options)
    plain = train(lambda model: model, tmp_path / "plain", **options)
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-5)
    resumed = train(in_fp32, tmp_path / "ours", str(tmp_path / "ours" / "checkpoint-2"), **options)
    assert losses(resumed) == pytest.approx(losses(plain), abs=1e-5)
    with contextlib.redirect_stdout(io.StringIO()):
        ours.save_model(tmp_path / "saved")
        evaluated = [trainer.evaluate(Texts())["eval_loss"] for trainer in (ours, plain)]
        opened = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)
    assert opened.lm_head.weight is opened.transformer.wte.weight
    for (name, one), (_, other) in zip(opened.named_parameters(), ours.model.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}],
                         ids=lambda options: next(iter(options), "default"))  # fmt: skip
def test_it_trains_low_as_it_does_in_fp32(options: dict[str, Any], tmp_path: Path) -> None:
    """With ``bf16=True`` accelerate puts an autocast around our forward, which changes nothing in it."""
    ours, plain = train(in_bf16, tmp_path / "ours", **options), train(in_fp32, tmp_path / "plain", **options)
    products = [node.precision for plan in ours.model.plans for node in plan.graph if node.kind == "matmul"]
    assert set(products) == {"bf16"}
    assert losses(ours) == pytest.approx(losses(plain), abs=0.01)
    assert losses(ours) != losses(plain)
