"""Checkpoints: one safetensors file, written so that a kill at any moment leaves the last good one.

Tensors are stored by safetensors; everything else (and where each tensor belongs) is JSON in the file's own
metadata.  No pickle, so loading a file runs no code.  Each tensor carries a CRC, so damage is an error, not a bad run.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import platform
import random
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.modules import loads_by_itself

FORMAT = "mpcompile.checkpoint/1"
_PLAIN = (str, int, float, bool, type(None))
# Another machine's unfinished file is removed when it is so old that no one can still be writing it.
_ABANDONED_SECONDS = 24 * 3600.0


def save_checkpoint(
    path: str | os.PathLike[str], *, model: Any = None, optimizer: Any = None, step: Any = None, extra: Any = None
) -> None:
    """Write model, optimizer, training step, `extra` and every random generator's state to `path`, atomically.

    Of several ranks that hold the same, one is to call this. With a step of ``shard="update"`` all are: they gather what each
    holds a share of, the first one writes (with its own random state), and all know then whether the file is whole.

    Args:
      path: the file; its directory must exist. The new file takes its place only once it is whole on the disk.
      model, optimizer, step: anything with `state_dict()`.
      extra: plain values and tensors of your own (epoch, scheduler.state_dict(), …).

    Raises:
      TrainingError: MP512, for a value that is not plain; MP513, when the file cannot be written; MP548, where not all
        ranks come.
    """
    parts = {"model": model, "optimizer": optimizer, "step": step}
    state = {name: part.state_dict() for name, part in parts.items() if part is not None}
    content = {**state, "extra": extra, "rng": _random_state()}
    once = getattr(step, "write_once", None)
    if once is None:
        _write(Path(path), content)
    else:
        once(lambda: _write(Path(path), content))


def _write(path: Path, content: dict[str, Any]) -> None:
    packer = _Packer()
    tree = packer.pack(content, "")
    facts = {key: _storable(key, tensor) for key, tensor in packer.tensors.items()}
    words = {"format": FORMAT, "tree": json.dumps(tree), "tensors": json.dumps(facts)}
    _write_whole(path, packer.tensors, {**words, "digest": _digest(words)})


def load_checkpoint(
    path: str | os.PathLike[str], *, model: Any = None, optimizer: Any = None, step: Any = None, rng: bool = True
) -> Any:
    """Put back what `save_checkpoint` wrote, and return its `extra`.

    Nothing is touched unless the file is sound and fits.

    Args:
      path: the file.
      model, optimizer, step: anything with `load_state_dict()`; what is not given is not loaded.
      rng: put the random generators back too, so that a resumed run draws the same dropout.

    Raises:
      TrainingError: MP511, for a missing, damaged or foreign file, or one without a part that is asked for; MP514,
        for one that does not fit.
    """
    state = _read(Path(path))
    parts = {"model": model, "optimizer": optimizer, "step": step}
    wanted = {name: part for name, part in parts.items() if part is not None}
    missing = [name for name in (*wanted, "extra", "rng") if name not in state]
    if missing:
        raise _unreadable(path, f"it holds no {' and no '.join(missing)}")
    if rng:
        _check_random_state(path, state["rng"])
    _load_all(path, wanted, state)
    if rng:
        _restore_random_state(state["rng"])
    return state["extra"]


def _load_all(path: Any, parts: dict[str, Any], state: dict[str, Any]) -> None:
    """Load every part, the model last; where one refuses, put back those before it."""
    done: list[tuple[Any, Any]] = []
    try:
        if "model" in parts:
            _check_model(parts["model"], state["model"])
        for name, part in sorted(parts.items(), key=lambda pair: pair[0] == "model"):
            # Loading replaces an optimizer's tensors, so these are still what they were; a model's are written to.
            if name != "model":
                done.append((part, part.state_dict()))
            elif not _is_plain(part):
                done.append((part, copy.deepcopy(part.state_dict())))
            part.load_state_dict(state[name])
    # Whatever a part's own code raises on what it does not know: the file was read, and does not fit.
    except Exception as error:
        for part, before in done:
            part.load_state_dict(before)
        why = f"{type(error).__name__}: {error}"
        raise TrainingError("MP514", f"the checkpoint {os.fspath(path)!r} does not fit", why=why) from error


def _is_plain(model: Any) -> bool:
    """Whether loading is torch's own copying alone, whose refusals `_check_model` knows beforehand."""
    return isinstance(model, nn.Module) and not any(
        loads_by_itself(m)
        or type(m).set_extra_state is not nn.Module.set_extra_state
        or type(m).load_state_dict is not nn.Module.load_state_dict
        for m in model.modules()
    )


