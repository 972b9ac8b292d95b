"""`benchmarks/fp8.py`: what its files hold, that each candidate is written as it ends, and that time is kept."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
NUMBER = {"type": "number"}
RUN = {
    "type": "object",
    "required": ["recipe", "seed", "seconds", "losses", "last", "held"],
    "properties": {
        "recipe": {"enum": ["bf16", "fp8", "rowwise", "torchao"]},
        "seed": {"type": "integer"},
        "losses": {"type": "array", "items": NUMBER, "minItems": 1},
        "last": NUMBER,
        "held": NUMBER,
        "seconds": NUMBER,
    },
}
WAY = {
    "type": "object",
    "required": ["first_s", "losses", "peak", "seconds", "median"],
    "properties": {"seconds": {"type": "array", "items": NUMBER}, "median": {"type": ["number", "null"]}},
}
MODEL = {
    "type": "object",
    "required": ["predicted", "ways", "failed"],
    "properties": {"ways": {"type": "object", "additionalProperties": WAY}},
}
SCHEMA = {
    "type": "object",
    "required": ["versions", "seconds"],
    "properties": {
        "converge": {
            "type": "object",
            "required": ["setting", "expected", "runs"],
            "properties": {"runs": {"type": "array", "items": RUN, "minItems": 1}},
        },
        "train": {"type": "object", "additionalProperties": MODEL, "minProperties": 1},
    },
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("fp8")
    for name in ("fp8", "fp8_training"):
        sys.modules.pop(name, None)


def ran(script: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *given: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["fp8.py", *given, "--tiny", "--out", str(out)])
    script.main()
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    jsonschema.validate(found, SCHEMA)
    return found


def test_each_candidate_is_written_as_it_ends(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, before, training = tmp_path / "c.json", [], sys.modules["fp8_training"]

    def trained(name: str, *given: Any) -> dict[str, Any]:
        before.append(len(json.loads(out.read_text(encoding="utf-8"))["converge"]["runs"]) if out.exists() else 0)
        return {"seconds": 1.0, "losses": [2.0, 1.0], "last": 1.5, "held": 1.6}

    monkeypatch.setattr(training, "_trained", trained)
    found = ran(script, monkeypatch, out, "converge", "--seeds", "0", "1")
    assert before == list(range(6))
    assert [(run["recipe"], run["seed"]) for run in found["converge"]["runs"]][:3] == [
        ("bf16", 0),
        ("fp8", 0),
        ("torchao", 0),
    ]


def test_none_is_begun_without_the_seconds_for_it(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = sys.modules["fp8_training"]
    clock = iter([0.0, 0.0, 100.0, 200.0, 300.0])
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    budget = training.Budget.of(290.0)
    # Each takes a hundred seconds: the third would end at 300.
    assert [budget.left("one") for _ in range(3)] == [True, True, False]


def test_the_text_is_there_and_is_read_in_order(script: Any) -> None:
    training = sys.modules["fp8_training"]
    data = training.text(1 << 20)
    assert len(data) == 1 << 20
    assert bytes(data[:4096].tolist()).decode("utf-8", "replace").count("\n") > 10
    assert training.text(1 << 10).tolist() == data[: 1 << 10].tolist()


@pytest.mark.slow
def test_a_small_model_is_trained_by_each_recipe(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = ("converge", "--seeds", "0", "--steps", "12", "--recipes", "bf16", "fp8")
    runs = ran(script, monkeypatch, tmp_path / "c.json", *given)["converge"]["runs"]
    assert [len(run["losses"]) for run in runs] == [2, 2]
    assert runs[0]["losses"] != runs[1]["losses"], "FP8 was not read"
    assert all(run["losses"][1] < run["losses"][0] for run in runs)
    assert math.isclose(runs[0]["last"], runs[1]["last"], abs_tol=0.05)


@pytest.mark.slow
def test_a_small_llama_is_timed_each_way(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = ("train", "--rounds", "1", "--ways", "compile+autocast,step fp8,torchao", "--pin")
    found = ran(script, monkeypatch, tmp_path / "t.json", *given)["train"]["llama-by-hand"]
    assert found["ways"].keys() | found["failed"].keys() == {"compile+autocast", "step fp8", "torchao"}
    assert found["predicted"]["step fp8"]["ms"] > 0


def test_kept_results_have_this_form() -> None:
    for path in (FOLDER / "results").glob("h200-fp8-*.json"):
        jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), SCHEMA)
