"""Checkpoints: one safetensors file, written so that a kill at any moment leaves the last good one.

Tensors are stored by safetensors; everything else (and where each tensor belongs) is JSON in the file's own
metadata.  No pickle, so loading a file runs no code.  Each tensor carries a CRC, so damage is an error, not a bad run.
"""

from __future__ import annotations

import json
import os
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpcompile.errors import TrainingError, page

page(
    "MP511",
    "A checkpoint that cannot be read",
    "The file is missing, cut short, altered after it was written, or not a checkpoint of mpcompile.",
    "Load an older checkpoint. `save_checkpoint` replaces a file only when the new one is whole on the disk.",
)
page(
    "MP512",
    "A state that cannot be saved",
    "Checkpoints hold tensors, numbers, strings, None, lists, tuples and dicts; the state holds something else.",
    "Give `extra` plain values, for example `scheduler.state_dict()` and not the scheduler.",
)

FORMAT = "mpcompile.checkpoint/1"
_PLAIN = (str, int, float, bool, type(None))


def save_checkpoint(
    path: str | os.PathLike[str], *, model: Any = None, optimizer: Any = None, step: Any = None, extra: Any = None
) -> None:
    """Write model, optimizer, training step, `extra` and every random generator's state to `path`, atomically.

    Args:
      path: the file; its directory must exist. The new file takes its place only once it is whole on the disk.
      model, optimizer, step: anything with `state_dict()`.
      extra: plain values and tensors of your own (epoch, scheduler.state_dict(), …).

    Raises:
      TrainingError: MP512, for a value that is not plain.
    """
    parts = {"model": model, "optimizer": optimizer, "step": step}
    state = {name: part.state_dict() for name, part in parts.items() if part is not None}
    packer = _Packer()
    tree = packer.pack({**state, "extra": extra, "rng": _random_state()}, "")
    crc = {key: _crc(tensor) for key, tensor in packer.tensors.items()}
    _write_whole(Path(path), packer.tensors, {"format": FORMAT, "tree": json.dumps(tree), "crc": json.dumps(crc)})


def load_checkpoint(
    path: str | os.PathLike[str], *, model: Any = None, optimizer: Any = None, step: Any = None, rng: bool = True
) -> Any:
    """Put back what `save_checkpoint` wrote, and return its `extra`. Nothing is touched unless the file is sound.

    Args:
      path: the file.
      model, optimizer, step: anything with `load_state_dict()`; what is not given is not loaded.
      rng: put the random generators back too, so that a resumed run draws the same dropout.

    Raises:
      TrainingError: MP511, for a missing, damaged or foreign file, or one without a part that is asked for.
    """
    state = _read(Path(path))
    parts = {"model": model, "optimizer": optimizer, "step": step}
    wanted = {name: part for name, part in parts.items() if part is not None}
    missing = [name for name in wanted if name not in state]
    if missing:
        raise _unreadable(path, f"it holds no {' and no '.join(missing)}")
    for name, part in wanted.items():
        part.load_state_dict(state[name])
    if rng:
        _restore_random_state(state["rng"])
    return state["extra"]


def _write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata)
    _sync(partial)
    partial.replace(path)
    # The rename itself is on the disk only when the directory is.
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, str(error)) from error
    if metadata.get("format") != FORMAT:
        raise _unreadable(path, f"its format is {metadata.get('format', 'not named')}, not {FORMAT}")
    damaged = [key for key, crc in json.loads(metadata["crc"]).items() if _crc(tensors[key]) != crc]
    if damaged:
        raise _unreadable(path, f"{len(damaged)} tensors are not what was written, first {damaged[0]!r}")
    unpacked: dict[str, Any] = _unpack(json.loads(metadata["tree"]), tensors)
    return unpacked


def _unreadable(path: Any, why: str) -> TrainingError:
    return TrainingError(
        "MP511", f"the checkpoint {os.fspath(path)!r} cannot be read", why=why, try_="an older checkpoint"
    )


def _crc(tensor: Tensor) -> int:
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(flat)


class _Packer:
    """Takes the tensors out of a tree, each once (tied weights stay tied), and leaves JSON."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[tuple[Any, ...], str] = {}

    def pack(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._store(value, path)}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.pack(item, f"{path}.{i}") for i, item in enumerate(value)]}
        if isinstance(value, dict):
            return {"dict": [[self._key(key, path), self.pack(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, _PLAIN):
            return value
        raise TrainingError("MP512", f"{path.lstrip('.')} is a {type(value).__name__}, which a checkpoint cannot hold")

    def _key(self, key: Any, path: str) -> Any:
        if isinstance(key, _PLAIN):
            return key
        raise TrainingError("MP512", f"{path.lstrip('.')} has the key {key!r}, which a checkpoint cannot hold")

    def _store(self, tensor: Tensor, path: str) -> str:
        name = path.lstrip(".")
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        if tensor.numel() and identity in self._seen:
            return self._seen[identity]
        self._seen[identity] = name
        # A copy only where it must be: off the device, out of a view, or off a storage that another tensor shares.
        kept = tensor.detach().cpu().contiguous()
        shared = kept.untyped_storage().nbytes() != kept.numel() * kept.element_size()
        self.tensors[name] = kept.clone() if shared else kept
        return name


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in value}
    items = [_unpack(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
