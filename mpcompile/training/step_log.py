"""`step.log_to(writer)`: a running step's numbers, read every n updates, with no wait for the device in between."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from mpcompile.errors import TrainingError
from mpcompile.training.result import StepResult

# How often an overflow is looked for, node by node, in the life of one log: each is a run of its own.
EXPLAINED = 5


class Writer(Protocol):
    """What `log_to` writes to."""

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One number of update `step`."""
        ...

    def text(self, tag: str, text: str, step: int) -> None:
        """A line of text of update `step`."""
        ...


class StepLog:
    """Keeps the results of `every` updates, then reads them with one transfer and writes what they say.

    Per update: the means of loss and gradient norm over the period (of what is finite), the scale after it, how many were
    skipped in it, the seconds of an update. Where the last update of a period was skipped, the node that overflowed is
    looked for in its batch, `EXPLAINED` times at most.
    """

    def __init__(self, writer: Writer, every: int, explain: Callable[..., Any]) -> None:
        self.writer, self.every, self.explain = writer, every, explain
        self.updates, self.left = 0, EXPLAINED
        self._held: list[StepResult] = []
        self._since = time.perf_counter()

    def note(self, result: StepResult, updated: bool, batch: tuple[Any, Any] | None) -> None:
        """Take in one call; only those that update count. A window that was ended early has no batch of its own."""
        if not updated:
            return
        self.updates += 1
        self._held.append(result)
        if len(self._held) >= self.every:
            self.read(batch)

    def read(self, batch: tuple[Any, Any] | None = None) -> None:
        """Read and write what was kept (at the end of a training, say)."""
        if not self._held:
            return
        held, self._held = self._held, []
        rows = [torch.stack([getattr(one, name).detach().reshape(()).float() for one in held])
                for name in ("loss", "stepped", "scale", "grad_norm")]  # fmt: skip
        loss, stepped, scale, norm = torch.stack(rows).tolist()  # the one wait
        now = time.perf_counter()
        seconds, self._since = (now - self._since) / len(held), now
        found = {
            "loss": _mean(loss),
            "loss_scale": scale[-1],
            "grad_norm": _mean(norm),
            "skipped": float(len(held) - sum(stepped)),
            "step_seconds": seconds,
        }
        for name, value in found.items():
            self.writer.scalar(f"mpcompile/{name}", value, self.updates)
        if batch is not None and not stepped[-1] and self.left:
            self.left -= 1
            self._explained(batch)

    def _explained(self, batch: tuple[Any, Any]) -> None:
        found = self.explain(*batch)
        self._since = time.perf_counter()
        if found is not None:
            self.writer.text("mpcompile/overflow", str(found), self.updates)


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


class JsonLines:
    """A file of one JSON object a line, which `mpcompile watch` shows."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with open(self.path, "a", encoding="utf-8"):  # what cannot be written is an error now
            pass

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._write({"tag": tag, "value": value if math.isfinite(value) else str(value), "step": step})

    def text(self, tag: str, text: str, step: int) -> None:
        self._write({"tag": tag, "text": text, "step": step})

    def _write(self, one: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**one, "time": round(time.time(), 3)}) + "\n")


class _Adapter:
    """Another tool's object as a `Writer`."""

    def __init__(self, scalar: Callable[[str, float, int], Any], text: Callable[[str, str, int], Any]) -> None:
        self.scalar, self.text = scalar, text


def writer_of(given: Any) -> Writer:
    """`given` as a writer: a path, or an object with the methods of `Writer`, of TensorBoard's `SummaryWriter`
    (``add_scalar``, ``add_text``), of MLflow (``log_metric``, ``set_tag``) or of a Weights & Biases run (``log``).

    Raises:
      TrainingError: MP563.
    """
    if isinstance(given, (str, os.PathLike)):
        return JsonLines(given)
    for names, adapt in _KINDS:
        if all(callable(getattr(given, name, None)) for name in names):
            return adapt(given)
    raise TrainingError(
        "MP563",
        f"a {type(given).__name__} is no writer",
        why="it has none of the methods that are known",
        try_="scalar(tag, value, step) and text(tag, text, step); or a path: step.log_to('run.jsonl')",
    )


_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], Writer]], ...] = (
    (("scalar", "text"), lambda one: one),
    (("add_scalar", "add_text"), lambda one: _Adapter(one.add_scalar, one.add_text)),
    (("log_metric", "set_tag"), lambda one: _Adapter(lambda tag, value, step: one.log_metric(tag, value, step=step),
                                                     lambda tag, text, step: one.set_tag(f"{tag}.{step}", text))),
    (("log",), lambda one: _Adapter(lambda tag, value, step: one.log({tag: value}, step=step),
                                    lambda tag, text, step: one.log({tag: text}, step=step))),
)  # fmt: skip

__all__ = ["JsonLines", "StepLog", "Writer", "writer_of"]
