"""A comparison as a page and as a notebook's cell."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from synthetic_report import HOSTILE

from mpcompile.report.comparison import Comparison, ErrorRow
from mpcompile.report.comparison_page import comparison_cell, comparison_page


def row(name: str, own: float = 1e-3, **more: Any) -> ErrorRow:
    usual = {"node": name, "op": "aten.mm.default", "phase": "forward", "module": "head", "source": "model.py:3", "dtype": "fp16",
             "error": own, "own": own, "inherited": 0.0, "underflow": 0, "overflow": 0, "elements": 16, "largest": 1.0,
             "headroom": 15.99}  # fmt: skip
    return ErrorRow(name, **{**usual, **more})


@pytest.fixture
def found() -> Comparison:
    values = (row("fine", 1e-4), row("bad", math.inf, overflow=3, headroom=-math.inf), row("noisy", 0.5, noise=True))
    gradients = (row("fine'", 2e-3, phase="backward", headroom=math.inf),)
    parameters = (row("head.weight", 5e-3, phase="backward"),)
    other = Comparison("low=fp16,plan=autocast", "fp16", "cpu", "", (), 1.0, (row("fine", 3e-4),),
                       parameters=parameters)  # fmt: skip
    return Comparison("low=fp16", "fp16", "cpu", "the model's loss", (1.25, 1.5), 65536.0, values, gradients, parameters,
                      autocast=other, notes=("one note",))  # fmt: skip


def rows(text: str) -> list[dict[str, Any]]:
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    lists = {
        name: one if isinstance(one, list) else [one["words"][at] for at in one["at"]]
        for name, one in data["rows"].items()
    }
    return [dict(zip(lists, one, strict=True)) for one in zip(*lists.values(), strict=True)]


def test_every_row_is_there_worst_first(found: Comparison) -> None:
    told = rows(comparison_page(found))
    assert (
        [one["id"] for one in told]
        == [one.id for one in found.rows]
        == ["bad", "head.weight", "fine'", "fine", "noisy"]
    )
    by = {one["id"]: one for one in told}
    assert (by["bad"]["own"], by["bad"]["overflow"], by["bad"]["headroom"]) == ("inf", 3, "-inf")
    assert by["fine"]["autocast"] == 3e-4
    assert by["bad"]["autocast"] == ""  # autocast has no such value
    assert by["noisy"]["part"] == "value, noise"
    assert by["head.weight"]["part"] == "gradient of a parameter"


def test_the_page_says_the_loss_the_worst_and_the_notes(found: Comparison) -> None:
    text = comparison_page(found)
    for words in (
        "loss (the model&#39;s loss): 1.25, FP32 1.5",
        "3 elements overflow",
        "one note",
        "worst 5.0e-03 at head.weight",
    ):
        assert words in text


def test_a_cell_has_no_script_and_the_worst_rows(found: Comparison) -> None:
    text = comparison_cell(found)
    assert text == found._repr_html_()
    assert "<script" not in text
    assert text.index(">bad<") < text.index(">head.weight<")


def test_hostile_names_are_text(found: Comparison) -> None:
    bad = Comparison(
        "low=fp16",
        "fp16",
        "cpu",
        HOSTILE,
        (1.0, 1.0),
        1.0,
        (row(HOSTILE, module=HOSTILE, source=HOSTILE),),
        notes=(HOSTILE,),
    )
    for text in (comparison_page(bad), comparison_cell(bad)):
        assert "<b-hostile" not in text
        assert "<img" not in text


def test_values_alone_and_nothing_at_all_have_a_page(found: Comparison) -> None:
    assert rows(comparison_page(Comparison("low=bf16", "bf16", "cpu", "", (), 1.0, (row("a"),))))[0]["id"] == "a"
    assert rows(comparison_page(Comparison("low=bf16", "bf16", "cpu", "", (), 1.0, ()))) == []
