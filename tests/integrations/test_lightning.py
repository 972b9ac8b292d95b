"""Lightning's Trainer and Fabric with the precision plugins: as a drop-in, and with the whole step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lowness import assert_low_products
from torch import nn
from torch.nn import functional as F

from mpcompile import LossScale, MPCompileError

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import Callback  # noqa: E402

from mpcompile.integrations.lightning import FabricPrecision, MPCompilePrecision  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifies(lightning.LightningModule):  # type: ignore[name-defined,misc]
    def __init__(self, logs: bool = True, place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3))
        self.logs, self.place, self.losses = logs, place, list[float]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.place and batch_idx % 2:
            loss = loss * 2
        if self.logs:
            self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 0.9**count)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Counts(Callback):  # type: ignore[misc]
    """What callbacks see."""

    def __init__(self) -> None:
        self.seen = list[str]()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen.append("update")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seen.append(f"epoch at {trainer.global_step}")


def fit(plugin: Any, folder: Path, module: Any = None, resume: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Seven batches an epoch in windows of two: the last has one."""
    module = Classifies() if module is None else module
    # Numbers of its own: no thread that another test left draws from the same generator in between.
    numbers = torch.randn(28, 8, generator=torch.Generator().manual_seed(1))
    data = [(row, torch.tensor(i % 3)) for i, row in enumerate(numbers)]
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    defaults = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "limit_val_batches": 0}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, logger=False,
        default_root_dir=folder, plugins=plugin and [plugin], **{**defaults, **options},
    )  # fmt: skip
    trainer.fit(module, loader, loader, ckpt_path=resume, weights_only=False)
    return trainer, module


def same(one: tuple[Any, Any], other: tuple[Any, Any], bound: float) -> None:
    assert one[1].losses == pytest.approx(other[1].losses, abs=bound)
    assert one[0].global_step == other[0].global_step
    assert one[0].optimizers[0].param_groups[0]["lr"] == other[0].optimizers[0].param_groups[0]["lr"]
    for p, q in zip(one[1].parameters(), other[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound)


def test_both_ways_train_as_lightning_does(tmp_path: Path) -> None:
    plain_seen, step_seen = Counts(), Counts()
    plain = fit(None, tmp_path, callbacks=[plain_seen])
    drop_in = fit(MPCompilePrecision("bf16,device=free-low", backend="eager"), tmp_path, limit_val_batches=1)
    whole = MPCompilePrecision("bf16,device=free-low", whole_step=True, backend="eager")
    stepped = fit(whole, tmp_path, Classifies(logs=False), callbacks=[step_seen])
    # 0.0003 and 0.0004 apart, the same in every run; 150 trainings with random noise of a BF16 rounding stay within 0.001.
    same(drop_in, plain, 0.003)
    same(stepped, plain, 0.003)
    assert drop_in[1].losses != plain[1].losses
    assert stepped[1].losses == pytest.approx(drop_in[1].losses, abs=1e-3)
    assert {"train_loss", "val_loss"} <= drop_in[0].logged_metrics.keys()
    assert step_seen.seen == plain_seen.seen
    assert whole.step.pending == 0
    assert "bf16" in {node.precision for node in whole.step.report().nodes if node.kind == "matmul"}


@pytest.mark.slow
def test_a_run_goes_on_from_lightning_s_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    def plugin() -> Any:
        options = {"scale": LossScale.dynamic(16.0, interval=3)}
        return MPCompilePrecision("fp16,device=free-low", whole_step=True, backend="eager", step_options=options)

    parts = plugin(), plugin()
    whole = fit(parts[0], tmp_path, Classifies(logs=False), max_epochs=3)
    trainer, _ = fit(plugin(), tmp_path, Classifies(logs=False), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    rest = fit(parts[1], tmp_path, Classifies(logs=False), str(tmp_path / "one.ckpt"), max_epochs=3)
    assert rest[1].losses == whole[1].losses[7:]
    assert rest[0].global_step == whole[0].global_step == 12
    assert parts[0].step.state.scale.item() == parts[1].step.state.scale.item() == 16.0 * 2**4


@pytest.mark.slow
def test_max_steps_a_second_fit_and_a_skipped_update(tmp_path: Path) -> None:
    plugin = MPCompilePrecision(
        "fp16,device=free-low", whole_step=True, backend="eager", step_options={"scale": LossScale.dynamic(2.0**24)}
    )
    trainer, module = fit(plugin, tmp_path, Classifies(logs=False), max_steps=5, max_epochs=-1)
    assert trainer.global_step == 5
    assert plugin.step.state.skipped > 0
    trainer.fit_loop.epoch_loop.max_steps = 7
    trainer.fit(module, trainer.train_dataloader)
    assert trainer.global_step == 7


@pytest.mark.parametrize(
    ("module", "options", "what"),
    [
        (lambda: Classifies(), {}, "training_step logs"),
        (lambda: Classifies(logs=False, place=True), {}, "training_step reads batch_idx"),
        (lambda: Classifies(logs=False), {"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm='value'"),
    ],
    ids=["logs", "place", "value"],
)
def test_what_the_step_cannot_do_is_refused(module: Any, options: Any, what: str, tmp_path: Path) -> None:
    plugin = MPCompilePrecision("bf16", whole_step=True, backend="eager")
    with pytest.raises(MPCompileError, match=f"MP551: .*{what}"):
        fit(plugin, tmp_path, module(), **options)


def test_a_policy_without_a_low_type_is_refused() -> None:
    with pytest.raises(MPCompileError, match="MP551"):
        MPCompilePrecision("fp32")


@pytest.mark.parametrize("way", ["plugin", "wrapper"])
def test_fabric(way: str) -> None:
    from mpcompile import mpcompile

    policy = "bf16,device=free-low"
    plugins = [FabricPrecision(policy, backend="eager")] if way == "plugin" else []
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=plugins)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    given = net if plugins else mpcompile(net, policy, backend="eager")
    model, optimizer = fabric.setup(given, torch.optim.SGD(net.parameters(), 0.1))
    before = net[0].weight.detach().clone()
    loss = model(torch.randn(4, 8)).square().mean()
    fabric.backward(loss)
    optimizer.step()
    assert loss.dtype == torch.float32
    assert not torch.equal(before, net[0].weight)
    assert_low_products(model._forward_module)
    if way == "wrapper":
        step = model.module.train_step(optimizer, lambda m, x: m(x).square().mean())
        assert step(torch.randn(4, 8)).stepped