def _check_model(model: Any, saved: Any) -> None:
    """torch would copy what fits before it says what does not."""
    if not _is_plain(model):
        return
    now = model.state_dict()
    wrong = sorted(map(str, now.keys() ^ saved.keys()))
    wrong += [key for key, held in now.items() if key in saved and not _same_form(held, saved[key])]
    if wrong:
        raise ValueError(f"the model's {wrong[0]!r} is missing, unexpected or of another shape ({len(wrong)} such)")


def _same_form(held: Any, saved: Any) -> bool:
    return isinstance(saved, Tensor) and held.shape == saved.shape and (held.is_complex() or not saved.is_complex())


def _write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # A folder of its own: several processes may save to one path, and the last whole file stays. safetensors, too,
    # writes under a name of its own first.
    partial = path.with_name(f"{path.name}.{_writer()}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    whole = partial / "whole"
    try:
        partial.mkdir()
        save_file(tensors, whole, metadata)
        _sync(whole)
        whole.replace(path)
        # The rename itself is on the disk only when the directory is.
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            "MP513", f"the checkpoint {os.fspath(path)!r} could not be written", why=str(error)
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for left in _abandoned(path):
        shutil.rmtree(left, ignore_errors=True)


def _writer() -> str:
    """This machine's name, as a part of a file's."""
    return "".join(c if c.isalnum() else "-" for c in platform.node()) or "unnamed"


def _abandoned(path: Path) -> Iterator[Path]:
    """What killed processes left behind: of this machine at once, of others on the same disk after a day."""
    for found in path.parent.iterdir():
        name = found.name.removeprefix(f"{path.name}.").split(".")
        if found.name.endswith(".partial") and len(name) == 4 and name[1].isdigit() and not _alive(found, *name[:2]):
            yield found


def _alive(found: Path, writer: str, process: str) -> bool:
    try:
        if writer == _writer() and os.name == "posix":
            os.kill(int(process), 0)
            return True
        return time.time() - found.stat().st_mtime < _ABANDONED_SECONDS
    except ProcessLookupError:
        return False
    except OSError:
        return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            words = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if words.get("format") != FORMAT:
        raise _unreadable(path, f"its format is {words.get('format', 'not named')}, not {FORMAT}")
    if words.get("digest") != _digest(words):
        raise _unreadable(path, "its table of contents is not what was written")
    # The digest guards against damage, not against malice: nothing about the words is taken for granted.
    try:
        facts = json.loads(words["tensors"])
        damaged = [key for key, known in facts.items() if key not in tensors or _facts(tensors[key]) != known]
        damaged += [key for key in tensors if key not in facts]
        unpacked = _unpack(json.loads(words["tree"]), tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, RuntimeError) as error:
        why = f"its table of contents is not one: {type(error).__name__}: {error}"
        raise _unreadable(path, why[:300]) from error
    if damaged:
        raise _unreadable(path, f"{len(damaged)} tensors are not what was written, first {damaged[0]!r}")
    if not isinstance(unpacked, dict):
        raise _unreadable(path, f"it holds a {type(unpacked).__name__}, not model, optimizer, step, extra and rng")
    return unpacked


def _unreadable(path: Any, why: str) -> TrainingError:
    return TrainingError(
        "MP511", f"the checkpoint {os.fspath(path)!r} cannot be read", why=why, try_="an older checkpoint"
    )


def _facts(tensor: Tensor) -> list[Any]:
    """Type, shape and CRC of a tensor."""
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return [str(tensor.dtype), list(tensor.shape), zlib.crc32(flat)]


def _storable(name: str, tensor: Tensor) -> list[Any]:
    """`_facts` of a tensor that the file's format knows.

    Raises:
      TrainingError: MP512.
    """
    try:
        save(dict.fromkeys(["one"], tensor.new_zeros(1)))
        return _facts(tensor)
    except (KeyError, ValueError, TypeError, RuntimeError, NotImplementedError, SafetensorError) as error:
        what = f"{name} is {str(tensor.dtype).removeprefix('torch.')}, which a checkpoint cannot hold"
        raise TrainingError("MP512", what) from error


def _digest(words: dict[str, str]) -> str:
    return str(zlib.crc32("\0".join(f"{k}={words.get(k)}" for k in ("format", "tree", "tensors")).encode()))


class _Packer:
    """Takes the tensors out of a tree, each once (tied weights stay tied), and leaves JSON."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        # With each, the tensor itself: while it lives no other comes to lie at its address.
        self._seen: dict[tuple[Any, ...], tuple[str, Tensor]] = {}

    def pack(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._store(value, path)}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.pack(item, f"{path}.{i}") for i, item in enumerate(value)]}
        if isinstance(value, dict):
            return {"dict": [[self._key(key, path), self.pack(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, _PLAIN):
            return value
        raise TrainingError("MP512", f"{path.lstrip('.')} is a {type(value).__name__}, which a checkpoint cannot hold")

    def _key(self, key: Any, path: str) -> Any:
        if isinstance(key, _PLAIN):
            return key
        raise TrainingError("MP512", f"{path.lstrip('.')} has the key {key!r}, which a checkpoint cannot hold")

    def _store(self, tensor: Tensor, path: str) -> str:
        name = path.lstrip(".")
        kinds = (Tensor, nn.Parameter, nn.Buffer)
        if type(tensor) not in kinds or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            what = (
                "a sparse tensor" if tensor.layout != torch.strided else f"a {type(tensor).__name__} without dense data"
            )
            raise TrainingError("MP512", f"{name} is {what}, which a checkpoint cannot hold")
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device,
                    tensor.is_conj(), tensor.is_neg())  # fmt: skip
        if tensor.numel() and identity in self._seen:
            return self._seen[identity][0]
        # "a.b" and {"a": {"b": …}} have one path, and so have 1 and "1".
        name = next(
            n for n in itertools.chain([name], (f"{name}#{i}" for i in itertools.count(2))) if n not in self.tensors
        )
        self._seen[identity] = name, tensor
        # A copy only where it must be: off the device, out of a view, or off a storage that another tensor shares.
        kept = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
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
    if kind not in ("list", "tuple"):
        raise ValueError(f"there is no kind {kind!r}")
    items = [_unpack(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _check_random_state(path: Any, state: Any) -> None:
    """Try the states on generators of our own, so that none fails when the rest is loaded already.

    Raises:
      TrainingError: MP511.
    """
    try:
        torch.Generator().set_state(state["torch"])
        random.Random().setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.RandomState().set_state((kind, keys.numpy().astype(np.uint32), *rest))
        if _cuda_fits(state):
            for number, one in enumerate(state["cuda"]):
                torch.Generator(f"cuda:{number}").set_state(one)
    except Exception as error:
        raise _unreadable(path, f"the state of its random generators: {type(error).__name__}: {error}") from error


def _cuda_fits(state: dict[str, Any]) -> bool:
    return "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count()


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if _cuda_fits(state):
        torch.cuda.set_rng_state_all(state["cuda"])
