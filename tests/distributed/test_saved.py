"""Checkpoints: saved by some ranks, loaded by another number of them; beside a step that goes on; and what a kill leaves."""

from __future__ import annotations

import os
import signal
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_own_process, own_part, same_everywhere, together
from torch import distributed, multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mpcompile import LossScale, load_checkpoint, mpcompile, save_checkpoint
from mpcompile.errors import TrainingError

WIDTH = 16


class Everything(checkpoint.stateful.Stateful):
    """Model and optimizer by torch's own helpers, and the step as it is."""

    def __init__(self, model: nn.Module, optimizer: Any, step: Any) -> None:
        self.model, self.optimizer, self.step = model, optimizer, step

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        self.step.load_state_dict(saved["step"])


def made(rank: int, shard: str = "none") -> tuple[Everything, Any]:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        for p in model.parameters():
            distributed.broadcast(p, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = mpcompile(model, "bf16", low=["*"], backend="eager").train_step(
        optimizer, lambda m, x: m(x).square().mean(), process_group=distributed.group.WORLD,
        scale=LossScale.dynamic(init=64.0, interval=2), shard=shard,
    )  # fmt: skip
    return Everything(model, optimizer, step), step


def batch(number: int) -> torch.Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))


def save(rank: int, folder: str, shard: str = "none") -> None:
    everything, step = made(rank, shard)
    for number in range(3):
        step(own_part(batch(number), rank))
    checkpoint.save({"all": everything}, checkpoint_id=folder)
    step(own_part(batch(3), rank))
    after = everything.state_dict()
    if rank == 0:
        torch.save(after, Path(folder) / "after.pt")


def load(rank: int, folder: str, shard: str = "none") -> None:
    everything, step = made(rank, shard)
    checkpoint.load({"all": everything}, checkpoint_id=folder)
    step(own_part(batch(3), rank))
    now, wanted = everything.state_dict(), torch.load(Path(folder) / "after.pt", weights_only=False)
    assert now["step"]["scale"] == wanted["step"]["scale"] == 256.0
    assert now["step"]["steps"] == wanted["step"]["steps"] == 4
    for name, value in now["model"].items():
        assert same_everywhere(value)
        # Other halves of the batch are rounded otherwise.
        torch.testing.assert_close(value, wanted["model"][name], rtol=1e-2, atol=2e-3)
    for name, state in now["optimizer"]["state"].items():
        assert float(state["step"]) == float(wanted["optimizer"]["state"][name]["step"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "update"])
def test_saved_by_two_loaded_by_one_and_by_four_and_the_other_way_round(shard: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        together(save, folder, shard)
        in_own_process(load, folder)
        together(load, folder, shard, size=4)
    with tempfile.TemporaryDirectory() as folder:
        in_own_process(save, folder)
        together(load, folder, shard)
    with tempfile.TemporaryDirectory() as folder:
        together(save, folder, shard, size=4)
        together(load, folder)


def beside(rank: int, folder: str, shard: str) -> None:
    """What an asynchronous save writes is what was there when it was asked for."""
    everything, step = made(rank, shard)
    for number in range(2):
        step(own_part(batch(number), rank))
    own = distributed.new_group(backend="gloo")  # the step's collectives go on meanwhile
    saving: Any = checkpoint.async_save({"all": everything}, checkpoint_id=folder, process_group=own)
    wanted = {name: value.clone() for name, value in everything.state_dict()["model"].items()}
    for number in range(2, 5):
        step(own_part(batch(number), rank))
    saving.result()
    again, _ = made(rank, shard)
    checkpoint.load({"all": again}, checkpoint_id=folder)
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict()["model"].items())


@pytest.mark.slow
def test_saved_beside_steps_that_go_on() -> None:
    with tempfile.TemporaryDirectory() as folder:
        together(beside, folder, "update")


class Killed(checkpoint.FileSystemWriter):
    """Ends its process, as the kernel would, when it is to write."""

    def write_data(self, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_while_saving(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    everything, step = made(rank)
    step(own_part(batch(0), rank))
    checkpoint.save({"all": everything}, checkpoint_id=f"{folder}/1")
    step(own_part(batch(1), rank))
    kind = Killed if rank == 1 else checkpoint.FileSystemWriter
    with pytest.raises(Exception, match=r"gloo|closed by peer|Timed out|CheckpointException"):
        checkpoint.save({"all": everything}, storage_writer=kind(f"{folder}/2"))
    with pytest.raises(TrainingError, match="MP548"):
        step(own_part(batch(2), rank))
    Path(f"{folder}/told").touch()
    os._exit(0)


def good(rank: int, folder: str) -> None:
    everything, step = made(rank)
    checkpoint.load({"all": everything}, checkpoint_id=folder)
    assert everything.state_dict()["step"]["steps"] == 1
    assert bool(step(batch(2)).stepped)


@pytest.mark.slow
def test_a_rank_killed_while_saving_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The other rank's save and next step end, within the group's timeout, with an error of ours."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=killed_while_saving, args=(rank, os.fspath(tmp_path))) for rank in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(120)
    assert [one.exitcode for one in ranks] == [0, -signal.SIGKILL]
    assert (tmp_path / "told").exists()
    assert not (tmp_path / "2" / ".metadata").exists()
    in_own_process(good, os.fspath(tmp_path / "1"))


def one_file(rank: int, folder: str) -> None:
    """`save_checkpoint` of a shared-out step is a call of all ranks, of which one writes; any step takes the file."""
    everything, step = made(rank, "update")
    parts = {"model": everything.model, "optimizer": everything.optimizer, "step": step}
    path = Path(folder) / "run.ckpt"
    for number in range(2):
        step(own_part(batch(number), rank))
    save_checkpoint(path, **parts, extra={"rank": rank})
    step(own_part(batch(2), rank))
    wanted = {name: value.clone() for name, value in everything.model.state_dict().items()}
    for shard in ("update", "none"):
        again, other = made(rank, shard)
        found = load_checkpoint(path, model=again.model, optimizer=again.optimizer, step=other)
        assert found == {"rank": 0}
        other(own_part(batch(2), rank))
        for name, value in again.model.state_dict().items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(TrainingError, match="MP513"):
        save_checkpoint(Path(folder) / "nowhere" / "run.ckpt", **parts)
    step._meeting.patience = timedelta(seconds=3)
    if rank == 0:
        with pytest.raises(TrainingError, match="MP548"):
            save_checkpoint(path, **parts)
    distributed.barrier()


@pytest.mark.slow
def test_one_file_of_what_ranks_hold_in_shares() -> None:
    with tempfile.TemporaryDirectory() as folder:
        together(one_file, folder)
