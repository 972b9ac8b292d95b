"""What is bisected: a factory's model, or an ONNX file, under plans that keep this and that in FP32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mpcompile.errors import MPCompileError, UsageError
from mpcompile.tools import target


class Subject(Protocol):
    """Fields: policy: one line."""

    policy: str

    def candidates(self) -> dict[str, list[str]]:
        """Module -> its nodes that run low."""
        ...

    def measure(self, nodes: frozenset[str]) -> Mapping[str, float]:
        """What is measured with `nodes` in FP32."""
        ...

    def call(self, function: Callable[..., Any], nodes: frozenset[str], name: str) -> Any:
        """What `function` says of the compiled model with `nodes` in FP32."""
        ...


class _Named:
    """An override that picks nodes by id."""

    def __init__(self, ids: frozenset[str]) -> None:
        self.ids = ids

    __name__ = "tried"

    def __call__(self, node: Any) -> bool:
        return node.id in self.ids


def _kept(overrides: Mapping[str, Any], nodes: frozenset[str]) -> dict[str, Any]:
    more = (_Named(nodes),) if nodes else ()
    return {**overrides, "keep_fp32": (*overrides["keep_fp32"], *more)}


class OfTorch:
    """A factory's model. A user's function gets a model fresh from the factory each time."""

    def __init__(self, name: str, policy: str, overrides: Mapping[str, Any], samples: Path | None) -> None:
        from mpcompile import mpcompile
        from mpcompile.training.numerics.probe import Probe

        if samples is not None:
            raise UsageError("MP800", "--samples is for .onnx files", try_="the factory gives the batch")
        self.name, self.overrides = name, overrides
        made = target.load(name)
        self._wrap = mpcompile
        wrapped = mpcompile(made.model, policy, **overrides)
        self.settings = wrapped.settings
        self.asked, self.policy = policy, str(wrapped.policy)
        self.probe = Probe(made.model, made.args, made.kwargs)

    def candidates(self) -> dict[str, list[str]]:
        return self.probe.candidates(self.settings)

    def measure(self, nodes: frozenset[str]) -> Mapping[str, float]:
        from dataclasses import replace

        kept = _kept({"keep_fp32": self.settings.keep_fp32}, nodes)["keep_fp32"]
        return self.probe.measure(replace(self.settings, keep_fp32=kept))

    def call(self, function: Callable[..., Any], nodes: frozenset[str], name: str) -> Any:
        import torch

        made = target.load(self.name)
        wrapped = self._wrap(made.model, self.asked, backend="eager", **_kept(self.overrides, nodes))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return _called(function, wrapped, name)


class OfOnnx:
    """An ONNX file, on samples or generated inputs."""

    def __init__(self, name: str, policy: str, overrides: Mapping[str, Any], samples: Path | None) -> None:
        from mpcompile import mpcompile

        self.path, self.asked, self.overrides, self.samples = target.existing(name), policy, overrides, samples
        self._wrap = mpcompile
        self.made = mpcompile(self.path, policy, **overrides)
        self.policy = str(self.made.policy)

    def candidates(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for node in self.made.graph:
            if not node.is_cast and node.precision in ("fp16", "bf16") and not node.scope:
                found.setdefault(node.module, []).append(node.id)
        return found

    def measure(self, nodes: frozenset[str]) -> Mapping[str, float]:
        made = self._wrap(self.path, self.asked, **_kept(self.overrides, nodes))
        try:
            errors = made.verify(self.samples)
        except MPCompileError as error:
            if error.code != "MP605":
                raise
            return {"output": float("inf"), "finite": 0.0}
        return {"output": errors[0].relative if errors else 0.0, "finite": 1.0}

    def call(self, function: Callable[..., Any], nodes: frozenset[str], name: str) -> Any:
        return _called(function, self._wrap(self.path, self.asked, **_kept(self.overrides, nodes)), name)


def _called(function: Callable[..., Any], made: Any, name: str) -> Any:
    try:
        return function(made)
    except MPCompileError:
        raise
    except Exception as error:
        raise UsageError("MP804", f"the check {name} failed: {type(error).__name__}: {error}",
                         where=target.place_of(error)) from error  # fmt: skip
