"""Numeric tests run low: a CPU's row here makes low products free, and a test whose products all stay FP32 fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpcompile.devices import NUMBERS, PLACE, built_in
from mpcompile.formats import LOW
from mpcompile.graph import PrecisionGraph
from mpcompile.passes.assign import Assign

PRODUCTS = frozenset({"matmul", "convolution", "attention", "rnn"})


def precisions_of_products(graph: PrecisionGraph) -> set[str]:
    return {node.precision for node in graph if node.kind in PRODUCTS and not node.is_cast}


def assert_low_products(mp: Any) -> None:
    """Some product of what `mp` has compiled runs low (for tests that pin another row, or compile apart)."""
    found = set().union(*(precisions_of_products(plan.graph) for plan in mp.plans))
    assert found & set(LOW), f"no low product: {found or 'no product at all'}"


@pytest.fixture(scope="session")
def free_row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device file in which the row of every CPU is that of `free-low`."""
    path = tmp_path_factory.mktemp("devices") / "devices.toml"
    row = built_in()["free-low"]
    path.write_text("[cpu]\n" + "".join(f"{name} = {getattr(row, name)!r}\n" for name in NUMBERS), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def low_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, free_row: Path) -> Iterator[None]:
    """Low products are free in this test; where it plans any under a low policy, at least one of them ran low.

    ``@pytest.mark.fp32_products`` says that the test is about products that stay FP32.
    """
    monkeypatch.setenv(PLACE, str(free_row))
    seen, apply = set[str](), Assign.apply

    def watched(self: Assign, graph: PrecisionGraph) -> Any:
        result = apply(self, graph)
        seen.update(precisions_of_products(graph))
        return result

    monkeypatch.setattr(Assign, "apply", watched)
    yield
    if seen and request.node.get_closest_marker("fp32_products") is None:
        assert seen & set(LOW), "every product of this test ran in FP32: it says nothing of low precision"
